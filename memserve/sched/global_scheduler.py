"""GlobalScheduler: names the instances for each request and streams the answer back (section 6). Sans-IO.

    Submit -> policy -> Dispatch to an instance -> Tokens, ordered by index, repeats dropped -> client
    Cancel -> Abort to that instance; Finished from it ends the request -> client
    HandoffEnded, failed -> Redirect to another decode instance, or the next attempt, or the request's failure
    instance is to leave, or has little room -> Redirect of what it decodes, if that is to migrate (redirects.py)
    instance joins, drains -> it is named for requests, or for no more of them
    instance gone -> what was there is served again elsewhere, or fails by name
    no instance of a role is left -> a request waits for one, or fails by name
    first Tokens, Finished -> the prompt trees learn what the mode leaves where; index events, if they follow those

It is given the time and messages, and leaves (destination, message) pairs in an outbox. It also keeps each request's
timeline, since every event of a request passes here.
"""

from collections import Counter

import numpy as np

from memserve.messages import CANCELLED, Cancel, Finished, HandoffEnded, Inherited, Message, Room, Submit, Tokens
from memserve.request import FinishReason, Role
from memserve.sched.departures import Departure, EndThere
from memserve.sched.group import Group
from memserve.sched.groups import Groups
from memserve.sched.holders import Holders
from memserve.sched.modes import Colocated, Mode
from memserve.sched.rebalancing import NoRebalancing, Rebalancing
from memserve.sched.redirects import Redirects, abort_of, aborts
from memserve.sched.rejection import NoRejection, Rejection, refusal
from memserve.sched.routed import Routed
from memserve.sched.unserved import Unserved
from memserve.timeline import RequestTimeline

CLIENT = "client"
MAX_ATTEMPTS = 3  # of a request whose hand-offs fail or whose instances are lost
_COLOCATED = Colocated()
_NO_REJECTION, _WAIT, _STAY = NoRejection(), EndThere(), NoRebalancing()


