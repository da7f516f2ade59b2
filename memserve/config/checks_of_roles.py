"""Checks of the instances' roles: what the mode needs, what those of one have otherwise than others, and over how many
ranks each is split. As checks.py, which calls them.
"""

from collections.abc import Collection, Mapping
from typing import Any

from memserve.config.errors import ConfigError, class_name, require
from memserve.config.per_role import OPTIONS, num_ranks
from memserve.config.schema import RunConfig
from memserve.config.targets import node_class
from memserve.request import SERVING, Role

MODES = {  # classes, and their words
    "Colocated": "colocated",
    "PDBasic": "pd_basic",
    "PDCaching1": "pd_caching_1",
    "PDCaching2": "pd_caching_2",
    "PDCaching3": "pd_caching_3",
}


def check_roles(cfg: RunConfig) -> None:
    """They are roles, and those that the mode needs."""
    known = [role.value for role in Role]
    for role in cfg.cluster.roles:
        require(role in known, "cluster.roles", role, f"one of {', '.join(known)}")
    serving = [role for role in cfg.cluster.roles if role != Role.STORE.value]
    require(len(serving) >= 1, "cluster.roles", list(cfg.cluster.roles), "at least one role that serves requests")
    needed: Any = getattr(node_class(cfg.mode), "roles", None)
    if needed in ({Role.COLOCATED}, {Role.PREFILL, Role.DECODE}):  # others are refused where the mode is made
        check_roles_of_mode(cfg, needed)


def check_roles_of_mode(cfg: RunConfig, needed: Collection[Role]) -> None:
    """Instances that serve requests have all the roles that the mode needs, and no other."""
    roles, mode = [str(role) for role in cfg.cluster.roles], class_name(cfg.mode)
    missing = [role.value for role in SERVING if role in needed and role.value not in roles]
    beside = [role.value for role in SERVING if role not in needed and role.value in roles]
    if not missing and not beside:
        return
    why = f"none is {' or '.join(missing)}" if missing else f"nothing is for {' or '.join(beside)} to do"
    raise ConfigError(f"mode={MODES.get(mode, mode)} contradicts cluster.roles={roles}: {why}; expected "
                      f"{' and '.join(role.value for role in SERVING if role in needed)}")  # fmt: skip


def check_per_role(cfg: RunConfig) -> None:
    """Of roles that exist, and of what may differ. What is said is checked as the configuration of such an instance."""
    for role in Role:
        said = getattr(cfg.per_role, role.value)
        if said and role not in cfg.cluster.roles:
            raise ConfigError(f"per_role.{role} contradicts cluster.roles={list(cfg.cluster.roles)}: none is {role}")
        for name in said:
            require(name in OPTIONS, f"per_role.{role}.{name}", said[name], f"one of {', '.join(OPTIONS)}")
            require(isinstance(said[name], Mapping), f"per_role.{role}.{name}", said[name], f"options of {name}")
        if "block_size" in said.get("kvcache", {}):
            raise ConfigError(f"per_role.{role}.kvcache.block_size={said['kvcache']['block_size']}: expected "
                              "kvcache.block_size=, since blocks go from one to another")  # fmt: skip


def check_tensor_parallel(cfg: RunConfig) -> None:
    """Sizes of roles that exist, of which one divides the other where KV goes between them."""
    sizes = cfg.cluster.tensor_parallel
    for name in ("every", *SERVING):
        value = getattr(sizes, name)
        require(value is None or value >= 1, f"cluster.tensor_parallel.{name}", value, "an integer >= 1")
        if value is not None and name != "every" and name not in cfg.cluster.roles:
            raise ConfigError(f"cluster.tensor_parallel.{name}={value} contradicts cluster.roles="
                              f"{list(cfg.cluster.roles)}: none is {name}")  # fmt: skip
    for role in dict.fromkeys(cfg.cluster.roles):
        if num_ranks(cfg, role) > 1:
            _check_split(cfg, role, num_ranks(cfg, role))
    prefill, decode = (num_ranks(cfg, role) for role in (Role.PREFILL, Role.DECODE))
    if max(prefill, decode) % min(prefill, decode):
        raise ConfigError(f"cluster.tensor_parallel.prefill={prefill} and decode={decode}: expected that one divides "
                          "the other")  # fmt: skip


def _check_split(cfg: RunConfig, role: str, size: int) -> None:
    """There is a model to split, or one whose KV a simulation counts."""
    said = "every" if getattr(cfg.cluster.tensor_parallel, role) is None else role
    option = f"cluster.tensor_parallel.{said}"
    name = f"{option}={size}"
    if cfg.exec == "emulated":
        raise ConfigError(f"{name} contradicts exec=emulated: expected exec=distributed, or exec=simulated")
    if cfg.exec == "simulated":
        if cfg.geometry is None:
            raise ConfigError(f"{name} contradicts geometry=own: there is no model whose KV is split; expected "
                              "tokens=workload and a geometry")  # fmt: skip
        if cfg.tokens != "workload":
            raise ConfigError(f"{name} contradicts tokens={cfg.tokens}, whose ranks store nothing: expected "
                              "tokens=workload")  # fmt: skip
        heads = cfg.geometry.num_kv_heads
        require(heads % size == 0, option, size, f"a divisor of geometry.num_kv_heads={heads}")
        return
    if cfg.tokens != "model":
        raise ConfigError(f"{name} contradicts tokens={cfg.tokens}: there is no model to split")
    if cfg.model.compile:
        raise ConfigError(f"{name} contradicts model.compile=true: a compiled step has no sums over ranks")
