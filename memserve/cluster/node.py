"""InstanceLoop: the life of one instance that is a process of its own. Moves messages and time; what it drives decides.

    attach, warm up, prepare the first moves, learn rank 0's clock -> Ready .. Start
    receive -> schedule -> forward, layer by layer -> commit -> send        again and again, until
    Stop -> finish transfers -> Stopped .. Leave, or Retire -> nothing left to do -> Left

The loop never waits for a peer: transfers go on beside it, what they need of it is read between two layers, and an idle
instance sleeps until something comes.
"""

import logging
from collections.abc import Sequence
from typing import TypeVar

import msgspec
import numpy as np

from memserve.clock import monotonic_ns, to_ns
from memserve.cluster.mailbox import AnyMessage, Mailbox
from memserve.cluster.node_messages import (
    BEAT_S,
    Alive,
    Bequeath,
    Between,
    Changed,
    Gone,
    Held,
    Joined,
    Leave,
    Left,
    LeftEarly,
    Ping,
    Pong,
    Process,
    Ready,
    Retire,
    Start,
    Stop,
    Stopped,
    WantSnapshot,
)
from memserve.cluster.roster import CONTROLLER, Roster
from memserve.cluster.summary import summarize
from memserve.handoff import Handoffs
from memserve.instance import Instance
from memserve.messages import Abort, Dispatch, Redirect
from memserve.metrics.activity import Activity
from memserve.metrics.occupancy import Occupancy
from memserve.request import LayerRun, ScheduledBatch, StepOutput
from memserve.transfer.transport import Transport

NUM_PINGS = 5
PREPARE_S = 2.0  # most that is waited for others to be attached: who attaches still is not awaited without end
_IDLE_MS, _TRANSFERRING_MS, _PING_MS = 50, 1, 10_000
_log = logging.getLogger("memserve")
Kind = TypeVar("Kind", Start, Pong)


