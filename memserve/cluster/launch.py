"""Launch: which rank this process is, and whether that fits the configuration. Starts no process.

    one torchrun for all     RANK is its rank, and torchrun's store that of all
    one for each instance    cluster.member says which instance it is, RANK which rank of it; rank 0 has the store

Which rank is what is roster.py's.
"""

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from queue import Empty, SimpleQueue

import msgspec
import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined] # torch does not list it
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from memserve.cluster.agreement import check_agreed
from memserve.cluster.interruption import ended_at_once
from memserve.cluster.mailbox import PATIENCE, births_of, own_host
from memserve.cluster.node_messages import Process, this_process
from memserve.cluster.roster import CONTROLLER, Roster
from memserve.cluster.watch import watched
from memserve.compose import config_dir
from memserve.config.checks_of_members import SCHEDULER
from memserve.config.errors import ConfigError
from memserve.config.overrides import check_kinds
from memserve.config.schema import RunConfig
from memserve.model.parallel import WHOLE, Shard, default_group

_IDLE = timedelta(days=365)  # an idle instance's followers wait for its leader; a dead one is noticed at once
_OUTPUTS = "outputs"  # where configs/run.yaml puts what no word puts elsewhere
_OWN_CONFIG = ("-cp", "--config-path", "-cn", "--config-name")  # Hydra's, which only this process would read
_SOON = timedelta(seconds=10)  # for rank 0's store to answer who knows that it is there: itself, who is started again


class RunOver(RuntimeError):
    """This process was started again, and the run has ended meanwhile."""


@dataclass(frozen=True)
class Place:
    """One process of the cluster. store: of all of them.  host: its address, as the others reach it.

    birth: how many processes were this rank before.  team: the store of its instance's ranks, if they have their own.
    """

    rank: int
    world_size: int
    store: Store
    host: str
    birth: int = 0
    team: Store | None = None

    def team_store(self, instance: int | None) -> Store:
        """What the ranks of an instance tell each other."""
        return PrefixStore(f"instance/{instance}", self.team or self.store)


def is_under_torchrun(environment: Mapping[str, str] = os.environ) -> bool:
    return "RANK" in environment and "WORLD_SIZE" in environment


