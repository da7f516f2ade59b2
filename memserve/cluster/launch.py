"""Launch: which rank this process is, as torchrun says, and whether that fits the configuration. Starts no process.

Rank 0 is the global scheduler and the client; every other rank is one instance, in the order of `cluster.roles`.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from memserve.cluster.mailbox import own_host
from memserve.config.checks import ConfigError
from memserve.config.schema import RunConfig

CONTROLLER = 0


@dataclass(frozen=True)
class Place:
    """One process of the cluster. store: of all of them.  local_ranks: how many share this host.  host: its address."""

    rank: int
    world_size: int
    local_rank: int
    local_ranks: int
    store: Store
    host: str


def is_under_torchrun(environment: Mapping[str, str] = os.environ) -> bool:
    return "RANK" in environment and "WORLD_SIZE" in environment


def rank_of(environment: Mapping[str, str] = os.environ) -> int:
    """This process's rank; 0 where nobody says so."""
    return int(environment.get("RANK", "0"))


def check_world(cfg: RunConfig, world_size: int) -> None:
    """Raises ConfigError unless there is one rank for the global scheduler and one for each instance."""
    needed = 1 + len(cfg.cluster.roles)
    if world_size != needed:
        raise ConfigError(
            f"{world_size} ranks for cluster.roles={[str(r) for r in cfg.cluster.roles]}: expected {needed}, one for "
            f"the global scheduler and one an instance (torchrun --nproc-per-node {needed})"
        )


def find_place(cfg: RunConfig) -> Place:
    """Where this process is. Raises ConfigError without torchrun, or for a number of ranks that does not fit."""
    if not is_under_torchrun():
        needed = 1 + len(cfg.cluster.roles)
        raise ConfigError(f"exec=distributed: expected torchrun --nproc-per-node {needed} scripts/run.py ...")
    world_size = int(os.environ["WORLD_SIZE"])
    check_world(cfg, world_size)
    try:
        store, rank, _ = next(iter(rendezvous("env://")))
        host = own_host(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    except (RuntimeError, OSError, KeyError) as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ConfigError(f"no store at {address} (torchrun's --master-addr and --master-port): {error}") from error
    return Place(
        rank,
        world_size,
        int(os.environ.get("LOCAL_RANK", rank)),
        int(os.environ.get("LOCAL_WORLD_SIZE", world_size)),
        store,
        host,
    )


def choose_device(place: Place) -> None:
    """`model.device=cuda` means a GPU of the instance's own, as far as the host has them; then they share in turn."""
    if torch.cuda.is_available():
        torch.cuda.set_device((place.local_rank - (place.rank == place.local_rank)) % torch.cuda.device_count())


def set_threads(cfg: RunConfig, place: Place) -> int:
    """Threads of this instance's process: model.num_threads, or an equal share of the host's CPUs. Returns them.

    torchrun sets OMP_NUM_THREADS=1 for everybody, which would be a slow surprise.
    """
    num_instances = max(1, place.local_ranks - (place.rank < place.local_ranks))
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    num_threads = cfg.model.num_threads or max(1, usable // num_instances)
    torch.set_num_threads(num_threads)
    return num_threads
