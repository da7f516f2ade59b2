"""Checks of stores, instances that keep KV and serve nobody. As checks.py, but of all roles at once."""

from memserve.config.errors import ConfigError, class_name, require
from memserve.config.per_role import option_of_role
from memserve.config.schema import RunConfig
from memserve.config.sizes import parse_bytes
from memserve.config.targets import is_a
from memserve.request import Role

OPTIONS = ("eviction", "kvcache")  # of per_role that a store has a use for
SIZES = ("num_dram_blocks", "dram_bytes")


def check_store(cfg: RunConfig) -> None:
    """Raises ConfigError for a store that nothing would go to or come from, and for what it cannot be. cfg: checked."""
    is_there, keeps = Role.STORE in cfg.cluster.roles, not is_a(cfg.store, "NoStore")
    roles = f"cluster.roles={[str(role) for role in cfg.cluster.roles]}"
    if keeps and not is_there:
        raise ConfigError(f"store={class_name(cfg.store)} contradicts {roles}: none is store; expected store=none, or "
                          "a store among the roles")  # fmt: skip
    if not is_there:
        return
    if not keeps:
        raise ConfigError(f"{roles} contradicts store=none: nothing would go to the store; expected "
                          "another policy, such as store=write_through, or no store among the roles")  # fmt: skip
    if is_a(cfg.fetch, "NeverFetch"):
        raise ConfigError(f"{roles} contradicts fetch=never: nothing would come from the store; expected fetch=cost "
                          "or always")  # fmt: skip
    _check_size(cfg)
    _check_processes(cfg, roles)


def _check_size(cfg: RunConfig) -> None:
    """It has DRAM alone, and no scheduler."""
    said, kv = cfg.per_role.store, option_of_role(cfg, Role.STORE, "kvcache")
    for name in said:
        require(name in OPTIONS, f"per_role.store.{name}", said[name], f"one of {', '.join(OPTIONS)}")
    for name, value in said.get("kvcache", {}).items():
        allowed = f"{' or '.join(SIZES)}, since a store has DRAM alone"
        require(name in SIZES, f"per_role.store.kvcache.{name}", value, allowed)
    num_bytes = parse_bytes(kv.dram_bytes) if kv.dram_bytes is not None else 0
    require(bool(kv.num_dram_blocks or num_bytes), "per_role.store.kvcache.num_dram_blocks", kv.num_dram_blocks,
             "an integer >= 1, or dram_bytes")  # fmt: skip


def _check_processes(cfg: RunConfig, roles: str) -> None:
    if cfg.exec == "distributed" and cfg.model.device != "cpu":
        raise ConfigError(f"{roles} contradicts model.device={cfg.model.device} between processes: expected cpu, or no "
                          "store")  # fmt: skip
    if cfg.cluster.store is not None:
        raise ConfigError(f"{roles} contradicts cluster.store={cfg.cluster.store}: a store that rejoins would be one "
                          "that nobody knows; expected one torchrun for all")  # fmt: skip
