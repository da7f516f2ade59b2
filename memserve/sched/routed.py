"""Routed: a request that was sent out, and the order of what comes back of it."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from memserve.messages import Finished, Submit, Tokens, unpack_tokens
from memserve.request import FinishReason
from memserve.sched.group import Assignment
from memserve.sched.routing import RouteRequest
from memserve.timeline import RequestTimeline


@dataclass
class Routed:
    """Where an unfinished request was sent: its place in the first group, and in the decode group if there is one.

    num_generated: tokens of this attempt so far.  tried: decode rows that refused this attempt.  is_cancelled: the
    client wants no more of it.
    """

    submit: Submit
    timeline: RequestTimeline
    place: Assignment | None = None
    decode_place: Assignment | None = None
    num_generated: int = 0
    tried: set[int] = field(default_factory=set)
    is_cancelled: bool = False
    _early: list[Tokens | Finished] = field(default_factory=list)

    def failed(self, reason: FinishReason, detail: str) -> Finished:
        """What the client is told of its end."""
        return Finished(self.submit.request_id, self.timeline.attempt, reason, detail, None)

    @property
    def request(self) -> RouteRequest:
        """What a policy may know of it."""
        return RouteRequest(self.submit.request_id, self.submit.session_id, unpack_tokens(self.submit.tokens))

    def starts(self, place: Assignment, decode_place: Assignment | None = None) -> None:
        """An attempt begins, at an instance of each group."""
        self.place, self.decode_place = place, decode_place
        self.num_generated, self.tried, self._early = 0, set(), []

    def in_order(self, message: Tokens | Finished) -> Iterator[Tokens | Finished]:
        """What of the present attempt can be taken, with this message: each before the next one is asked for.

        Between two processes messages keep their order, but what a decode instance says may overtake the first token,
        which comes from the prefill instance. It waits for that.
        """
        self._early.append(message)
        while (ready := next((m for m in self._early if not self._is_early(m)), None)) is not None:
            self._early.remove(ready)
            yield ready

    def _is_early(self, message: Tokens | Finished) -> bool:
        if isinstance(message, Tokens):
            return message.index > self.num_generated
        num_sent = 0 if message.stats is None else message.stats.num_generated
        return FinishReason(message.reason).succeeded and num_sent > self.num_generated
