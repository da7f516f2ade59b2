"""Groups: the instances by role as the global scheduler sees them (the tree types of section 6). Knows no message.

`takers` get a request first: colocated or prefill instances. `decode`, if there is one, go on with it. `stores` get
none, and hold KV that may be fetched. What is said of an instance by its label concerns whichever of these it is in.
"""

from collections.abc import Sequence

import numpy as np

from memserve.clock import to_s
from memserve.decisions import Holding
from memserve.kvcache.errors import MissedEvents
from memserve.kvcache.events import IndexEvent, IndexSnapshot
from memserve.messages import Room, pack_tokens
from memserve.request import Role
from memserve.sched.group import Assignment, Group
from memserve.sched.holders import Holders
from memserve.sched.modes import Mode
from memserve.sched.prompt_tree import Exact, counts_of
from memserve.sched.rejection import Prospect
from memserve.sched.routed import Routed
from memserve.sched.routing import RouteRequest


class Groups:
    """takers, decode, stores: see above.  mode: says what a request leaves in whose cache."""

    def __init__(self, takers: Group, decode: Group | None, mode: Mode, stores: Holders | None = None) -> None:
        self.takers, self.decode = takers, decode
        self.taking_role = Role.COLOCATED if decode is None else Role.PREFILL
        self._mode = mode
        self._holders: list[Holders] = [*self.all] if stores is None else [*self.all, stores]
        self._stores = stores

    @property
    def all(self) -> list[Group]:
        return [self.takers] if self.decode is None else [self.takers, self.decode]

    def add(self, label: str, incarnation: int, role: Role) -> None:
        """An instance joins."""
        group = self.decode if role is Role.DECODE else self.takers
        assert group is not None and role in (self.taking_role, Role.DECODE), f"nobody is {role} in this cluster"
        group.add(label, incarnation)

    def remove(self, label: str) -> None:
        """An instance is gone, or drains: no request is routed to it any more."""
        for group in self._holders:
            group.remove(label)

    def restore(self, label: str) -> None:
        """An instance that was taken for gone is there again."""
        for group in self._holders:
            group.restore(label)

    def is_here(self, label: str) -> bool:
        """Whether an instance is named for requests."""
        return any(group.is_here(label) for group in self._holders)

    def missing_role(self) -> str | None:
        """The kind of instance of which none is left, if one that is needed is."""
        if not len(self.takers.rows()):
            return "instance that takes requests"
        return "decode instance" if self.decode is not None and not len(self.decode.rows()) else None

    def choose(self, request: RouteRequest, now_ns: int, rng: np.random.Generator) -> list[Assignment]:
        """Where a request is to go: in each group an instance, that which gets it first of all.

        It counts as routed even if it is refused then: in turns, the next one is another's.
        """
        places = [group.choose(request, now_ns, rng) for group in self.all]
        for group in self.all:
            group.num_routed += 1
        return places

    def take(self, routed: Routed, places: Sequence[Assignment], now_ns: int) -> int | None:
        """A request's attempt begins at these. Returns the incarnation of who is to decode it, if that is another."""
        routed.starts(*places)
        for group, place in self.places(routed):
            group.take(place, routed.submit.session_id)
        timeline = routed.timeline
        timeline.dispatched_ns, timeline.instance = now_ns, self.takers.labels[places[0].row]
        timeline.num_promised = places[0].num_cached
        timeline.routes += [place.choice for place in places]
        return None if self.decode is None else self.decode.incarnations[places[-1].row]

    def prospect(self, routed: Routed, places: Sequence[Assignment], now_ns: int) -> Prospect:
        """What awaits a request at places that it has not taken."""
        first, last = places[0], places[-1]
        num_decoding, num_decoding_tokens = self.all[-1].load(last.row)
        return Prospect(
            request=routed.request,
            now_ns=now_ns,
            waited_s=to_s(now_ns - routed.submit.arrival_ns),
            queued_s=to_s(self.takers.predicted_ns(first.row)),
            prefill_s=to_s(first.predicted_ns),
            num_decoding=num_decoding,
            num_decoding_tokens=num_decoding_tokens,
        )

    def addressees(self, routed: Routed) -> list[str]:
        """The labels of all instances at which a request's present attempt may be, or on its way to."""
        named = [group.labels[place.row] for group, place in self.places(routed)]
        return named if routed.next_place is None else [*named, self.all[-1].labels[routed.next_place.row]]

    def places(self, routed: Routed) -> list[tuple[Group, Assignment]]:
        """Where a request's present attempt is counted."""
        both = ((self.takers, routed.place), (self.decode, routed.decode_place))
        return [(group, place) for group, place in both if group is not None and place is not None]

    def is_at(self, routed: Routed, label: str) -> bool:
        """Whether a request is lost with an instance. One that was handed over, or decodes, has left its first one."""
        at = self.decoding_at(routed)
        return label in [group.labels[place.row] for group, place in ([at] if at else self.places(routed))]

    def decoding_at(self, routed: Routed) -> tuple[Group, Assignment] | None:
        """Where a request decodes, as far as is known here; None before."""
        if routed.place is None:
            return None
        if self.decode is None:
            return (self.takers, routed.place) if routed.num_generated else None
        has_left = routed.num_generated > 1 or not routed.place.is_counted
        return (self.decode, routed.decode_place) if has_left and routed.decode_place is not None else None

    def move(self, routed: Routed) -> None:
        """A request decodes at its next place, and has left the one before."""
        at, to = self.decoding_at(routed), routed.next_place
        assert at is not None and to is not None, "it migrates"
        at[0].forget(at[1])
        routed.next_place = None
        if self.decode is None:
            routed.place = to
        else:
            routed.decode_place = to

    def forget_next(self, routed: Routed) -> None:
        """A request goes nowhere else."""
        if routed.next_place is not None:
            self.all[-1].forget(routed.next_place)
        routed.next_place = None

    def whereabouts(self, routed: Routed) -> str | None:
        """The label of the instance at which a request waits or is computed: from its first token on, where it decodes.

        None for one that has no instance.
        """
        named = [group.labels[place.row] for group, place in self.places(routed)]
        return named[-1 if routed.num_generated else 0] if named else None

    def prefilled(self, routed: Routed) -> None:
        """A request has its first token: it waits in no queue any more."""
        if routed.place is not None:
            self.takers.prefilled(routed.place)
        if self.decode is not None and routed.decode_place is not None:
            self.decode.decodes(routed.decode_place)

    def decodes(self, place: Assignment) -> None:
        """A place in the group that decodes is of a request that has its first token from elsewhere."""
        if self.decode is None:
            self.takers.prefilled(place)
        else:
            self.decode.decodes(place)

    def handed_over(self, routed: Routed) -> None:
        """A request's KV is at its decode instance: its prefill instance has no load of it any more."""
        if routed.place is not None:
            self.takers.forget(routed.place)

    def forget(self, routed: Routed) -> None:
        """A request's attempt has ended."""
        self.forget_next(routed)
        for group, place in self.places(routed):
            group.forget(place)
        routed.place = routed.decode_place = None

    def learn(self, routed: Routed, role: Role, num_generated: int, now_ns: int) -> None:
        """The tree of a role learns what its instance has of a request after so many generated tokens."""
        group, place = (self.decode, routed.decode_place) if role is Role.DECODE else (self.takers, routed.place)
        held = self._mode.held_after(routed.timeline.num_prompt, num_generated)[role]
        if held and group is not None and place is not None and group.is_here(group.labels[place.row]):
            generated = pack_tokens(routed.timeline.token_ids[:num_generated]) if num_generated > 1 else b""
            group.tree.learn(place.row, (routed.submit.tokens + generated)[: 4 * held], now_ns)

    def learn_all(self, routed: Routed, now_ns: int) -> None:
        """A request has been answered: so do the trees of all roles that had a part in it, and policies hear of it."""
        for group, place in self.places(routed):
            if group.listens:
                group.answered(place, routed.request, routed.num_generated, now_ns)
        for role in self._mode.roles:
            if role is not Role.DECODE or routed.num_generated > 1:  # one alone is the prefill's
                self.learn(routed, role, routed.num_generated, now_ns)

    def held_elsewhere(self, routed: Routed, places: Sequence[Assignment], now_ns: int) -> tuple[Holding, ...]:
        """Who is believed to have more of a prompt than the instance that it goes to, of any role (Eq. 2). Of who has
        as much as others, the first is asked: a store, whose port no hand-off needs.

        places: in each group, that of the instance first.
        """
        held = [] if self._stores is None else self._stores.holdings(routed.request.tokens, now_ns)
        held += [holding for place in places for holding in place.longest]
        return tuple(holding for holding in held if holding.num_tokens > places[0].num_cached)

    def inherited(self, label: str, tokens: bytes, now_ns: int) -> None:
        """An instance has cached what another left to it."""
        for group in self._holders:
            if (row := group.row_of(label)) is not None and group.is_here(label):
                group.tree.learn(row, tokens, now_ns)

    def has_room(self, label: str, room: Room, said_ns: int) -> None:
        """An instance has said what nobody holds of its pool."""
        for group in self.all:
            group.says(label, room.num_free, room.num_blocks, said_ns)

    @property
    def follow_events(self) -> bool:
        """Whether they want `index_changed` and `index_snapshot`."""
        return isinstance(self.takers.tree, Exact)

    def index_changed(self, label: str, events: Sequence[IndexEvent]) -> bool:
        """What entered and left an instance's index; False asks for a snapshot, since something was missed."""
        try:
            for tree, row in self._followed(label):
                tree.apply(row, events)
        except MissedEvents:
            return False
        return True

    def index_snapshot(self, label: str, snapshot: IndexSnapshot) -> None:
        """All that an instance's index holds."""
        for tree, row in self._followed(label):
            tree.rebuild(row, snapshot)

    def tree_counts(self) -> dict[str, int]:
        """Of the prompt trees of all roles: blocks in them now, and those forgotten for space and for age."""
        return counts_of([group.tree for group in self._holders])

    def _followed(self, label: str) -> list[tuple[Exact, int]]:
        """The tree that follows an instance's index, and its row there; none if it is gone."""
        rows = [(group.tree, group.row_of(label)) for group in self._holders if group.is_here(label)]
        return [(tree, row) for tree, row in rows if isinstance(tree, Exact) and row is not None]
