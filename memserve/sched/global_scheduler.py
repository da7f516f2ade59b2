"""GlobalScheduler: names an instance for each request and streams the answer back (section 6). Sans-IO.

    Submit -> policy -> Dispatch to an instance -> Tokens, ordered by index, repeats dropped -> client
    Cancel -> Abort to that instance; Finished from it ends the request -> client

It is given the time and messages, and leaves (destination, message) pairs in an outbox. It also keeps each request's
timeline, since every event of a request passes here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from memserve.messages import Abort, Cancel, Dispatch, Finished, Message, Submit, Tokens, unpack_times, unpack_tokens
from memserve.request import FinishReason
from memserve.sched.routing import ClusterSnapshot, Policy, RouteRequest
from memserve.timeline import RequestTimeline

CLIENT = "client"


@dataclass(frozen=True)
class _Routed:
    """Where an unfinished request was sent."""

    row: int
    timeline: RequestTimeline


class GlobalScheduler:
    """Routes over `labels`, the instances of the cluster. `timelines` holds every request ever submitted, in order."""

    def __init__(self, labels: Sequence[str], policy: Policy, rng: np.random.Generator) -> None:
        self.timelines: dict[str, RequestTimeline] = {}
        self._labels = list(labels)
        self._policy = policy
        self._rng = rng
        self._num_requests = np.zeros(len(labels), dtype=np.int64)
        self._num_tokens = np.zeros(len(labels), dtype=np.int64)
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
            case _:
                raise TypeError(f"the global scheduler takes no {type(message).__name__}")

    def drain_outbox(self) -> list[tuple[str, Message]]:
        """The (destination label, message) pairs left since the last call."""
        out, self._outbox = self._outbox, []
        return out

    def snapshot(self) -> ClusterSnapshot:
        """What policies see now."""
        return ClusterSnapshot(self._labels, self._num_requests, self._num_tokens, len(self.timelines))

    def _submit(self, message: Submit, now_ns: int) -> None:
        if message.request_id in self.timelines:
            raise ValueError(f"request_id={message.request_id!r} was submitted before: expected a new one")
        tokens = unpack_tokens(message.tokens)
        row = self._policy.choose(
            RouteRequest(message.request_id, message.session_id, tokens), self.snapshot(), self._rng
        )
        if not 0 <= row < len(self._labels):
            raise ValueError(f"{type(self._policy).__name__} chose row {row}: expected 0 to {len(self._labels) - 1}")
        timeline = RequestTimeline(message.request_id, message.session_id, message.arrival_ns, len(tokens))
        timeline.dispatched_ns, timeline.instance = now_ns, self._labels[row]
        self.timelines[message.request_id] = timeline
        self._live[message.request_id] = _Routed(row, timeline)
        self._num_requests[row] += 1
        self._num_tokens[row] += len(tokens)
        dispatch = Dispatch(
            message.request_id, 0, message.session_id, message.tokens, message.params, message.arrival_ns
        )
        self._outbox.append((self._labels[row], dispatch))

    def _cancel(self, message: Cancel) -> None:
        routed = self._live.get(message.request_id)
        if routed is not None:  # else it ended while the client was asking
            self._outbox.append((self._labels[routed.row], Abort(message.request_id, routed.timeline.attempt)))

    def _stream(self, message: Tokens) -> None:
        routed = self._live.get(message.request_id)
        if routed is None or message.attempt != routed.timeline.attempt:
            return  # of an attempt that was given up
        timeline = routed.timeline
        assert message.index == timeline.num_output, "an instance skipped or repeated tokens"
        timeline.add_tokens(unpack_tokens(message.token_ids), unpack_times(message.times_ns))
        timeline.logprobs.extend(message.logprobs or ())
        self._outbox.append((CLIENT, message))

    def _finish(self, message: Finished, now_ns: int) -> None:
        routed = self._live.get(message.request_id)
        if routed is None or message.attempt != routed.timeline.attempt:
            return
        del self._live[message.request_id]
        timeline = routed.timeline
        timeline.finished_ns, timeline.reason, timeline.detail = now_ns, FinishReason(message.reason), message.detail
        timeline.stats = message.stats
        self._num_requests[routed.row] -= 1
        self._num_tokens[routed.row] -= timeline.num_prompt
        self._outbox.append((CLIENT, message))