class GlobalScheduler:
    """Routes over `group`, the instances that take requests. `timelines` holds every request submitted, in order.

    decode: whom prefill instances hand over to, if they do.  mode: says what a request leaves in whose cache.
    recompute_failed: one whose hand-off failed, or whose instance is gone, is served again, up to MAX_ATTEMPTS times;
    else it fails.  max_unfinished: one that comes when so many are there is refused.  patience_ns: so long one waits
    for an instance to come where none of a role is left.  rejection: refuses one that is about to be sent out for the
    first time.  departure, rebalancing: say which answers go on elsewhere when their instance drains, or is short of
    room.  stores: who holds KV and serves nobody.
    """

    def __init__(
        self,
        group: Group,
        rng: np.random.Generator,
        *,
        decode: Group | None = None,
        mode: Mode = _COLOCATED,
        recompute_failed: bool = True,
        max_unfinished: int | None = None,
        patience_ns: int = 0,
        rejection: Rejection = _NO_REJECTION,
        departure: Departure = _WAIT,
        rebalancing: Rebalancing = _STAY,
        stores: Holders | None = None,
    ) -> None:
        self.timelines: dict[str, RequestTimeline] = {}
        self.groups = Groups(group, decode, mode, stores)
        self._recompute_failed, self._max_unfinished = recompute_failed, max_unfinished
        self._rejection, self._rng = rejection, rng
        self._redirects = Redirects(self.groups, departure, rebalancing, rng)
        self._live: dict[str, Routed] = {}
        self._unserved = Unserved(patience_ns)
        self._outbox: list[tuple[str, Message]] = []

    @property
    def num_unfinished(self) -> int:
        return len(self._live)

    @property
    def next_time_ns(self) -> int | None:
        """When `poll` is due; None: by itself nothing happens."""
        return self._unserved.next_time_ns

    def poll(self, now_ns: int) -> None:
        """Requests that have waited for an instance for as long as they may fail."""
        for request_id in self._unserved.expired(now_ns):
            routed, why = self._live[request_id], self._unserved.why(self.groups.missing_role())
            self._end(routed, routed.failed(FinishReason.INSTANCE_LOST, why), now_ns)

    def receive(self, message: Message, now_ns: int) -> None:
        """Takes one message from a client or an instance."""
        match message:
            case Submit():
                self._submit(message, now_ns)
            case Cancel():
                self._cancel(message, now_ns)
            case Tokens() | Finished():
                self._answer(message, now_ns)
            case HandoffEnded():
                self._handoff_ended(message, now_ns)
            case Inherited():
                self.groups.inherited(message.instance, message.tokens, now_ns)
            case _:
                raise TypeError(f"the global scheduler takes no {type(message).__name__}")

    def drain_outbox(self) -> list[tuple[str, Message]]:
        """The (destination label, message) pairs left since the last call."""
        out, self._outbox = self._outbox, []
        return out

    def _submit(self, message: Submit, now_ns: int) -> None:
        if message.request_id in self.timelines:
            raise ValueError(f"request_id={message.request_id!r} was submitted before: expected a new one")
        routed, num_unfinished = Routed.of(message), len(self._live)
        self.timelines[message.request_id], self._live[message.request_id] = routed.timeline, routed
        if self._max_unfinished is not None and num_unfinished >= self._max_unfinished:
            why = f"{num_unfinished} requests are unfinished: expected fewer than cluster.max_unfinished"
            self._end(routed, routed.failed(FinishReason.REFUSED, why), now_ns)
        elif self._may_serve:
            self._serve(routed, now_ns)
        else:
            why = f"no {self.groups.missing_role()} is left"
            self._end(routed, routed.failed(FinishReason.INSTANCE_LOST, why), now_ns)

    def instance_joined(self, label: str, incarnation: int, role: Role, now_ns: int) -> None:
        """A new instance takes requests, or decodes; who has waited for one is served."""
        self.groups.add(label, incarnation, role)
        self._serve_waiting(now_ns)

    def instance_draining(self, label: str, now_ns: int) -> None:
        """An instance gets no new requests, and nothing is fetched from it; what it has goes on, there or elsewhere."""
        self.groups.remove(label)
        self._outbox += self._redirects.leaves(label, self._live.values(), now_ns)

    def has_room(self, label: str, room: Room, said_ns: int, now_ns: int) -> None:
        """An instance said at said_ns what nobody held of its pool."""
        self.groups.has_room(label, room, said_ns)
        self._outbox += self._redirects.has_room(label, self._live.values(), now_ns)

    def loads(self) -> Counter[str]:
        """Unfinished requests at each instance: at a prefill instance those without a first token, at a decode
        instance those with one.
        """
        return Counter(label for routed in self._live.values() if (label := self.groups.whereabouts(routed)))

    def is_needed(self, label: str) -> bool:
        """Whether an unfinished request is at an instance, or will be."""
        decode = self.groups.decode
        if (decode is not None and decode.num_requests(label)) or self._redirects.is_target(label):
            return True
        return bool(self.groups.takers.num_requests(label)) and self.loads()[label] > 0

    def instance_back(self, label: str, now_ns: int) -> None:
        """An instance that was silent takes requests again. What it had is of attempts given up."""
        self.groups.restore(label)
        self._serve_waiting(now_ns)

    def instance_gone(self, label: str, now_ns: int) -> None:
        """An instance is gone, or silent for too long. What it says from now on is of attempts given up."""
        self.groups.remove(label)
        self._redirects.gone(label)
        for routed in list(self._live.values()):
            if self.groups.is_at(routed, label):
                self._abort(routed)
                self._try_again(routed, FinishReason.INSTANCE_LOST, f"instance {label} is gone", now_ns)

    @property
    def _may_serve(self) -> bool:
        """Whether there is somebody for a request, or it may wait for one."""
        return self._unserved.patience_ns > 0 or self.groups.missing_role() is None

    def _serve(self, routed: Routed, now_ns: int) -> None:
        """Sends a request out, or lets it wait where nobody is left."""
        if self.groups.missing_role() is None:
            self._dispatch(routed, now_ns)
        else:
            self._unserved.add(routed.submit.request_id, now_ns)

    def _serve_waiting(self, now_ns: int) -> None:
        """Somebody has come: if nobody is missing, all that wait are sent out; who is to migrate may go there."""
        if self.groups.missing_role() is None:
            for request_id in self._unserved.drain():
                self._dispatch(self._live[request_id], now_ns)
        self._outbox += self._redirects.retry(now_ns)

    def _dispatch(self, routed: Routed, now_ns: int) -> None:
        """Names the instances of the request's next attempt and sends it, or refuses it."""
        places, is_first = self.groups.choose(routed.request, now_ns, self._rng), not routed.timeline.attempt
        why = refusal(self._rejection, self.groups.prospect(routed, places, now_ns)) if is_first else None
        if why is not None:
            self._end(routed, routed.failed(FinishReason.REFUSED, why), now_ns)
            return
        decode = self.groups.take(routed, places, now_ns)
        held = self.groups.held_elsewhere(routed, places, now_ns)
        self._outbox.append((routed.timeline.instance, routed.dispatch(decode, held)))

    def _cancel(self, message: Cancel, now_ns: int) -> None:
        if (routed := self._live.get(message.request_id)) is None:
            return  # it ended while the client was asking
        routed.is_cancelled = True
        if message.request_id in self._unserved:
            self._end(routed, routed.failed(*CANCELLED), now_ns)
        else:
            self._abort(routed)

    def _abort(self, routed: Routed) -> None:
        """Stops the present attempt wherever it may be."""
        self._outbox += aborts(routed, self.groups.addressees(routed))

    def _answer(self, message: Tokens | Finished, now_ns: int) -> None:
        routed = self._current(message.request_id, message.attempt)
        if routed is None:
            return  # of an attempt that was given up
        for ready in routed.in_order(message):
            if isinstance(ready, Tokens):
                self._stream(routed, ready, now_ns)
            else:
                self._finish(routed, ready, now_ns)

    def _stream(self, routed: Routed, message: Tokens, now_ns: int) -> None:
        if routed.num_generated == 0:
            self.groups.prefilled(routed)
            self.groups.learn(routed, self.groups.taking_role, 1, now_ns)
        if routed.enter(message):
            self._outbox.append((CLIENT, message))
        self._outbox += self._redirects.settled(routed, now_ns)

    def _finish(self, routed: Routed, message: Finished, now_ns: int) -> None:
        if routed.is_of_copy(message):
            return
        if FinishReason(message.reason).succeeded:
            self.groups.learn_all(routed, now_ns)
        self._end(routed, message, now_ns)

    def _end(self, routed: Routed, message: Finished, now_ns: int) -> None:
        del self._live[message.request_id]
        self._unserved.discard(message.request_id)
        timeline = routed.timeline
        timeline.finished_ns, timeline.reason, timeline.detail = now_ns, FinishReason(message.reason), message.detail
        timeline.stats = message.stats
        if routed.has_copies:  # which goes on
            self._abort(routed)
        self._forget(routed)
        self._outbox.append((CLIENT, message))
        self._outbox += self._redirects.retry(now_ns)

    def _forget(self, routed: Routed) -> None:
        """The attempt has ended."""
        self.groups.forget(routed)
        self._redirects.forget(routed)

    def _current(self, request_id: str, attempt: int) -> Routed | None:
        routed = self._live.get(request_id)
        return routed if routed is not None and routed.timeline.attempt == attempt else None

    def _handoff_ended(self, message: HandoffEnded, now_ns: int) -> None:
        """It goes on elsewhere; or: another instance, or another attempt, or the end."""
        routed = self._current(message.request_id, message.attempt)
        if routed is None:  # it was served all the same, or given up: nobody waits for it there
            if not message.done:
                self._outbox.append(abort_of(message))
            return
        if self._redirects.is_about(routed, message):
            self._migration_ended(routed, message, now_ns)
            return
        if message.done:
            self.groups.handed_over(routed)
            self._outbox += self._redirects.settled(routed, now_ns)
            return
        if message.refused and (redirect := self._redirects.another(routed, now_ns)):
            self._outbox += redirect
            return
        self._abort(routed)
        if message.refused:
            self._end(routed, routed.failed(FinishReason.TRANSFER_FAILED, message.reason), now_ns)
        else:
            self._try_again(routed, FinishReason.TRANSFER_FAILED, message.reason, now_ns)

    def _migration_ended(self, routed: Routed, message: HandoffEnded, now_ns: int) -> None:
        """It is at its next place, or still where it was; or lost with an instance that is gone since."""
        if not message.done:
            self._outbox += self._redirects.stayed(routed, message, now_ns)
        elif routed.is_next_gone:
            self._abort(routed)
            self._try_again(routed, FinishReason.INSTANCE_LOST, "the instance that it migrated to is gone", now_ns)
        else:
            self._outbox += self._redirects.moved(routed, message, now_ns)

    def _try_again(self, routed: Routed, reason: FinishReason, detail: str, now_ns: int) -> None:
        """The next attempt, or the end for want of one."""
        if routed.is_cancelled:
            self._end(routed, routed.failed(*CANCELLED), now_ns)
            return
        more = self._recompute_failed and routed.timeline.attempt + 1 < MAX_ATTEMPTS
        if not more or not self._may_serve:
            self._end(routed, routed.failed(reason, detail), now_ns)
            return
        self._forget(routed)
        routed.timeline.attempt += 1
        self._serve(routed, now_ns)
