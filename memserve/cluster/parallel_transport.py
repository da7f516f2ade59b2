"""ParallelTransport: of an instance of several ranks: each sends from its own memory, the leader says what.

    leader (ParallelTransport)                          follower (TransferHand, in a thread beside `follow`)
    prepare                       --Prepare-->          prepare, before anything is posted
    post, of a follower's memory  --PostMove-->         once its own layers are written: post to its transport
    poll                          <--MoveArrived--      poll
    detach                        --Detach (worker)-->  detach; then all wait for each other

The rows go straight from rank to rank. A follower may be behind the leader in a batch, so every PostMove says how many
layers must be written first. Knows endpoints, and of KV only that a batch writes it layer by layer.
"""

import threading
from collections import deque
from collections.abc import Sequence

import torch

from memserve.clock import monotonic_ns
from memserve.cluster.mailbox import Mailbox
from memserve.cluster.node_messages import Broken, MoveArrived, PostMove, Prepare
from memserve.cluster.worker import Detach, Followers, Hand
from memserve.kvcache.head_parts import rank_of_endpoint
from memserve.messages import pack_times, unpack_times
from memserve.model.parallel import LEADER
from memserve.transfer.shared_memory import host_id
from memserve.transfer.transport import Arrived, Move, MoveId, Transport

_BUSY_MS, _IDLE_MS = 1, 50


class FollowerFailed(RuntimeError):
    """The transfers of another rank of this instance ended by an error."""


class ParallelTransport(Transport):
    """The leader's. own: of its own memory.  team: its mailbox among the instance's ranks."""

    def __init__(self, own: Transport, team: Mailbox, followers: Followers) -> None:
        self._own, self._team, self._followers = own, team, followers
        self._host = host_id()

    def attach(self, endpoint: int, memories: Sequence[torch.Tensor | None]) -> None:
        """The leader's memories; followers attach theirs themselves."""
        self._own.attach(endpoint, memories)

    def prepare(self, endpoints: Sequence[int], limit_s: float) -> None:
        """On every rank; followers do it meanwhile, before what they are to post."""
        for rank in range(LEADER + 1, self._followers.num_ranks):
            self._team.send(rank, Prepare(list(endpoints), limit_s))
        self._own.prepare(endpoints, limit_s)

    def knows(self, endpoint: int) -> bool:
        return self._own.knows(endpoint)

    def detach(self, endpoint: int) -> None:
        """On every rank. Raises GroupBroken when one has gone."""
        with self._followers.told(Detach(endpoint)):
            self._own.detach(endpoint)
            self._followers.meet()

    def post(self, move_id: MoveId, move: Move, ready_ns: int) -> None:
        rank = rank_of_endpoint(move.source[0])
        if rank == LEADER:
            self._own.post(move_id, move, ready_ns)
        else:
            self._team.send(rank, _told(move_id, move, self._followers.num_layers))

    def poll(self, endpoint: int, now_ns: int) -> list[Arrived]:
        """What has arrived from any rank. Raises FollowerFailed with a follower's error."""
        self._own.offset_ns = self.offset_ns
        arrived = self._own.poll(endpoint, now_ns)
        for rank, message in self._team.receive(0):
            match message:
                case MoveArrived():
                    arrived.append(self._heard(message, now_ns))
                case Broken(detail):
                    raise FollowerFailed(f"the transfers of rank {rank} of this instance: {detail}")
                case _:
                    raise TypeError(f"a leader takes no {type(message).__name__} of its followers")
        return arrived

    def _heard(self, move: MoveArrived, now_ns: int) -> Arrived:
        """On this rank's clock; of a follower on another host, whose clock is its own, as if it had ended just now."""
        if move.host == self._host:
            return Arrived(move.move_id, move.begun_ns, move.ended_ns).later_by(self.offset_ns)
        return Arrived(move.move_id, now_ns - (move.ended_ns - move.begun_ns), now_ns)

    def next_time_ns(self) -> int | None:
        return self._own.next_time_ns()

    def close(self) -> None:
        """The leader's own; followers close theirs themselves."""
        self._own.close()


class TransferHand(Hand):
    """A follower's. transport: attached as `endpoint`.  team: as above; from `start` on it is this thread's alone."""

    def __init__(self, transport: Transport, endpoint: int, team: Mailbox) -> None:
        self._transport, self._endpoint, self._team = transport, endpoint, team
        self._host = host_id()
        self._num_layers = 0  # counted by the thread that computes
        self._waiting: deque[PostMove] = deque()
        self._num_under_way = 0
        self._lock = threading.Lock()  # of the transport
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="transfer hand", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def layer_written(self) -> None:
        self._num_layers += 1

    def detach(self, endpoint: int) -> None:
        with self._lock:
            self._transport.detach(endpoint)

    def close(self) -> None:
        """Ends the thread, then the transport."""
        self._ending.set()
        self._thread.join()
        self._transport.close()

    def _run(self) -> None:
        try:
            while not self._ending.is_set():
                self._turn()
        except Exception as error:  # whoever polls at the leader is told
            self._team.send(LEADER, Broken(f"{type(error).__name__}: {error}"))

    def _turn(self) -> None:
        busy = bool(self._waiting) or self._num_under_way > 0
        for _, message in self._team.receive(_BUSY_MS if busy else _IDLE_MS):
            if isinstance(message, Prepare):
                self._transport.prepare(message.endpoints, message.limit_s)
                continue
            assert isinstance(message, PostMove), f"a follower takes no {type(message).__name__}"
            self._waiting.append(message)
        with self._lock:
            while self._waiting and self._waiting[0].num_layers <= self._num_layers:
                told = self._waiting.popleft()
                self._transport.post(told.move_id, _move(told), monotonic_ns())
                self._num_under_way += 1
            arrived = self._transport.poll(self._endpoint, monotonic_ns())
        self._num_under_way -= len(arrived)
        for move in arrived:
            self._team.send(LEADER, MoveArrived(move.move_id, move.begun_ns, move.ended_ns, self._host))


def _told(move_id: MoveId, move: Move, num_layers: int) -> PostMove:
    source_rows, target_rows, starts = map(pack_times, (move.source_rows, move.target_rows, move.call_starts))
    return PostMove(
        move_id, move.source, move.target, move.row_bytes, source_rows, target_rows, starts, move.packed,
        move.num_alike, move.source_step, move.target_step, num_layers,
    )  # fmt: skip


def _move(told: PostMove) -> Move:
    source_rows, target_rows, starts = map(unpack_times, (told.source_rows, told.target_rows, told.call_starts))
    return Move(
        told.source, told.target, told.row_bytes, source_rows, target_rows, starts, told.packed,
        told.num_alike, told.source_step, told.target_step,
    )  # fmt: skip
