"""GlobalScheduler: names the instances for each request and streams the answer back (section 6). Sans-IO.

    Submit -> policy -> Dispatch to an instance -> Tokens, ordered by index, repeats dropped -> client
    Cancel -> Abort to that instance; Finished from it ends the request -> client
    HandoffFailed -> Redirect to another decode instance, or the request again as its next attempt, or its failure
    instance gone -> what was there is served again elsewhere, or fails by name

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
MAX_ATTEMPTS = 3  # of a request whose hand-offs fail or whose instances are lost


@dataclass
class _Routed:
    """Where an unfinished request was sent: a row of the first group, and of the decode group if there is one."""

    submit: Submit
    timeline: RequestTimeline
    row: int = 0
    decode_row: int | None = None
    num_generated: int = 0  # tokens of this attempt so far
    tried: set[int] = field(default_factory=set)  # decode rows that refused this attempt


class GlobalScheduler:
    """Routes over `labels`, the instances that take requests. `timelines` holds every request submitted, in order.

    decode: the decode instances that prefill instances hand over to, if they do.  recompute_failed: a request whose
    hand-off failed, or whose instance is gone, is served again, up to MAX_ATTEMPTS times; else it fails.
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
        self.timelines[message.request_id] = timeline
        self._live[message.request_id] = routed
        if (missing := self._missing_role()) is None:
            self._dispatch(routed, now_ns)
        else:
            self._end(routed, _failed(routed, FinishReason.INSTANCE_LOST, f"no {missing} is left"), now_ns)

    def instance_back(self, label: str) -> None:
        """An instance that was silent takes requests again. What it had is of attempts given up."""
        self._group.restore(label)
        if self._decode is not None:
            self._decode.restore(label)

    def instance_gone(self, label: str, now_ns: int) -> None:
        """An instance is gone, or silent for too long. What it says from now on is of attempts given up."""
        row, decode_row = self._group.remove(label), None if self._decode is None else self._decode.remove(label)
        for routed in list(self._live.values()):
            is_decoding = self._decode is not None and routed.num_generated > 1  # it has left its first instance
            lost = routed.row == row and not is_decoding
            lost |= decode_row is not None and routed.decode_row == decode_row
            if lost:
                self._abort(routed)
                self._try_again(routed, FinishReason.INSTANCE_LOST, f"instance {label} is gone", now_ns)

    def _missing_role(self) -> str | None:
        """The kind of instance of which none is left, if one that is needed is."""
        if not self._group.rows():
            return "instance that takes requests"
        return "decode instance" if self._decode is not None and not self._decode.rows() else None

    def _dispatch(self, routed: _Routed, now_ns: int) -> None:
        """Names the instances of the request's next attempt and sends it."""
        m, timeline = routed.submit, routed.timeline
        request = RouteRequest(m.request_id, m.session_id, unpack_tokens(m.tokens))
        routed.row, routed.tried, decode = self._group.route(request, self._rng), set(), None
        routed.num_generated = 0
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
        routed.num_generated = message.index + len(message.token_ids) // 4
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
        if routed.timeline.dispatched_ns is None:
            return
        self._group.forget(routed.row, routed.timeline.num_prompt)
        if self._decode is not None and routed.decode_row is not None:
            self._decode.forget(routed.decode_row, routed.timeline.num_prompt)

    def _current(self, request_id: str, attempt: int) -> _Routed | None:
        routed = self._live.get(request_id)
        return routed if routed is not None and routed.timeline.attempt == attempt else None

    def _handoff_failed(self, message: HandoffFailed, now_ns: int) -> None:
        """Another decode instance, or another attempt, or the end."""
        routed, decode = self._current(message.request_id, message.attempt), self._decode
        if routed is None:  # it was served all the same, or given up: nobody waits for it there
            self._outbox.append((message.instance, Abort(message.request_id, message.attempt)))
            return
        assert decode is not None and routed.decode_row is not None, "only prefill instances hand over"
        routed.tried.add(routed.decode_row)
        if message.refused and decode.rows(routed.tried):
            m = routed.submit
            request = RouteRequest(m.request_id, m.session_id, unpack_tokens(m.tokens))
            decode.forget(routed.decode_row, routed.timeline.num_prompt)
            routed.decode_row = decode.route(request, self._rng, routed.tried)
            redirect = Redirect(m.request_id, message.attempt, decode.incarnations[routed.decode_row])
            self._outbox.append((self._group.labels[routed.row], redirect))
            return
        self._abort(routed)
        if message.refused:
            self._end(routed, _failed(routed, FinishReason.TRANSFER_FAILED, message.reason), now_ns)
        else:
            self._try_again(routed, FinishReason.TRANSFER_FAILED, message.reason, now_ns)

    def _try_again(self, routed: _Routed, reason: FinishReason, detail: str, now_ns: int) -> None:
        """The next attempt, or the end for want of one."""
        more = self._recompute_failed and routed.timeline.attempt + 1 < MAX_ATTEMPTS
        if not more or self._missing_role() is not None:
            self._end(routed, _failed(routed, reason, detail), now_ns)
            return
        self._give_up_rows(routed)
        routed.timeline.attempt += 1
        self._dispatch(routed, now_ns)


def _failed(routed: _Routed, reason: FinishReason, detail: str) -> Finished:
    return Finished(routed.submit.request_id, routed.timeline.attempt, reason, detail, None)
