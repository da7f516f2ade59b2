"""What the processes of a distributed cluster tell each other beside messages.py: who is there, the time, the end."""

import os

import msgspec

from memserve.kvcache.events import IndexEvent, IndexSnapshot
from memserve.messages import PoolMessage
from memserve.transfer.liveness import started_at
from memserve.transfer.shared_memory import host_id

BEAT_S = 0.5  # between two Alive


class LeftEarly(RuntimeError):
    """Rank 0 ended before the run did: Leave came before Stop."""


class Process(msgspec.Struct, frozen=True):
    """By which others see whether a process is still there. host: see `shared_memory.host_id`.  started: see
    `liveness.started_at`.
    """

    host: str
    pid: int
    started: str


def this_process() -> Process:
    """By which others see whether this process is still there."""
    return Process(host_id(), os.getpid(), started_at(os.getpid()))


class Ready(msgspec.Struct, frozen=True, tag=True):
    """An instance is attached and warmed up. processes: of its ranks, the leader's first."""

    processes: list[Process]


class Ping(msgspec.Struct, frozen=True, tag=True):
    """sent_ns: on the sender's clock."""

    sent_ns: int


class Pong(msgspec.Struct, frozen=True, tag=True):
    """now_ns: on rank 0's clock, when the Ping was read."""

    sent_ns: int
    now_ns: int


class Start(msgspec.Struct, frozen=True, tag=True):
    """epoch_ns: time 0 of the cluster, on rank 0's clock."""

    epoch_ns: int


class Alive(msgspec.Struct, frozen=True, tag=True):
    """An instance's process gets its turn; sent now and then, whatever it computes."""


class Changed(msgspec.Struct, frozen=True, tag=True):
    """What entered and left an instance's index since its last message."""

    events: list[IndexEvent]


class WantSnapshot(msgspec.Struct, frozen=True, tag=True):
    """Rank 0 has missed a change of this instance's index."""


class Held(msgspec.Struct, frozen=True, tag=True):
    """All that an instance's index holds."""

    snapshot: IndexSnapshot


class Gone(msgspec.Struct, frozen=True, tag=True):
    """This instance has left, or there is proof that its process has ended."""

    instance: int


class Idle(msgspec.Struct, frozen=True, tag=True):
    """A rank is no instance, and waits to become one, or for the end of this run (`run`: its number)."""

    process: Process
    run: int


class Restarted(msgspec.Struct, frozen=True, tag=True):
    """A process is this rank in the place of one that is gone, and asks which run it has come into."""

    process: Process


class Resume(msgspec.Struct, frozen=True, tag=True):
    """The run that a process has come into: it is to be `Idle` there."""

    run: int


class Become(msgspec.Struct, frozen=True, tag=True):
    """A waiting rank is to be this instance.  leaders: instances that are there, and the rank of each."""

    instance: int
    label: str
    role: str
    leaders: list[tuple[int, int]]


class Joined(msgspec.Struct, frozen=True, tag=True):
    """A rank is an instance from now on."""

    instance: int
    rank: int


class Bequeath(msgspec.Struct, frozen=True, tag=True):
    """What is cached is to go to `heir`, an instance: in all at most `share` of as many blocks as a pool has in HBM."""

    heir: int
    share: float


class Retire(msgspec.Struct, frozen=True, tag=True):
    """No request is on its way to this instance any more: it is to leave as soon as it has nothing left to do."""


class Left(msgspec.Struct, frozen=True, tag=True):
    """An instance has left.  summary: msgpack of a `Summary`."""

    summary: bytes


class Between(msgspec.Struct, frozen=True, tag=True):
    """A message of one pool for another.  sender, target: instances; a rank may have become another one meanwhile."""

    sender: int
    target: int
    message: PoolMessage


class Stop(msgspec.Struct, frozen=True, tag=True):
    """Every request has ended: finish your transfers and say how it was. The run ended end_ns after its epoch."""

    end_ns: int


class Stopped(msgspec.Struct, frozen=True, tag=True):
    """summary: msgpack of a `Summary`."""

    summary: bytes


class Leave(msgspec.Struct, frozen=True, tag=True):
    """Everybody has stopped, or something failed: end."""


class Broken(msgspec.Struct, frozen=True, tag=True):
    """A process ends by an error."""

    detail: str


class LeftAlone(msgspec.Struct, frozen=True, tag=True):
    """A rank ends because another of its instance has gone. The instance is no more; the others may go on."""

    detail: str


class Prepare(msgspec.Struct, frozen=True, tag=True):
    """A follower is to do beforehand what its first moves to these would take: `Transport.prepare`."""

    endpoints: list[int]
    limit_s: float


class PostMove(msgspec.Struct, frozen=True, tag=True):
    """A move that a follower is to post: `Move`, with its int64 arrays as bytes.

    num_layers: how many layers the follower must have written before, counted over all batches.
    """

    move_id: tuple[int, int, int]
    source: tuple[int, int]
    target: tuple[int, int]
    row_bytes: int
    source_rows: bytes
    target_rows: bytes
    call_starts: bytes
    packed: bool
    num_alike: int
    source_step: int
    target_step: int
    num_layers: int


class MoveArrived(msgspec.Struct, frozen=True, tag=True):
    """It has arrived; times on the own clock of the follower's host, which is named as `host_id` does."""

    move_id: tuple[int, int, int]
    begun_ns: int
    ended_ns: int
    host: str


NodeMessage = (
    Ready
    | Alive
    | Changed
    | WantSnapshot
    | Held
    | Ping
    | Pong
    | Start
    | Gone
    | Idle
    | Restarted
    | Resume
    | Become
    | Joined
    | Bequeath
    | Retire
    | Left
    | Between
    | Stop
    | Stopped
    | Leave
    | Broken
    | LeftAlone
    | Prepare
    | PostMove
    | MoveArrived
)
