"""Checks of who is in the cluster, who comes and goes, and who gets what is left. As checks.py, which calls them."""

from memserve.config.errors import ConfigError, class_name, require
from memserve.config.per_role import num_ranks
from memserve.config.schema import RunConfig
from memserve.config.targets import is_a
from memserve.request import Role

SCHEDULER = "scheduler"  # the member of a cluster that is no instance


def check_scaling(cfg: RunConfig) -> None:
    """Spare ranks are for whoever comes later; processes are of one rank then, and end by who started them."""
    cluster, scales = cfg.cluster, not is_a(cfg.scaling, "NoScaling")
    require(cluster.spares >= 0, "cluster.spares", cluster.spares, "an integer >= 0")
    if cluster.spares and cfg.exec != "distributed":
        raise ConfigError(
            f"cluster.spares={cluster.spares} contradicts exec={cfg.exec}: expected exec=distributed, or 0"
        )
    if cluster.spares and not scales:
        raise ConfigError(f"cluster.spares={cluster.spares} contradicts scaling=fixed: nobody would ever need them")
    if not scales or cfg.exec != "distributed":
        return
    if cluster.store is not None and is_a(cfg.scaling, "Schedule"):
        raise ConfigError(f"scaling=schedule contradicts cluster.store={cluster.store}: who rejoins has a new number, "
                          "and what is scheduled goes by numbers")  # fmt: skip
    if max(num_ranks(cfg, role) for role in cluster.roles) > 1:
        raise ConfigError(f"scaling={class_name(cfg.scaling)} contradicts cluster.tensor_parallel above 1: "
                          "who comes and goes is one rank")  # fmt: skip


def check_heir(cfg: RunConfig) -> None:
    """Somebody who leaves has cached something."""
    if is_a(cfg.heir, "NoHeir"):
        return
    if is_a(cfg.scaling, "NoScaling"):
        raise ConfigError("heir contradicts scaling=fixed: nobody leaves; expected heir=none, or another scaling")
    if is_a(cfg.index, "NullIndex") or class_name(cfg.mode) == "PDBasic":  # the modes that cache derive from that
        word = "index=none" if is_a(cfg.index, "NullIndex") else "mode=pd_basic"
        raise ConfigError(f"heir contradicts {word}: nobody has cached anything; expected heir=none")


def check_departure(cfg: RunConfig) -> None:
    """Somebody leaves."""
    if is_a(cfg.scaling, "NoScaling") and not is_a(cfg.departure, "EndThere"):
        raise ConfigError(
            "departure contradicts scaling=fixed: nobody leaves; expected departure=wait, or another scaling"
        )


def check_rebalancing(cfg: RunConfig) -> None:
    """Answers can go on at another instance of the role."""
    if is_a(cfg.rebalancing, "NoRebalancing") or not is_a(cfg.scaling, "NoScaling"):
        return
    roles = [str(role) for role in cfg.cluster.roles]
    decodes = Role.DECODE if Role.DECODE in roles else Role.COLOCATED
    if roles.count(decodes) < 2:
        raise ConfigError(f"rebalancing={class_name(cfg.rebalancing)} contradicts cluster.roles={roles}: expected "
                          f"more than one {decodes} instance, or rebalancing=none")  # fmt: skip


def check_member(cfg: RunConfig) -> None:
    """Where each member of the cluster is started by itself, it is told which one it is, and where the others meet."""
    store, member = cfg.cluster.store, cfg.cluster.member
    if (store is None) != (member is None):
        raise ConfigError(f"cluster.store={store} and cluster.member={member}: expected both, or neither")
    if store is None or member is None:
        return
    if cfg.exec != "distributed":
        raise ConfigError(f"cluster.store={store} contradicts exec={cfg.exec}: expected exec=distributed")
    host, _, port = store.rpartition(":")
    is_port = port.isdecimal() and 1 <= int(port) <= 65535
    require(bool(host) and is_port, "cluster.store", store, "HOST:PORT, a port of rank 0's machine")
    last = len(cfg.cluster.roles) + cfg.cluster.spares - 1
    is_number = member.isdecimal() and int(member) <= last
    require(is_number or member == SCHEDULER, "cluster.member", member,
             f"{SCHEDULER}, or the number of an instance or of a spare from 0 to {last}")  # fmt: skip
