"""Per role: what the instances of one role have otherwise than the others, `+per_role.decode.sched.token_budget=512`.

`of_role` is the configuration that such an instance is built and checked by. What is not of an instance, or has to be
the same at both ends of a transfer (blocks, their layout, the model), is for all.
"""

import copy
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from memserve.config.schema import PerRoleConfig, RunConfig
from memserve.request import Role

OPTIONS = ("batching", "cost_model", "eviction", "kvcache", "preemption", "queue", "sched", "swap")


def of_role(cfg: RunConfig, role: str) -> RunConfig:
    """The configuration of the instances of a role, which says nothing `per_role` itself: `cfg`, where nothing is said
    of them. A node with a `_target_` takes the place of the one that is for all; others change options of it.

    Raises OmegaConf's errors for what the schema does not allow.
    """
    theirs = getattr(cfg.per_role, role)
    if not theirs:
        return cfg
    changed = copy.deepcopy(cast(DictConfig, cfg))
    OmegaConf.set_readonly(changed, False)
    for name in theirs:
        changed[name] = option_of_role(cfg, role, name)
    changed.per_role = PerRoleConfig()
    OmegaConf.set_readonly(changed, True)
    return cast(RunConfig, changed)


def option_of_role(cfg: RunConfig, role: str, name: str) -> Any:
    """One of OPTIONS as `of_role` has it: for who asks for no other, since to copy all of them takes much longer."""
    node, said = getattr(cfg, name), getattr(cfg.per_role, role)
    theirs = said.get(name) if said else None  # an option that is not there takes OmegaConf longest
    if theirs is None:
        return node
    own = OmegaConf.to_container(theirs) if OmegaConf.is_config(theirs) else theirs
    if "_target_" in node:
        return OmegaConf.create(_changed(OmegaConf.to_container(node), own))
    changed = copy.deepcopy(node)
    OmegaConf.set_readonly(changed, False)
    changed.merge_with(own)  # of the schema's type, which checks it
    OmegaConf.set_readonly(changed, True)
    return changed


def num_ranks(cfg: RunConfig, role: str) -> int:
    """Over how many ranks an instance of that role is split; a store, which runs no model, is one."""
    if role == Role.STORE:
        return 1
    sizes = cfg.cluster.tensor_parallel
    said: int | None = getattr(sizes, role)
    return sizes.every if said is None else said


def _changed(node: Any, by: Any) -> Any:
    if not isinstance(node, dict) or not isinstance(by, dict) or "_target_" in by:
        return by
    return {**node, **{key: _changed(node.get(key), value) for key, value in by.items()}}
