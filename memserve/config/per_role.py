"""Per role: what the instances of one role have otherwise than the others, `+per_role.decode.sched.token_budget=512`.

`of_role` is the configuration that such an instance is built and checked by. What is not of an instance, or has to be
the same at both ends of a transfer (blocks, their layout, the model), is for all.
"""

from dataclasses import replace
from typing import Any

from omegaconf import OmegaConf

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
    changed = {name: option_of_role(cfg, role, name) for name in theirs}
    return replace(cfg, **changed, per_role=PerRoleConfig())


def option_of_role(cfg: RunConfig, role: str, name: str) -> Any:
    """One of OPTIONS as `of_role` has it, for who asks for no other."""
    node, theirs = getattr(cfg, name), getattr(cfg.per_role, role).get(name)
    if theirs is None:
        return node
    if isinstance(node, dict):
        return _changed(node, theirs)
    whole = OmegaConf.create({name: OmegaConf.structured(node)})
    whole.merge_with({name: theirs})  # which checks it
    return OmegaConf.to_object(whole[name])


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
