"""Routed: a request that was sent out, and the order of what comes back of it."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from memserve.clock import to_s
from memserve.decisions import Holding
from memserve.messages import Dispatch, Finished, Submit, Tokens, unpack_times, unpack_tokens
from memserve.request import FinishReason
from memserve.sched.group import Assignment
from memserve.sched.routing import RouteRequest
from memserve.timeline import RequestTimeline


@dataclass
class Routed:
    """Where an unfinished request was sent: its place in the first group, and in the decode group if there is one.

    next_place: where it is to go on, of the group in which it decodes, while it migrates.  is_next_gone: that instance
    is gone.  num_generated: tokens of this attempt so far.  tried: rows of that group not to be asked in this attempt
    any more; declined: those that had no room lately.  has_copies: one of them may have it all the same, and was told
    to drop it.  ends_here: at the instance where it decodes, also if that leaves.  is_cancelled: the client wants no
    more of it.
    """

    submit: Submit
    timeline: RequestTimeline
    place: Assignment | None = None
    decode_place: Assignment | None = None
    next_place: Assignment | None = None
    is_next_gone: bool = False
    num_generated: int = 0
    tried: set[int] = field(default_factory=set)
    declined: set[int] = field(default_factory=set)
    has_copies: bool = False
    ends_here: bool = False
    is_cancelled: bool = False
    _early: list[Tokens | Finished] = field(default_factory=list)

    @classmethod
    def of(cls, submit: Submit) -> "Routed":
        """A request that has come, and was sent nowhere yet."""
        m = submit
        num_prompt = len(m.tokens) // 4
        timeline = RequestTimeline(m.request_id, m.session_id, m.arrival_ns, num_prompt, m.priority, m.class_name)
        return cls(m, timeline)

    def dispatch(self, decode: int | None, held_elsewhere: tuple[Holding, ...]) -> Dispatch:
        """What the instance of its present attempt is told."""
        m = self.submit
        what = (m.request_id, self.timeline.attempt, m.session_id, m.tokens, m.params, m.arrival_ns)
        return Dispatch(*what, decode, held_elsewhere, m.priority)

    def failed(self, reason: FinishReason, detail: str) -> Finished:
        """What the client is told of its end."""
        return Finished(self.submit.request_id, self.timeline.attempt, reason, detail, None)

    @property
    def request(self) -> RouteRequest:
        """What a policy may know of it."""
        m = self.submit
        tokens, arrival_s = unpack_tokens(m.tokens), to_s(m.arrival_ns)
        most = m.params.max_tokens
        return RouteRequest(m.request_id, m.session_id, tokens, arrival_s, most, m.priority, m.class_name)

    def is_of_copy(self, message: Finished) -> bool:
        """Whether what ended was a copy that was told to: nobody has asked for the end of the request."""
        return self.has_copies and message.reason == FinishReason.ABORTED and not self.is_cancelled

    def starts(self, place: Assignment, decode_place: Assignment | None = None) -> None:
        """An attempt begins, at an instance of each group."""
        self.place, self.decode_place = place, decode_place
        self.num_generated, self.tried, self.declined, self._early = 0, set(), set(), []
        self.has_copies = self.ends_here = False

    def enter(self, message: Tokens) -> bool:
        """Enters tokens into the timeline, without those of which others told it before; whether any is new.

        Told before: by an earlier attempt, or by a copy of this one that migrated and went on where it was, too.
        """
        end = message.index + len(message.token_ids) // 4
        self.num_generated = max(self.num_generated, end)  # a copy that is to drop it may be behind
        new = slice(self.timeline.num_output - message.index, None)
        token_ids, times_ns = unpack_tokens(message.token_ids)[new], unpack_times(message.times_ns)[new]
        if len(token_ids):
            self.timeline.add_tokens(token_ids, times_ns)
            self.timeline.logprobs.extend(message.logprobs or ())
        return len(token_ids) > 0

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
