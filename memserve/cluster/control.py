"""Control plane: messages between client, global scheduler and instances in virtual time, and what routing costs.

    client   --latency--> [queue | routing: request_ns each] --latency--> instance
    instance --latency--> [queue | nothing]                  --latency--> client

The global scheduler is one server: a request that comes while another is routed waits, and so do answers behind it. An
answer waits for the requests that came before it alone (at the same nanosecond it goes first), so when it leaves
depends on nothing but the requests' arrivals. That is why a macro-step, whose tokens are all told at its end, gives
each of them the very time that it would have had alone.

A token's time is when the client has it, and so is the end of an answer.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
import numpy as np

from memserve.clock import NS_PER_S, to_s
from memserve.messages import Finished, Message, Submit, Tokens, pack_times, unpack_times
from memserve.metrics.latencies import distribution
from memserve.sched.global_scheduler import CLIENT, GlobalScheduler
from memserve.workload.player import SessionPlayer

CallAt = Callable[[int, Callable[[], None]], None]
Deliver = Callable[[str, Message], None]


@dataclass(frozen=True)
class ControlCosts:
    """latency_ns: one way, between client and global scheduler and between that and an instance.  request_ns: of the
    global scheduler, for each request that a client sends; another attempt to serve it costs nothing more.
    """

    latency_ns: int = 0
    request_ns: int = 0


FREE = ControlCosts()


class RoutingServer:
    """Routes one request at a time, in order of arrival. Requests are told in that order."""

    def __init__(self, request_ns: int) -> None:
        self._request_ns = request_ns
        self._arrivals_ns: list[int] = []
        self._ends_ns: list[int] = []

    def route(self, arrives_ns: int) -> int:
        """A request comes; when it is routed."""
        begins_ns = max(arrives_ns, self._ends_ns[-1]) if self._ends_ns else arrives_ns
        self._arrivals_ns.append(arrives_ns)
        self._ends_ns.append(begins_ns + self._request_ns)
        return self._ends_ns[-1]

    def passes(self, arrives_ns: int) -> int:
        """When an answer that comes then goes on: as soon as all that came before is routed."""
        before = bisect_left(self._arrivals_ns, arrives_ns)
        return max(arrives_ns, self._ends_ns[before - 1]) if before else arrives_ns

    @property
    def busy_ns(self) -> int:
        return self._request_ns * len(self._ends_ns)

    def waits_s(self) -> np.ndarray:
        """float64 [requests]: how long each waited for others to be routed."""
        waits_ns = np.array(self._ends_ns, dtype=np.int64) - self._request_ns - np.array(self._arrivals_ns, np.int64)
        return waits_ns / NS_PER_S


class ControlPlane:
    """Where messages take no time. deliver: takes what is for an instance, by its label."""

    def __init__(self, scheduler: GlobalScheduler, client: SessionPlayer, deliver: Deliver) -> None:
        self._scheduler, self._client, self._deliver = scheduler, client, deliver

    def to_scheduler(self, message: Message, now_ns: int) -> None:
        """Somebody sends the global scheduler a message now."""
        self._receive(message, now_ns)

    def from_scheduler(self, now_ns: int) -> None:
        """Sends what the global scheduler has left in its outbox."""
        for destination, message in self._scheduler.drain_outbox():
            self._send(destination, message, now_ns)

    def notice(self, heed: Callable[[int], None], now_ns: int) -> None:
        """The global scheduler notices something about an instance, after all that this one has said. heed: is given
        the time.
        """
        heed(now_ns)
        self.from_scheduler(now_ns)

    def figures(self) -> dict[str, Any] | None:
        """For how long the global scheduler was routing, and how long requests waited for that; None: all is free."""
        return None

    def _send(self, destination: str, message: Message, now_ns: int) -> None:
        self._hand_over(destination, message, now_ns)

    def _receive(self, message: Message, now_ns: int) -> None:
        self._scheduler.receive(message, now_ns)
        self.from_scheduler(now_ns)

    def _hand_over(self, destination: str, message: Message, now_ns: int) -> None:
        """A message has come where it was to."""
        if destination != CLIENT:
            self._deliver(destination, message)
            return
        assert isinstance(message, Tokens | Finished)
        if isinstance(message, Finished):
            self._scheduler.timelines[message.request_id].finished_ns = now_ns
        self._client.receive(message, now_ns)


class SlowControlPlane(ControlPlane):
    """Where messages and routing take time. call_at: calls back at a moment of virtual time."""

    def __init__(
        self, scheduler: GlobalScheduler, client: SessionPlayer, deliver: Deliver, costs: ControlCosts, call_at: CallAt
    ) -> None:
        super().__init__(scheduler, client, deliver)
        self._latency_ns, self._server, self._call_at = costs.latency_ns, RoutingServer(costs.request_ns), call_at

    def to_scheduler(self, message: Message, now_ns: int) -> None:
        arrives_ns = now_ns + self._latency_ns
        if isinstance(message, Submit):
            due_ns = self._server.route(arrives_ns)
        elif isinstance(message, Tokens):
            message, due_ns = self._timed(message)
        else:
            due_ns = self._server.passes(arrives_ns)
        self._at(due_ns, now_ns, partial(self._receive, message))

    def notice(self, heed: Callable[[int], None], now_ns: int) -> None:
        self._at(self._server.passes(now_ns + self._latency_ns), now_ns, partial(super().notice, heed))

    def figures(self) -> dict[str, Any] | None:
        return {"busy_s": to_s(self._server.busy_ns), "wait_s": distribution(self._server.waits_s())}

    def _timed(self, message: Tokens) -> tuple[Tokens, int]:
        """Tokens with the times at which the client has each, and when the global scheduler passes on the last."""
        passes_ns = [self._server.passes(int(left_ns) + self._latency_ns) for left_ns in unpack_times(message.times_ns)]
        times_ns = pack_times(np.array(passes_ns, dtype=np.int64) + self._latency_ns)
        return msgspec.structs.replace(message, times_ns=times_ns), passes_ns[-1]

    def _send(self, destination: str, message: Message, now_ns: int) -> None:
        self._at(now_ns + self._latency_ns, now_ns, partial(self._hand_over, destination, message))

    def _at(self, due_ns: int, now_ns: int, act: Callable[[int], None]) -> None:
        """Acts when it is due, at once if that is now: a macro-step that was cut short tells of tokens of before."""
        if due_ns <= now_ns:
            act(now_ns)
        else:
            self._call_at(due_ns, partial(act, due_ns))


def control_plane(
    scheduler: GlobalScheduler, client: SessionPlayer, deliver: Deliver, costs: ControlCosts, call_at: CallAt
) -> ControlPlane:
    """What costs say."""
    if costs == FREE:
        return ControlPlane(scheduler, client, deliver)
    return SlowControlPlane(scheduler, client, deliver, costs, call_at)
