"""What the processes of a distributed cluster tell each other beside messages.py: who is there, the time, the end."""

import msgspec

from memserve.kvcache.events import IndexEvent, IndexSnapshot


class Process(msgspec.Struct, frozen=True):
    """By which others see whether a process is still there. host: see `shared_memory.host_id`."""

    host: str
    pid: int


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
    """There is proof that the process of this instance has ended."""

    instance: int


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
    num_layers: int


class MoveArrived(msgspec.Struct, frozen=True, tag=True):
    """It has arrived; times on the follower's own clock."""

    move_id: tuple[int, int, int]
    begun_ns: int
    ended_ns: int


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
    | Stop
    | Stopped
    | Leave
    | Broken
    | LeftAlone
    | PostMove
    | MoveArrived
)
