"""Agreement: all members of a cluster are started with one configuration. Knows options by their names alone.

Rank 0 leaves its own in the store, and whoever else differs from it is refused by the options' names. What says where
things are on a machine, or which member this is, may differ.
"""

from collections.abc import Mapping
from typing import Any

import msgspec
from torch.distributed.distributed_c10d import Store

from memserve.cluster.roster import CONTROLLER
from memserve.compose import to_dict
from memserve.config.errors import ConfigError
from memserve.config.schema import RunConfig

MAY_DIFFER = (
    "cluster.member", "cluster.store", "cost_model.path", "model.num_threads", "model.path", "tracking",
    "workload.path",
)  # fmt: skip
_KEY = "configuration"


def check_agreed(cfg: RunConfig, store: Store, rank: int) -> None:
    """Raises ConfigError, on every rank but 0, for options that are not rank 0's. Waits for rank 0."""
    own = _compared(cfg)
    if rank == CONTROLLER:
        store.set(_KEY, msgspec.json.encode(own).decode())
        return
    first = msgspec.json.decode(store.get(_KEY))
    differing = [name for name in sorted(own.keys() | first.keys()) if own.get(name) != first.get(name)]
    if differing:
        told = ", ".join(f"{name}={_word(own, name)} (the scheduler has {_word(first, name)})" for name in differing)
        raise ConfigError(f"rank {rank}: {told}: expected the scheduler's words")


def _word(options: Mapping[str, Any], name: str) -> str:
    return repr(options[name]) if name in options else "nothing"


def _compared(cfg: RunConfig) -> dict[str, Any]:
    """Options by their full names. Of a device its kind: a member may have a GPU of its own by number."""
    options = {name: value for name, value in _flat("", to_dict(cfg)) if not name.startswith(MAY_DIFFER)}
    return options | {"model.device": str(cfg.model.device).partition(":")[0]}


def _flat(prefix: str, node: object) -> list[tuple[str, Any]]:
    if not isinstance(node, dict):
        return [(prefix, node)]
    return [item for key, value in node.items() for item in _flat(f"{prefix}.{key}" if prefix else str(key), value)]
