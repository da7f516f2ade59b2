"""Launch: which rank this process is, as torchrun says, and whether that fits the configuration. Starts no process.

Which rank is what is roster.py's. A store that all ranks reach comes from torchrun.
"""

import logging
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from memserve.cluster.mailbox import PATIENCE, own_host
from memserve.cluster.roster import Roster
from memserve.config.checks import ConfigError
from memserve.config.schema import RunConfig
from memserve.model.parallel import WHOLE, GroupShard, Shard

_IDLE = timedelta(days=365)  # an idle instance's followers wait for its leader; a dead one is noticed at once
_LOOK_S = 0.5  # between looks at the parent
_log = logging.getLogger("memserve")


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


class Torchrun:
    """What started this process. Knows when it is gone: killed, without ending its ranks.

    A rank that was started without torchrun may outlive who started it.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._process = os.getppid() if "TORCHELASTIC_RUN_ID" in environment else None

    @property
    def is_gone(self) -> bool:
        return self._process is not None and os.getppid() != self._process

    def end_with(self) -> None:
        """Once it is gone, this process gets a SIGTERM."""
        if self._process is not None:
            threading.Thread(target=self._outlive, name="torchrun's end", daemon=True).start()

    def _outlive(self) -> None:
        while not self.is_gone:
            threading.Event().wait(_LOOK_S)
        _log.error("torchrun, process %d, is gone", self._process)
        os.kill(os.getpid(), signal.SIGTERM)


def check_world(cfg: RunConfig, world_size: int) -> None:
    """Raises ConfigError unless there is one rank for the global scheduler and as many as the instances need."""
    roster, roles = Roster.of(cfg), [str(role) for role in cfg.cluster.roles]
    needed = roster.world_size
    if world_size != needed:
        sizes = [roster.size(instance) for instance in range(len(roles))]
        each = "one an instance" if sum(sizes) == len(roles) else f"{sizes} for the instances (tensor_parallel)"
        spares = f", and {cfg.cluster.spares} spares" if cfg.cluster.spares else ""
        raise ConfigError(
            f"{world_size} ranks for cluster.roles={roles}: expected {needed}, one for "
            f"the global scheduler and {each}{spares} (torchrun --nproc-per-node {needed})"
        )


def find_place(cfg: RunConfig) -> Place:
    """Where this process is. Raises ConfigError without torchrun, or for a number of ranks that does not fit."""
    if not is_under_torchrun():
        needed = Roster.of(cfg).world_size
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


def check_one_host(store: Store, rank: int, world_size: int, host: str) -> None:
    """For transport=mapped: raises ConfigError, on every rank, where instances are on several hosts. Rank 0 has none.

    Collective. host: this rank's, see `shared_memory.host_id`.
    """
    store.set(f"host/{rank}", host)
    keys = [f"host/{other}" for other in range(1, world_size)]
    store.wait(keys, PATIENCE)
    hosts = [store.get(key).decode() for key in keys]
    for other, theirs in enumerate(hosts, 1):
        if theirs != hosts[0]:
            raise ConfigError(
                f"transport=mapped: rank 1 is on host {hosts[0]!r}, rank {other} on {theirs!r}: "
                "expected all instances on one, or transport=gloo"
            )


@contextmanager
def joined(place: Place, roster: Roster, device: torch.device) -> Iterator[Shard]:
    """This rank's share of its instance's model; while it lasts, torch's default group is that of the instance."""
    instance, part = roster.instance(place.rank), roster.part(place.rank)
    size = 1 if instance is None else roster.size(instance)
    if size == 1:
        yield WHOLE
        return
    store = PrefixStore(f"tensor_parallel/{instance}", place.store)
    store.set(f"here/{part}", "")
    store.wait([f"here/{other}" for other in range(size)], PATIENCE)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=part, world_size=size, timeout=_IDLE)
    try:
        assert dist.group.WORLD is not None, "it was made above"
        yield GroupShard(dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def choose_device(place: Place) -> None:
    """`model.device=cuda` means a GPU of the rank's own, as far as the host has them; then they share in turn."""
    if torch.cuda.is_available():
        torch.cuda.set_device((place.local_rank - (place.rank == place.local_rank)) % torch.cuda.device_count())


def set_threads(cfg: RunConfig, place: Place) -> int:
    """Threads of this rank's process: model.num_threads, or an equal share of the host's CPUs. Returns them.

    torchrun sets OMP_NUM_THREADS=1 for everybody, which would be a slow surprise.
    """
    num_ranks = max(1, place.local_ranks - (place.rank < place.local_ranks))
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    num_threads = cfg.model.num_threads or max(1, usable // num_ranks)
    torch.set_num_threads(num_threads)
    return num_threads