class InstanceLoop:
    """An instance, its number in the cluster, and its mail. roster: of the cluster, of which this keeps what it hears.

    transport: of its transfers, if its mode has any.  stop_s: most time for transfers that are under way when the run
    ends.  early: what has come for it before.
    """

    def __init__(
        self,
        incarnation: int,
        instance: Instance,
        mailbox: Mailbox,
        roster: Roster,
        transport: Transport | None,
        *,
        stop_s: float,
        num_threads: int,
        early: Sequence[tuple[int, AnyMessage]] = (),
    ) -> None:
        self._incarnation, self._roster = incarnation, roster
        self._instance, self._mailbox, self._transport = instance, mailbox, transport
        self._stop_ns, self._num_threads = to_ns(stop_s), num_threads
        self._occupancy = Occupancy(instance.label, instance.pool)
        self._activity = Activity()
        self._busy_ns = 0
        self._offset_ns = 0  # what is to be added to this process's clock
        self._stop: Stop | None = None
        self._may_leave = self._is_to_drain = False
        self._early = list(early)  # came before the run had begun here, or within a step

    def run(self, processes: Sequence[Process]) -> bool:
        """Until rank 0 says Leave, or it has drained: then True. processes: of the instance's ranks.

        Raises LeftEarly if rank 0 says so before the run has ended.
        """
        if self._transport is not None:
            self._transport.prepare(self._roster.endpoints_of_others(self._incarnation), PREPARE_S)
        self._learn_the_time()
        self._mailbox.send(CONTROLLER, Ready(list(processes)))
        self._offset_ns -= self._wait_for(Start).epoch_ns
        if self._transport is not None:
            self._transport.offset_ns = self._offset_ns
        _log.info("%s starts", self._instance.label)
        self._mailbox.beat(CONTROLLER, Alive(), BEAT_S)
        while self._stop is None:
            self._step()
            if self._stop is None and self._is_to_drain and self._instance.is_idle:
                self._mailbox.send(CONTROLLER, Left(self._summary(self._now_ns())))
                return True
        self._finish_transfers(self._stop)
        self._mailbox.send(CONTROLLER, Stopped(self._summary(self._stop.end_ns)))
        while not self._may_leave:
            self._step()
        return False

    def _summary(self, end_ns: int) -> bytes:
        """The instance's books, which are checked."""
        self._instance.check()
        return msgspec.msgpack.encode(
            summarize(self._instance, self._busy_ns, self._occupancy, self._activity, end_ns, self._num_threads)
        )

    def _now_ns(self) -> int:
        """On the cluster's clock."""
        return monotonic_ns() + self._offset_ns

    def _learn_the_time(self) -> None:
        """How far this clock is from rank 0's: by the quickest of a few questions, half of its way there and back."""
        best_ns = None
        for _ in range(NUM_PINGS):
            self._mailbox.send(CONTROLLER, Ping(monotonic_ns()))
            pong, now_ns = self._wait_for(Pong), monotonic_ns()
            if best_ns is None or now_ns - pong.sent_ns < best_ns:
                best_ns = now_ns - pong.sent_ns
                self._offset_ns = pong.now_ns - (now_ns + pong.sent_ns) // 2

    def _wait_for(self, kind: type[Kind]) -> Kind:
        """The next message of a kind, before the run. What comes with it is read when the run has begun."""
        while True:
            received = self._mailbox.receive(_PING_MS)
            for number, (sender, message) in enumerate(received):
                if isinstance(message, kind):
                    self._early += received[number + 1 :]
                    return message
                if isinstance(message, Leave):
                    raise LeftEarly("rank 0 ended before the run began")
                self._early.append((sender, message))

    def _step(self) -> None:
        """One turn of the loop; waits a moment if there was nothing to do."""
        self._receive(0)
        batch = self._instance.schedule(self._now_ns())
        self._send()
        if batch is not None:
            self._compute(batch)
            return
        self._instance.poll(self._now_ns())
        self._send()
        self._note()
        if not self._instance.has_inbox:
            soon = self._is_transferring or self._instance.pool.num_swapping
            self._receive(_TRANSFERRING_MS if soon else _IDLE_MS)

    def _compute(self, batch: ScheduledBatch) -> None:
        began_ns = self._now_ns()
        output = self._forward(batch)
        now_ns = self._now_ns()
        self._activity.step(batch, began_ns, now_ns)
        self._instance.commit(batch, output, np.array([now_ns], dtype=np.int64))
        self._busy_ns += now_ns - began_ns
        self._note()
        self._send()

    def _note(self) -> None:
        """What was sent, and who holds the pool's blocks."""
        if self._instance.handoffs is not None:
            self._activity.sent(self._instance.handoffs.transfers.drain_sent())
        self._occupancy.offer(self._now_ns())

    def _forward(self, batch: ScheduledBatch) -> StepOutput:
        """By layer, each layer's KV leaves while the next one is computed. Between two layers peers are served."""
        handoffs = self._instance.handoffs
        if handoffs is None:
            return self._instance.forward(batch)
        layers = LayerRun(self._instance.forward_by_layer(batch))
        for layer in layers:
            handoffs.layers_written(batch, {layer: self._now_ns()})
            self._serve_peers(handoffs)
        return layers.output

    def _serve_peers(self, handoffs: Handoffs) -> None:
        """What concerns transfers under way need not wait for the step's end; all else that has come is kept for it."""
        for sender, message in self._mailbox.receive(0):
            if not (isinstance(message, Between) and self._serve(message, sender)):
                self._early.append((sender, message))
        handoffs.transfers.hear_moves(self._now_ns())
        self._send_to_peers()

    def _serve(self, letter: Between, rank: int) -> bool:
        if letter.target != self._incarnation:
            return False
        self._roster.assign(letter.sender, rank)
        return self._instance.serve(letter.sender, letter.message, self._now_ns())

    @property
    def _is_transferring(self) -> bool:
        return self._instance.handoffs is not None and self._instance.handoffs.transfers.num_open > 0

    def _receive(self, timeout_ms: int) -> None:
        early, self._early = self._early, []
        for sender, message in early + self._mailbox.receive(0 if early else timeout_ms):
            self._take(sender, message)

    def _take(self, sender: int, message: AnyMessage) -> None:
        match message:
            case Dispatch() | Abort() | Redirect():
                self._instance.receive(message)
            case Between():
                if message.target == self._incarnation:
                    self._roster.assign(message.sender, sender)
                    self._instance.receive_from_peer(message.sender, message.message, self._now_ns())
            case Joined():
                self._roster.assign(message.instance, message.rank)
                self._mailbox.reconnect(message.rank)
            case Gone():
                self._forget(message.instance)
            case Bequeath():
                assert self._instance.handoffs is not None, "whoever leaves something transfers KV"
                self._instance.handoffs.bequest.begin(message.heir, message.share, self._now_ns())
            case Retire():
                self._is_to_drain = True
            case WantSnapshot():
                self._mailbox.send(CONTROLLER, Held(self._instance.pool.follow()))
            case Stop():
                self._stop = message
            case Leave():
                self._may_leave = True
                if self._stop is None:
                    raise LeftEarly("rank 0 ended before the run did")
            case _:
                raise TypeError(f"an instance takes no {type(message).__name__} while it runs")

    def _forget(self, instance: int) -> None:
        _log.warning("instance %d is gone", instance)
        if self._transport is not None:
            for endpoint in self._roster.endpoints(instance):
                self._transport.detach(endpoint)
        self._instance.peer_gone(instance, self._now_ns())

    def _send(self) -> None:
        for message in self._instance.drain_outbox():
            self._mailbox.send(CONTROLLER, message)
        if (room := self._instance.drain_room()) is not None:
            self._mailbox.send(CONTROLLER, room)
        if events := self._instance.pool.drain_events():
            self._mailbox.send(CONTROLLER, Changed(events))
        self._send_to_peers()

    def _send_to_peers(self) -> None:
        for peer, message in self._instance.drain_peer_outbox():
            self._mailbox.send(self._roster.leader(peer), Between(self._incarnation, peer, message))

    def _finish_transfers(self, stop: Stop) -> None:
        """What is on its way back arrives, or fails by its deadline."""
        until_ns = self._now_ns() + self._stop_ns
        while self._is_transferring and not self._may_leave and self._now_ns() < until_ns:
            self._step()
