"""Redirects: other instances for requests whose KV cannot go where it was to, or that decode where they should not.

Sans-IO.

    prefilled, refused by its decode instance -> another one
    decodes at an instance that is to leave (departures.py) -> another one, to which its KV is to go
        HandoffEnded, done -> it is there; its place is that one's from now on
        not done -> the next one, or, with none left, it goes on where it is, and is asked again when there may be room
    decodes at one that has less room than another (rebalancing.py) -> that one; not done -> it goes on where it is

From each instance one migrates at a time: the others decode meanwhile, where they would wait for the same link.

A request that migrates has two places: one where it is, and `next_place`, until its instance says how that ended. One
Redirect is on its way at a time, and each ends by one HandoffEnded, or with the attempt. Whoever may have the KV
nevertheless (no `Inserted` came in time) is told to drop it, and is not asked again in this attempt.
"""

from collections.abc import Iterable

import numpy as np

from memserve.clock import to_s
from memserve.decisions import Migration
from memserve.messages import Abort, HandoffEnded, Message, Redirect
from memserve.sched.departures import Answer, Departure
from memserve.sched.group import Assignment, Group
from memserve.sched.groups import Groups
from memserve.sched.rebalancing import Rebalancing
from memserve.sched.routed import Routed
from memserve.sched.routing import is_row
from memserve.values import given_bool, given_key

Sent = list[tuple[str, Message]]  # (destination label, message) pairs