def is_first(words: Sequence[str], environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a process that was started with these words is rank 0, as far as they and torchrun say."""
    members = [word.partition("=")[2] for word in words if word.startswith("cluster.member=")]
    return int(environment.get("RANK", "0")) == 0 and (not members or members[-1] in (SCHEDULER, "null"))


def check_words(words: Sequence[str], environment: Mapping[str, str] = os.environ) -> None:
    """Raises ConfigError for a flag of Hydra's (-m, --cfg) where several processes read the words, each for itself, and
    for what Hydra refuses by a traceback or without saying what is expected: a value of another kind, a directory that
    cannot be made.
    """
    flags = [word for word in words if word.startswith("-")]
    if flags and (is_under_torchrun(environment) or not is_first(words, environment)):
        raise ConfigError(f"{flags[0]} under torchrun or for a cluster.member: expected words with = alone; a sweep is "
                          "python scripts/run.py -m, which starts torchrun for each point")  # fmt: skip
    own = [flag for flag in flags if flag.partition("=")[0] in _OWN_CONFIG]
    if own and {"-m", "--multirun"} & set(flags):
        raise ConfigError(f"{own[0]} in a sweep, whose points read configs/run.yaml: expected --config-dir DIR")
    check_kinds(words, config_dir())
    if is_first(words, environment):
        makes = "hydra.sweep.dir" if {"-m", "--multirun"} & set(flags) else "hydra.run.dir"
        named = [word for word in words if word.lstrip("+").partition("=")[0] == makes]
        for word in named or [f"{makes}={_OUTPUTS}"]:
            _check_directory(word, word.partition("=")[2].strip("'\""))


def _check_directory(word: str, value: str) -> None:
    """Raises ConfigError where a directory of that name cannot be made, as far as it is known before Hydra reads it."""
    if any(character in value for character in "$\\"):
        return
    wanted = Path(value).absolute()
    there = next(path for path in (wanted, *wanted.parents) if os.access(path, os.F_OK))
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ConfigError(f"{word}: expected a directory, or where one can be made; {there} is none")


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
    """Where this process is. Collective: waits for rank 0.

    Raises ConfigError without torchrun, for a number of ranks that does not fit, where there is no store, and for
    options that are not rank 0's; RunOver where this process was started again and rank 0 is there no more.
    """
    with ended_at_once():
        return _place_among_all(cfg) if cfg.cluster.store is None else _place_of_member(cfg)


def _place_among_all(cfg: RunConfig) -> Place:
    """One torchrun has started all ranks, or one on each host."""
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
    check_agreed(cfg, store, rank)
    return Place(rank, world_size, store, host)


def _place_of_member(cfg: RunConfig) -> Place:
    """This process, or this torchrun, was started for one member of the cluster."""
    member, address, roster = cfg.cluster.member, str(cfg.cluster.store), Roster.of(cfg)
    ranks = range(1) if member == SCHEDULER else roster.ranks_of_member(int(str(member)))
    size, part = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if size != len(ranks):
        raise ConfigError(
            f"{size} ranks for cluster.member={member}: expected {len(ranks)} (torchrun --nproc-per-node {len(ranks)})"
        )
    host, _, port = address.rpartition(":")
    was_there = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    is_master = ranks[part] == CONTROLLER
    try:
        limit = _SOON if is_master or was_there else PATIENCE
        store = _store_at(host, int(port), is_master, limit)
        own = own_host(host, int(port))
    except (RuntimeError, OSError) as error:
        if was_there and not is_master:
            raise RunOver(f"nobody is at cluster.store={address} any more: {error}") from error
        raise ConfigError(f"cluster.store={address}: no store there: {error}") from error
    store.set_timeout(PATIENCE)
    check_agreed(cfg, store, ranks[part])
    team = next(iter(rendezvous("env://")))[0] if size > 1 else None
    return Place(ranks[part], roster.world_size, store, own, _birth(store, ranks[part], str(member)), team)


def _store_at(host: str, port: int, is_master: bool, limit: timedelta) -> Store:
    """torch's store there. Raises DistError, or OSError, if it is not there within `limit`, or says nothing for as long
    again: torch itself waits without end for who takes a connection and never answers.
    """
    found: SimpleQueue[Store | Exception] = SimpleQueue()

    def connect() -> None:
        try:
            found.put(TCPStore(host, port, is_master=is_master, wait_for_workers=False, timeout=limit))
        except Exception as error:
            found.put(error)

    threading.Thread(target=connect, name="store", daemon=True).start()
    try:
        store = found.get(timeout=2 * limit.total_seconds())
    except Empty:
        raise TimeoutError("somebody takes connections there and answers none") from None
    if isinstance(store, Exception):
        raise store
    return store


def _birth(store: Store, rank: int, member: str) -> int:
    """How many processes were this rank before; from now on it is this one, whose number is under process/RANK.

    Raises ConfigError while the one before runs, as far as this host can tell.
    """
    if store.check([f"process/{rank}"]):
        before = process_of(store, rank)
        process = watched(before)
        if process is not None and not process.is_gone:
            raise ConfigError(f"cluster.member={member}: process {before.pid} is that: expected one that has ended")
    store.set(f"process/{rank}", msgspec.json.encode(this_process()).decode())
    return store.add(births_of(rank), 1) - 1


def process_of(store: Store, rank: int) -> Process:
    """The latest process that is or was a rank, of a member that was started by itself."""
    return msgspec.json.decode(store.get(f"process/{rank}"), type=Process)


@contextmanager
def joined(team: Store, size: int, part: int, device: torch.device) -> Iterator[Shard]:
    """This rank's share of its instance's model; while it lasts, torch's default group is that of the instance.

    team: of its ranks, of which there are `size`, and this is number `part`.
    """
    if size == 1:
        yield WHOLE
        return
    store = PrefixStore("tensor_parallel", team)
    store.set(f"here/{part}", "")
    backend = "nccl" if device.type == "cuda" else "gloo"
    with ended_at_once():
        store.wait([f"here/{other}" for other in range(size)], PATIENCE)
        dist.init_process_group(backend, store=store, rank=part, world_size=size, timeout=_IDLE)
    with default_group() as shard:
        yield shard
