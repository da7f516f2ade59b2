"""ClusterManager: who is in the cluster (section 4.4). Sans-IO: decides nothing of when, and starts no process.

    decided: starting -> joined: serving -> draining -> idle here and there: left [-> its successor, starting]
    any of these -> gone: the driver has proof that the process has ended

A scaling policy (sched/scaling.py) says what is to change; the driver performs it: it makes an instance that starts,
says when that has joined, looks whether one that drains has nothing left to do, and says when it has left. Every
instance has a number that is never used again, its incarnation, and a label made of its role and that number.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from memserve.metrics.report import InstanceStats
from memserve.request import SERVING, Role
from memserve.sched.global_scheduler import GlobalScheduler
from memserve.sched.heirs import Heir, NoHeir
from memserve.sched.scaling import Add, Change, ChangeRole, Crash, Drain, Load, Scaling, Standing
from memserve.values import require_number


@dataclass(eq=False)
class Membership:
    """An instance's time in the cluster, on its clock. standing: None when it has left or is gone.

    joined_ns: None before.  ended_ns: when it left, or was found gone.  is_lost: it is gone.  is_leaving: it drains, or
    did, or was called off.  is_replaced: it is lost, and somebody has come for it, or is to.  successor: who is to come
    in its place, in another role.
    """

    incarnation: int
    label: str
    role: Role
    standing: Standing | None
    joined_ns: int | None = None
    ended_ns: int | None = None
    is_lost: bool = False
    is_leaving: bool = False
    is_replaced: bool = False
    is_doomed: bool = False  # a crash was ordered
    num_bequests: int = 0  # how often it was told to whom to leave what it has cached, or that nobody is there
    successor: "Membership | None" = None


@dataclass(frozen=True)
class Starting:
    """The driver is to make this instance, which joins after delay_ns."""

    member: Membership
    delay_ns: int


@dataclass(frozen=True)
class Inheritance:
    """heir: an incarnation.  share: of as many blocks as a pool has in HBM, what it is offered at most."""

    heir: int
    share: float


class ClusterManager:
    """roles: (label, role) of the instances that are there from the start.  scheduler: told who serves.  heir: says who
    gets what an instance that leaves has cached.

    members, labels: of all that there ever were, by incarnation. Raises ValueError for an heir's share out of range.
    """

    def __init__(
        self, roles: Sequence[tuple[str, Role]], scaling: Scaling, scheduler: GlobalScheduler, heir: Heir | None = None
    ) -> None:
        self.draining: list[Membership] = []
        self.members = [Membership(i, label, role, Standing.SERVING, 0) for i, (label, role) in enumerate(roles)]
        self.labels = [label for label, _ in roles]
        self._scaling, self._scheduler, self._heir = scaling, scheduler, heir or NoHeir()
        name = f"{type(self._heir).__name__}.share"
        require_number(name, self._heir.share, "a number in [0, 1]", minimum=0, maximum=1)
        self._num_first = len(roles)
        self._asked_ns: int | None = None
        self._held: list[Membership] = []  # are to drain, and do when that leaves somebody of their role

    @property
    def next_time_ns(self) -> int | None:
        """When `decide` is due; None for never again."""
        return self._scaling.next_time_ns(self._asked_ns)

    def decide(self) -> list[Starting | Crash]:
        """Asks the scaling policy, as of the time that it wanted, and begins what it says."""
        due_ns = self.next_time_ns
        assert due_ns is not None, "nothing is due"
        if self._asked_ns is not None and due_ns <= self._asked_ns:
            name = type(self._scaling).__name__
            raise ValueError(
                f"{name} was asked at {self._asked_ns} ns and wants {due_ns} ns next: expected a later time"
            )
        self._asked_ns = due_ns
        changes = self._scaling.changes(self._loads(), due_ns)
        if not isinstance(changes, Sequence):
            raise ValueError(f"{type(self._scaling).__name__} says {changes!r}: expected a list of changes")
        said = [change for change in changes if not (self._comes_too_late(change) or self._waits_to_begin(change))]
        return self.begin(said, due_ns)

    def _comes_too_late(self, change: Change) -> bool:
        """Whether it concerns an instance that has left, or was lost, before."""
        ended = {member.label for member in self.members if member.standing is None}
        return isinstance(change, Drain | ChangeRole | Crash) and change.label in ended

    def _waits_to_begin(self, change: Change) -> bool:
        """Whether an instance is to drain that does as soon as another serves: nobody who sees loads sees that."""
        return isinstance(change, Drain | ChangeRole) and change.label in [member.label for member in self._held]

    def begin(self, changes: Iterable[Change], now_ns: int) -> list[Starting | Crash]:
        """Begins changes; what the driver is to do for them. Raises ValueError for an instance or a role that is none
        of the cluster's. A drain that would leave nobody who serves in a role waits until somebody does, and a change
        of role of an instance that is starting until it serves.
        """
        orders = list[Starting | Crash]()
        for change in changes:
            match change:
                case Add():
                    self._replace_a_lost(change.role)
                    orders.append(Starting(self._named(change.role), self._scaling.startup_ns))
                case Crash():
                    member = self.member(change.label)
                    if not member.is_doomed:  # else the global scheduler is still to hear of it
                        member.is_doomed = True
                        orders.append(Crash(member.label))
                case Drain() | ChangeRole():
                    orders += self._retire(change, now_ns)
                case _:
                    name = type(self._scaling).__name__
                    raise ValueError(f"{name} says {change!r}: expected Add, Drain, ChangeRole or Crash")
        return orders

    def comes_back(self, incarnation: int) -> Membership | None:
        """Another process is there in the place of a lost instance's: it is to start, as a new instance of that role;
        None where the lost one was to leave, or somebody else has come for it.
        """
        before = self.members[incarnation]
        if before.is_leaving or before.is_replaced:
            return None
        before.is_replaced = True
        return self._named(before.role)

    def member(self, label: str) -> Membership:
        """The instance of that name. Raises ValueError if it is not in the cluster."""
        for member in self.members:
            if member.label == label and member.standing is not None:
                return member
        here = ", ".join(member.label for member in self.members if member.standing is not None)
        raise ValueError(f"instance {label!r} is not in the cluster: expected one of {here}")

    def present(self, label: str) -> Membership:
        """As `member`, of an instance that is there already. Raises ValueError for one that is starting, too."""
        member = self.member(label)
        if member.standing is Standing.STARTING:
            raise ValueError(f"instance {label!r} is starting: expected one that is there")
        return member

    def joined(self, member: Membership, now_ns: int) -> None:
        """A starting instance is there: it gets requests from now on."""
        assert member.standing is Standing.STARTING, f"{member.label} is {member.standing}"
        member.standing, member.joined_ns = Standing.SERVING, now_ns
        self._scheduler.instance_joined(member.label, member.incarnation, member.role, now_ns)
        self.retry_held(now_ns)

    def retry_held(self, now_ns: int) -> None:
        """Somebody serves, or serves again: who waited for that drains."""
        held, self._held = self._held, []
        for member in held:
            self._drain(member, now_ns)

    def bequest(self, member: Membership, *, is_last: bool) -> Inheritance | None:
        """To whom a draining instance leaves what it has cached; None where that is nobody, or was said before.

        is_last: it has nothing left to do; what is new since the first time is left then. Raises ValueError where the
        policy names nobody of those that it was shown.
        """
        if member.num_bequests > is_last:
            return None
        member.num_bequests = 1 + is_last
        loads = self._loads()
        (leaving,) = [load for load in loads if load.label == member.label]
        here = [load for load in loads if self._stands_in(self.member(load.label), member)]
        chosen = self._heir.choose(leaving, here)
        if chosen is None:
            return None
        if chosen not in [load.label for load in here]:
            names = ", ".join(load.label for load in here) or "nobody"
            raise ValueError(f"{type(self._heir).__name__} chose {chosen!r}: expected None, or one of {names}")
        return Inheritance(self.member(chosen).incarnation, self._heir.share)

    def is_idle(self, member: Membership) -> bool:
        """Whether no request is at a draining instance, or on its way there, as far as the global scheduler knows."""
        return not self._scheduler.is_needed(member.label)

    def left(self, member: Membership, now_ns: int) -> list[Starting]:
        """A draining instance has gone, with nothing lost; what the driver is to start in its place."""
        assert member.standing is Standing.DRAINING, f"{member.label} is {member.standing}"
        return self._ended(member, now_ns)

    def lost(self, label: str, now_ns: int, has_begun: bool = True) -> list[Starting]:
        """There is proof that an instance's process has ended; whoever was to succeed it comes nevertheless.

        has_begun: the run; one that is lost before was never in it.
        """
        member = self.member(label)
        self._scheduler.instance_gone(label, now_ns)
        member.is_lost, member.is_replaced = True, member.successor is not None
        member.joined_ns = member.joined_ns if has_begun else None
        return self._ended(member, now_ns)

    def counts(self) -> dict[str, int]:
        """Instances that came after the start, and those that have left, are gone, or came back in another role."""
        joined = [member for member in self.members if member.joined_ns is not None]
        num_in_place = sum(
            m.is_lost and m.joined_ns is None for m in self.members[: self._num_first]
        )  # since the start
        returned = {id(member.successor) for member in self.members if member.successor is not None}
        return {
            "joined": sum(member.incarnation >= self._num_first for member in joined) - num_in_place,
            "left": sum(member.ended_ns is not None and not member.is_lost for member in joined),
            "lost": sum(member.is_lost for member in joined),
            "switched": sum(id(member) in returned for member in joined),
        }

    def dated(self, stats: InstanceStats) -> InstanceStats:
        """An instance's counts, with when it came and went."""
        (member,) = [member for member in self.members if member.label == stats.id]
        return replace(stats, joined_ns=member.joined_ns or 0, left_ns=member.ended_ns)

    def stays_ns(self) -> list[tuple[int, int | None]]:
        """From when until when each instance that serves requests was in the cluster; None: it is still."""
        return [(m.joined_ns, m.ended_ns) for m in self.members if m.joined_ns is not None and m.role in SERVING]

    def _ended(self, member: Membership, now_ns: int) -> list[Starting]:
        """The successor starts, if there is one that is still wanted."""
        if member in self.draining:
            self.draining.remove(member)
        member.standing, member.ended_ns = None, now_ns
        successor = member.successor
        if successor is None or successor.standing is None:
            return []
        return [Starting(successor, self._scaling.switch_ns)]

    def _retire(self, change: Drain | ChangeRole, now_ns: int) -> list[Starting]:
        """An instance is to drain, at once or when that leaves somebody; one that has not come yet never does."""
        member = self.member(change.label)
        if member.role not in SERVING:
            raise ValueError(f"instance {change.label!r} is a store: expected one that serves requests")
        if member.standing is Standing.DRAINING or member in self._held:
            raise ValueError(f"instance {change.label!r} is to drain already: expected one that is to stay")
        if isinstance(change, ChangeRole):
            member.successor = self._named(change.role)
        elif member.standing is Standing.STARTING and not member.is_doomed:
            member.is_leaving = True
            return self._ended(member, now_ns)
        self._drain(member, now_ns)
        return []

    def _drain(self, member: Membership, now_ns: int) -> None:
        if member.standing is None:
            return  # it was lost while it waited for this
        if member.standing is Standing.STARTING or not any(self._stands_in(other, member) for other in self.members):
            self._held.append(member)
            return
        member.standing, member.is_leaving = Standing.DRAINING, True
        self.draining.append(member)
        self._scheduler.instance_draining(member.label, now_ns)

    def _stands_in(self, other: Membership, member: Membership) -> bool:
        """Whether another instance of the role serves, and is neither silent nor about to crash."""
        serves = self._seen(other) is Standing.SERVING and not other.is_doomed
        return serves and other.role == member.role and other is not member

    def _replace_a_lost(self, role: Role) -> None:
        """Somebody comes: for one that is lost, if one of the role is and nobody has come for it."""
        lost = (m for m in self.members if m.is_lost and m.role == role and not (m.is_leaving or m.is_replaced))
        if (member := next(lost, None)) is not None:
            member.is_replaced = True

    def _named(self, role: Role) -> Membership:
        """An instance that is to come. Raises ValueError for a role that the cluster does not have."""
        roles = {member.role for member in self.members}.intersection(SERVING)
        if role not in roles:
            raise ValueError(f"role {role}: expected one of the cluster's, {', '.join(sorted(roles))}")
        number = len(self.members)
        self.labels.append(f"{role}-{number}")
        self.members.append(Membership(number, self.labels[-1], Role(role), Standing.STARTING))
        return self.members[-1]

    def _loads(self) -> list[Load]:
        num_at = self._scheduler.loads()
        here = [(m, self._seen(m)) for m in self.members if m.role in SERVING]
        return [Load(m.label, m.role, standing, num_at.get(m.label, 0)) for m, standing in here if standing is not None]

    def _seen(self, member: Membership) -> Standing | None:
        """Its standing, but of who is not heard of: it serves nobody, whatever it is to do once it is back."""
        is_silent = member.standing is Standing.SERVING and not self._scheduler.groups.is_here(member.label)
        return Standing.SILENT if is_silent else member.standing
