"""GlobalScheduler: names the instances for each request and streams the answer back (section 6). Sans-IO.

    Submit -> policy -> Dispatch to an instance -> Tokens, ordered by index, repeats dropped -> client
    Cancel -> Abort to that instance; Finished from it ends the request -> client
    HandoffFailed -> Redirect to another decode instance, or the request again as its next attempt, or its failure

It is given the time and messages, and leaves (destination, message) pairs in an outbox. It also keeps each request's
timeline, since every event of a request passes here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from memserve.messages import (
    Abort,
    Cancel,
    Dispatch,
    Finished,
    HandoffFailed,
    Message,
    Redirect,
    Submit,
    Tokens,
    unpack_times,
    unpack_tokens,
)
from memserve.request import FinishReason
from memserve.sched.group import Group
from memserve.sched.routing import ClusterSnapshot, Policy, RouteRequest
from memserve.timeline import RequestTimeline

CLIENT = "client"
MAX_ATTEMPTS = 3  # of a request whose hand-offs fail


@dataclass
class _Routed:
    """Where an unfinished request was sent: a row of the first group, and of the decode group if there is one."""

    submit: Submit
    timeline: RequestTimeline
    row: int = 0
    decode_row: int | None = None
    tried: set[int] = field(default_factory=set)  # decode rows that refused this attempt


class GlobalScheduler:
    """Routes over `labels`, the instances that take requests. `timelines` holds every request submitted, in order.

    decode: the decode instances that prefill instances hand over to, if they do.  recompute_failed: a request whose
    hand-off failed is served again, up to MAX_ATTEMPTS times; else it fails.
    """

    def __init__(
        self,
        labels: Sequence[str],
        policy: Policy,
        rng: np.random.Generator,
        *,
        decode: Group | None = None,
        recompute_failed: bool = True,
    ) -> None:
        self.timelines: dict[str, RequestTimeline] = {}
        self._group = Group(labels, range(len(labels)), policy)
        self._decode = decode
        self._recompute_failed = recompute_failed
        self._rng = rng
        self._live: dict[str, _Routed] = {}
        self._outbox: list[tuple[str, Message]] = []

    @property
    def num_unfinished(self) -> int:
        return len(self._live)

    def receive(self, message: Message, now_ns: int) -> None:
        """Takes one message from a client or an instance."""
        match message:
            case Submit():
                self._submit(message, now_ns)
            case Cancel():
                self._cancel(message)
            case Tokens():
                self._stream(message)
            case Finished():
                self._finish(message, now_ns)
            case HandoffFailed():
                self._handoff_failed(message, now_ns)
            case _:
                raise TypeError(f"the global scheduler takes no {type(message).__name__}")

    def drain_outbox(self) -> list[tuple[str, Message]]:
        """The (destination label, message) pairs left since the last call."""
        out, self._outbox = self._outbox, []
        return out

    def snapshot(self) -> ClusterSnapshot:
        """What the policy sees now of the instances that take requests."""
        return self._group.snapshot()

    def _submit(self, message: Submit, now_ns: int) -> None:
        if message.request_id in self.timelines:
            raise ValueError(f"request_id={message.request_id!r} was submitted before: expected a new one")
        timeline = RequestTimeline(message.request_id, message.session_id, message.arrival_ns, len(message.tokens) // 4)
        routed = _Routed(message, timeline)
        self._dispatch(routed, now_ns)
        self.timelines[message.request_id] = timeline
        self._live[message.request_id] = routed

    def _dispatch(self, routed: _Routed, now_ns: int) -> None:
        """Names the instances of the request's next attempt and sends it."""
        m, timeline = routed.submit, routed.timeline
        request = RouteRequest(m.request_id, m.session_id, unpack_tokens(m.tokens))
        routed.row, routed.tried, decode = self._group.route(request, self._rng), set(), None
        if self._decode is not None:
            routed.decode_row = self._decode.route(request, self._rng)
            decode = self._decode.incarnations[routed.decode_row]
        timeline.dispatched_ns, timeline.instance = now_ns, self._group.labels[routed.row]
        dispatch = Dispatch(m.request_id, timeline.attempt, m.session_id, m.tokens, m.params, m.arrival_ns, decode)
        self._outbox.append((timeline.instance, dispatch))

    def _cancel(self, message: Cancel) -> None:
        routed = self._live.get(message.request_id)
        if routed is not None:  # else it ended while the client was asking
            self._abort(routed)

    def _abort(self, routed: _Routed) -> None:
        """Stops the present attempt wherever it may be."""
        abort = Abort(routed.submit.request_id, routed.timeline.attempt)
        self._outbox.append((self._group.labels[routed.row], abort))
        if self._decode is not None and routed.decode_row is not None:
            self._outbox.append((self._decode.labels[routed.decode_row], abort))

    def _stream(self, message: Tokens) -> None:
        routed = self._current(message.request_id, message.attempt)
        if routed is None:
            return  # of an attempt that was given up
        timeline = routed.timeline
        assert message.index <= timeline.num_output, "an instance skipped tokens"
        num_known = timeline.num_output - message.index  # an earlier attempt came so far
        token_ids, times_ns = unpack_tokens(message.token_ids)[num_known:], unpack_times(message.times_ns)[num_known:]
        if len(token_ids):
            timeline.add_tokens(token_ids, times_ns)
            timeline.logprobs.extend(message.logprobs or ())
            self._outbox.append((CLIENT, message))

    def _finish(self, message: Finished, now_ns: int) -> None:
        routed = self._current(message.request_id, message.attempt)
        if routed is not None:
            self._end(routed, message, now_ns)

    def _end(self, routed: _Routed, message: Finished, now_ns: int) -> None:
        del self._live[message.request_id]
        timeline = routed.timeline
        timeline.finished_ns, timeline.reason, timeline.detail = now_ns, FinishReason(message.reason), message.detail
        timeline.stats = message.stats
        self._give_up_rows(routed)
        self._outbox.append((CLIENT, message))

    def _give_up_rows(self, routed: _Routed) -> None:
        self._group.forget(routed.row, routed.timeline.num_prompt)
        if self._decode is not None and routed.decode_row is not None:
            self._decode.forget(routed.decode_row, routed.timeline.num_prompt)

    def _current(self, request_id: str, attempt: int) -> _Routed | None:
        routed = self._live.get(request_id)
        return routed if routed is not None and routed.timeline.attempt == attempt else None

    def _handoff_failed(self, message: HandoffFailed, now_ns: int) -> None:
        """Another decode instance, or another attempt, or the end."""
        routed, decode = self._current(message.request_id, message.attempt), self._decode
        if routed is None:
            return
        assert decode is not None and routed.decode_row is not None, "only prefill instances hand over"
        routed.tried.add(routed.decode_row)
        if message.refused and len(routed.tried) < len(decode.labels):
            m = routed.submit
            request = RouteRequest(m.request_id, m.session_id, unpack_tokens(m.tokens))
            decode.forget(routed.decode_row, routed.timeline.num_prompt)
            routed.decode_row = decode.route(request, self._rng, routed.tried)
            redirect = Redirect(m.request_id, message.attempt, decode.incarnations[routed.decode_row])
            self._outbox.append((self._group.labels[routed.row], redirect))
            return
        self._abort(routed)
        if self._recompute_failed and not message.refused and routed.timeline.attempt + 1 < MAX_ATTEMPTS:
            self._give_up_rows(routed)
            routed.timeline.attempt += 1
            self._dispatch(routed, now_ns)
        else:
            end = Finished(message.request_id, message.attempt, FinishReason.TRANSFER_FAILED, message.reason, None)
            self._end(routed, end, now_ns)
