"""Hosts: which ranks of the cluster share a machine, and each one's share of it.

A host is told by `shared_memory.host_id`. Rank 0 computes nothing and is not counted.
"""

import os
import threading
from collections.abc import Mapping, Sequence

import torch
from torch.distributed.distributed_c10d import Store

from memserve.clock import monotonic_ns, to_s
from memserve.cluster.mailbox import PATIENCE
from memserve.cluster.roster import CONTROLLER
from memserve.config.errors import ConfigError
from memserve.config.schema import RunConfig

_LOOK_S = 0.05


def hosts_of(store: Store, rank: int, world_size: int, host: str) -> dict[int, str]:
    """The host of every rank but rank 0, once all have told it. host: this rank's. Raises ConfigError naming who has
    not come.
    """
    store.set(f"host/{rank}", host)
    others, began_ns = range(CONTROLLER + 1, world_size), monotonic_ns()
    while not store.check([f"host/{other}" for other in others]):
        if to_s(monotonic_ns() - began_ns) > PATIENCE.total_seconds():
            late = [other for other in others if not store.check([f"host/{other}"])]
            raise ConfigError(f"ranks {late} have not come within {PATIENCE.total_seconds():.0f} s")
        threading.Event().wait(_LOOK_S)  # not in the store, where no signal is heeded
    return {other: store.get(f"host/{other}").decode() for other in others}


def check_one_host(hosts: Mapping[int, str]) -> None:
    """For transport=mapped: raises ConfigError, on every rank, where instances are on several hosts."""
    first = min(hosts)
    for rank, host in hosts.items():
        if host != hosts[first]:
            raise ConfigError(
                f"transport=mapped: rank {first} is on host {hosts[first]!r}, rank {rank} on {host!r}: "
                "expected all instances on one, or transport=gloo"
            )


def neighbours(hosts: Mapping[int, str], rank: int) -> list[int]:
    """The ranks on this rank's host, it among them."""
    return [other for other in hosts if hosts[other] == hosts[rank]]


def choose_device(device: str, neighbours: Sequence[int], rank: int) -> None:
    """`model.device=cuda` means a GPU of the rank's own, as far as the host has them; then they share in turn.

    Who computes on a CPU takes none: choosing one would make a context on it, half a gigabyte and half a second.
    """
    if device.startswith("cuda") and torch.cuda.is_available():
        torch.cuda.set_device(neighbours.index(rank) % torch.cuda.device_count())


def set_threads(cfg: RunConfig, neighbours: Sequence[int]) -> int:
    """Threads of this rank's process: model.num_threads, or an equal share of the host's CPUs. Returns them.

    torchrun sets OMP_NUM_THREADS=1 for everybody, which would be a slow surprise.
    """
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    num_threads = cfg.model.num_threads or max(1, usable // len(neighbours))
    torch.set_num_threads(num_threads)
    return num_threads