class Redirects:
    """groups: in which others are found, by their policies.  departure: says which answers migrate when their instance
    leaves; rebalancing: where which go though it stays.
    """

    def __init__(
        self, groups: Groups, departure: Departure, rebalancing: Rebalancing, rng: np.random.Generator
    ) -> None:
        self._groups, self._departure, self._rebalancing, self._rng = groups, departure, rebalancing, rng
        self._leaving: set[str] = set()  # instances that drain, or did
        self._full = set[str]()  # instances that have taken no answer since they last said how much room they have
        self._moving: dict[str, Routed] = {}
        self._waiting: dict[str, Routed] = {}  # are to migrate, each when the one before has, or when there is room

    def another(self, routed: Routed, now_ns: int) -> Sent:
        """Another decode instance for a request that the one it was to go to has refused; none if there is none."""
        decode, refused_by = self._groups.decode, routed.decode_place
        assert decode is not None and refused_by is not None, "only prefill instances hand over"
        routed.tried.add(refused_by.row)
        if not len(decode.rows(routed.tried)):
            return []
        decode.forget(refused_by)
        routed.decode_place = decode.choose(routed.request, now_ns, self._rng, routed.tried)
        self._take(routed, decode, routed.decode_place)
        decode.decodes(routed.decode_place)
        return [self._redirect(routed, routed.timeline.instance, decode.incarnations[routed.decode_place.row])]

    def leaves(self, label: str, live: Iterable[Routed], now_ns: int) -> Sent:
        """An instance is to leave: what it decodes of `live` migrates, if it is to."""
        self._leaving.add(label)
        return [sent for routed in live for sent in self.settled(routed, now_ns)]

    def settled(self, routed: Routed, now_ns: int) -> Sent:
        """A request may have come to decode where it is: at an instance that is to leave it migrates, if it is to."""
        request_id = routed.submit.request_id
        at = self._groups.decoding_at(routed) if self._leaving else None
        is_asked = request_id in self._moving or request_id in self._waiting or routed.ends_here
        if at is None or is_asked or routed.is_cancelled or (label := _label(at)) not in self._leaving:
            return []
        if not self._moves(routed):
            routed.ends_here = True
            return []
        self._waiting[request_id] = routed
        return self._next_of(label, now_ns)

    def has_room(self, label: str, live: Iterable[Routed], now_ns: int) -> Sent:
        """An instance has said how much room it has: an answer of `live` may go from there to one that has more."""
        self._full.discard(label)
        if not self._rebalancing.looks_at_loads:
            return []
        group, in_use = self._groups.all[-1], self._in_use()
        if not group.is_here(label) or label in in_use:
            return []
        others = (group.row_of(other) for other in in_use | self._full)
        rows = group.rows({row for row in others if row is not None})
        target = self._target(group, rows, label, now_ns)
        if target is None or not (here := [r for r in live if self._may_go(r, label) and target not in r.tried]):
            return []
        routed = min(here, key=self._key)
        return self._go(routed, label, group, group.place_at(target, "rebalanced", routed.request, now_ns))

    def is_about(self, routed: Routed, message: HandoffEnded) -> bool:
        """Whether a hand-off that has ended was this request's migration."""
        return routed.submit.request_id in self._moving and self._label_of(routed) == message.instance

    def moved(self, routed: Routed, message: HandoffEnded, now_ns: int) -> Sent:
        """It goes on at its next place; whoever is next may leave where it was."""
        self._note(routed, message)
        del self._moving[routed.submit.request_id]
        self._groups.move(routed)
        return [*self.settled(routed, now_ns), *self._next_of(message.instance, now_ns)]

    def stayed(self, routed: Routed, message: HandoffEnded, now_ns: int) -> Sent:
        """Its next place has not taken it: another one, or it goes on where it is."""
        self._note(routed, message)
        request_id, at, target = routed.submit.request_id, self._groups.decoding_at(routed), routed.next_place
        assert at is not None and target is not None, "it migrates"
        group, place = at
        del self._moving[request_id]
        self._groups.forget_next(routed)
        (routed.declined if message.refused else routed.tried).add(target.row)
        routed.has_copies = routed.has_copies or not message.refused
        dropped = [] if message.refused else aborts(routed, [group.labels[target.row]])
        if message.instance not in self._leaving or not self._moves(routed):
            self._full.add(group.labels[target.row])
            return [*dropped, self._redirect(routed, message.instance, group.incarnations[place.row])]
        if len(group.rows(tried := routed.tried | routed.declined)):
            return [*dropped, *self._ask(routed, group, place, tried, now_ns)]
        self._waiting[request_id] = routed
        return [*dropped, self._redirect(routed, message.instance, group.incarnations[place.row])]

    def retry(self, now_ns: int) -> Sent:
        """Somebody has come, or an answer has ended: whoever waits to migrate may find room now."""
        labels = dict.fromkeys(self._label_of(routed) for routed in self._waiting.values())
        return [sent for label in labels for sent in self._next_of(label, now_ns)]

    def forget(self, routed: Routed) -> None:
        """The attempt has ended."""
        self._moving.pop(routed.submit.request_id, None)
        self._waiting.pop(routed.submit.request_id, None)

    def gone(self, label: str) -> None:
        """An instance is gone: what was on its way there stays, or is found to be lost with it."""
        self._leaving.discard(label)
        for routed in self._moving.values():
            routed.is_next_gone = routed.is_next_gone or self._next_label(routed) == label

    def is_target(self, label: str) -> bool:
        """Whether a request is on its way to an instance, from another of its role."""
        return any(self._next_label(routed) == label for routed in self._moving.values())

    def _moves(self, routed: Routed) -> bool:
        """Whether an answer is to go on elsewhere, now that its instance leaves."""
        return given_bool(self._departure, "moves", self._departure.moves(_answer(routed)))

    def _key(self, routed: Routed) -> tuple[float, ...]:
        """An answer's place among those that could go where there is more room."""
        return given_key(self._rebalancing, "key", self._rebalancing.key(_answer(routed)))

    def _in_use(self) -> set[str]:
        """The labels of instances from or to which an answer is on its way."""
        moving = self._moving.values()
        return {self._label_of(routed) for routed in moving} | {self._next_label(routed) for routed in moving}

    def _target(self, group: Group, rows: np.ndarray, label: str, now_ns: int) -> int | None:
        """The row to which one of an instance's answers is to go, of these of the group; None: they stay."""
        source = int(np.flatnonzero(rows == group.row_of(label))[0])
        target = self._rebalancing.target(source, group.snapshot(rows, np.zeros_like(rows), "", now_ns))
        if target is None:
            return None
        if not is_row(target, len(rows)) or target == source:
            raise ValueError(f"{type(self._rebalancing).__name__} chose row {target!r}: expected None or one of 0 to "
                             f"{len(rows) - 1} that is not {source}")  # fmt: skip
        return int(rows[target])

    def _may_go(self, routed: Routed, label: str) -> bool:
        """Whether an answer is decoded at an instance, and nobody wants it to go elsewhere."""
        at, request_id = self._groups.decoding_at(routed), routed.submit.request_id
        is_asked = request_id in self._moving or request_id in self._waiting or routed.is_cancelled
        return at is not None and not is_asked and _label(at) == label

    def _next_of(self, label: str, now_ns: int) -> Sent:
        """The next answer that is to leave an instance does, unless one is on its way from there."""
        if any(self._label_of(routed) == label for routed in self._moving.values()):
            return []
        routed = next((r for r in self._waiting.values() if self._label_of(r) == label), None)
        at = None if routed is None else self._groups.decoding_at(routed)
        if routed is None or at is None:
            return []
        del self._waiting[routed.submit.request_id]
        routed.declined.clear()
        if len(at[0].rows(routed.tried)):
            return self._ask(routed, *at, routed.tried, now_ns)
        self._waiting[routed.submit.request_id] = routed
        return []

    def _label_of(self, routed: Routed) -> str:
        """Of the instance at which a request decodes."""
        at = self._groups.decoding_at(routed)
        assert at is not None, "it decodes"
        return _label(at)

    def _next_label(self, routed: Routed) -> str:
        assert routed.next_place is not None, "it migrates"
        return self._groups.all[-1].labels[routed.next_place.row]

    def _ask(self, routed: Routed, group: Group, place: Assignment, tried: set[int], now_ns: int) -> Sent:
        """Its instance is to hand it over to one that was not tried, by the group's policy."""
        target = group.choose(routed.request, now_ns, self._rng, tried)
        return self._go(routed, group.labels[place.row], group, target)

    def _go(self, routed: Routed, label: str, group: Group, target: Assignment) -> Sent:
        """Its instance, of this label, is to hand it over to that of another place, where it counts from now on."""
        self._take(routed, group, target)
        routed.next_place, routed.is_next_gone = target, False
        self._groups.decodes(target)
        self._moving[routed.submit.request_id] = routed
        return [self._redirect(routed, label, group.incarnations[target.row])]

    @staticmethod
    def _take(routed: Routed, group: Group, place: Assignment) -> None:
        group.take(place, routed.submit.session_id)
        routed.timeline.routes.append(place.choice)

    def _note(self, routed: Routed, message: HandoffEnded) -> None:
        m = message
        migration = Migration(m.instance, self._next_label(routed), m.num_tokens, m.done, m.num_ahead)
        routed.timeline.migrations.append(migration)

    @staticmethod
    def _redirect(routed: Routed, label: str, incarnation: int) -> tuple[str, Message]:
        return label, Redirect(routed.submit.request_id, routed.timeline.attempt, incarnation)


def _label(at: tuple[Group, Assignment]) -> str:
    group, place = at
    return group.labels[place.row]


def _answer(routed: Routed) -> Answer:
    m = routed.submit
    return Answer(routed.timeline.num_prompt, m.params.max_tokens, to_s(m.arrival_ns), m.priority)


def aborts(routed: Routed, labels: Iterable[str]) -> Sent:
    """The present attempt is to stop at these instances."""
    return [(label, Abort(routed.submit.request_id, routed.timeline.attempt)) for label in labels]


def abort_of(message: HandoffEnded) -> tuple[str, Message]:
    """Nobody waits any more for what an instance could not hand over."""
    return message.instance, Abort(message.request_id, message.attempt)
