"""Turnover: which rank becomes which instance, in a cluster of processes. Decides nothing of who comes and goes.

a rank waits -> it is to be an instance: Become -> Ready -> Joined to all, Start -> it serves
an instance drains: Bequeath; no request is on its way to it: Bequeath, Retire -> Left -> Gone to all; its rank waits
a process is there in the place of one that is gone: its rank waits, and is an instance of the same role again
"""

import logging
from collections.abc import Collection, Sequence

from memserve.cluster.mailbox import AnyMessage, Mailbox
from memserve.cluster.manager import ClusterManager, Membership, Starting
from memserve.cluster.node_messages import Become, Bequeath, Gone, Joined, Process, Retire, Start
from memserve.cluster.roster import Roster
from memserve.cluster.watch import Watch
from memserve.request import Role
from memserve.sched.scaling import Crash, Standing

_log = logging.getLogger("memserve")


class InstanceFailed(RuntimeError):
    """An instance's process has ended by an error, or does not answer."""


class Vacancies:
    """Instances that are to come, and the ranks that wait to be one. Knows who fits where; tells nobody."""

    def __init__(self) -> None:
        self.ranks: list[int] = []  # that wait
        self._wanted: list[tuple[int, int, int | None]] = []  # (when, instance, the rank that it is to be)

    def want(self, instance: int, due_ns: int, rank: int | None) -> None:
        """An instance is to come from due_ns on. rank: that it is to be; None: any that waits."""
        self._wanted.append((due_ns, instance, rank))

    def only(self, ranks: Collection[int]) -> None:
        """These ranks are left, idle or not: who was promised another takes any."""
        self.ranks = [rank for rank in self.ranks if rank in ranks]
        self._wanted = [(due_ns, i, rank if rank in ranks else None) for due_ns, i, rank in self._wanted]

    def filled(self, now_ns: int) -> list[tuple[int, int]]:
        """(instance, rank) of those that can begin now; they are wanted, and wait, no longer."""
        found = []
        reserved = {rank for _, _, rank in self._wanted if rank is not None}
        for entry in sorted(self._wanted, key=lambda entry: entry[:2]):
            due_ns, instance, rank = entry
            free = [r for r in self.ranks if (r not in reserved if rank is None else r == rank)]
            if due_ns <= now_ns and free:
                found.append((instance, free[0]))
                self.ranks.remove(free[0])
                self._wanted.remove(entry)
        return found


class Turnover:
    """num_first: instances that are there from the start.

    here: instances that have a rank, and have neither left nor gone.
    """

    def __init__(self, members: ClusterManager, roster: Roster, watch: Watch, mailbox: Mailbox, num_first: int) -> None:
        self.here = set(range(num_first))
        self.vacancies = Vacancies()
        self._members, self._roster, self._watch, self._mailbox = members, roster, watch, mailbox
        self._told: set[int] = set()  # instances that know that they are to leave
        self.returning: dict[int, int] = {}  # of ranks that are there again, and do not wait yet, what they were

    def begin(self, epoch_ns: int) -> None:
        """Everybody is ready: the run begins. epoch_ns: time 0."""
        starting = [i for i in sorted(self.here) if self._member(i).standing is Standing.STARTING]
        for instance in sorted(self.here.difference(starting)):
            self._mailbox.send(self._roster.leader(instance), Start(epoch_ns))
        for instance in starting:  # in the place of those that ended before
            self.welcome(instance, self._roster.leader(instance), 0, epoch_ns, is_over=False)

    def proceed(self, now_ns: int) -> None:
        """Who is to come, comes; who is to leave and has no request on its way to it is told to."""
        while (due_ns := self._members.next_time_ns) is not None and due_ns <= now_ns:
            self.perform(self._members.decide(), now_ns)
        for member in self._members.draining:
            is_over = self._members.is_idle(member)
            if (inheritance := self._members.bequest(member, is_last=is_over)) is not None:
                order = Bequeath(inheritance.heir, inheritance.share)
                self._mailbox.send(self._roster.leader(member.incarnation), order)
            if is_over and member.incarnation not in self._told:
                self._told.add(member.incarnation)
                self._mailbox.send(self._roster.leader(member.incarnation), Retire())
        self.fill(now_ns)

    def fill(self, now_ns: int) -> None:
        """Ranks that wait become who is wanted."""
        self.vacancies.only({*self._watch.idle, *(self._roster.leader(instance) for instance in self.here)})
        for instance, rank in self.vacancies.filled(now_ns):
            if self._member(instance).standing is Standing.STARTING:
                self._assign(instance, rank)
            else:  # nobody wants it any more
                self.vacancies.ranks.append(rank)

    def perform(self, orders: Sequence[Starting | Crash], now_ns: int) -> None:
        """Begins what the manager says. Raises InstanceFailed for a crash: processes belong to who started them."""
        for order in orders:
            if isinstance(order, Crash):
                raise InstanceFailed(f"scaling: {order}: expected that whoever started the process kills it")
            before = [m for m in self._members.members if m.successor is order.member and not m.is_lost]
            rank = self._roster.leader(before[0].incarnation) if before else None
            if rank is None and not self.vacancies.ranks:
                _log.warning("%s is to come, and waits for a rank", order.member.label)
            self.vacancies.want(order.member.incarnation, now_ns + order.delay_ns, rank)

    def replace(self, rank: int) -> None:
        """A process is there in the place of one that is gone, and was an instance or waited to be one."""
        instance = self._roster.instance(rank)
        if instance is None:
            self._watch.idle.pop(rank, None)
            return
        self._watch.is_replaced(instance)
        self._roster.release(instance)
        self.returning[rank] = instance

    def wait(self, rank: int, process: Process) -> None:
        """A rank waits to be an instance. One that was before is so again, unless somebody has come in its place."""
        self._watch.waits(rank, process)
        self.vacancies.ranks = [other for other in self.vacancies.ranks if other != rank] + [rank]
        before = self.returning.pop(rank, None)
        member = None if before is None else self._members.comes_back(before)
        if member is not None:
            self.vacancies.want(member.incarnation, 0, rank)

    def welcome(self, instance: int, rank: int, now_ns: int, epoch_ns: int, is_over: bool) -> None:
        """A rank has become an instance: it serves, if it is still wanted. epoch_ns: time 0.  is_over: the run is."""
        member = self._member(instance)
        if member.standing is Standing.STARTING and not is_over:
            self.tell(Joined(instance, rank))
            self._members.joined(member, now_ns)
            _log.info("%s has joined", member.label)
        self._mailbox.send(rank, Start(epoch_ns))
        for other in self._members.members:
            if other.role is Role.STORE and other.ended_ns is not None:  # it would give KV to all that there ever were
                self._mailbox.send(rank, Gone(other.incarnation))
        if member.standing is None:
            self._mailbox.send(rank, Retire())

    def part_with(self, instance: int, rank: int, now_ns: int) -> None:
        """An instance has left, with nothing lost."""
        member = self._member(instance)
        _log.info("%s has left", member.label)
        self.here.discard(instance)
        self._watch.left(instance, rank)
        self._roster.release(instance)
        self.tell(Gone(instance))
        if member.standing is not None:
            self.perform(self._members.left(member, now_ns), now_ns)

    def lose(self, instance: int, now_ns: int, has_begun: bool) -> None:
        """There is proof that an instance's process has ended. has_begun: the run, so that it was in it."""
        self.here.discard(instance)
        self.tell(Gone(instance))
        member = self._member(instance)
        if member.standing is not None:
            self.perform(self._members.lost(member.label, now_ns, has_begun), now_ns)

    def tell(self, message: AnyMessage, ranks: Sequence[int] = ()) -> None:
        """Every instance that is here, and ranks beside; not one whose process has not come yet."""
        for rank in [*(self._roster.leader(instance) for instance in sorted(self.here)), *ranks]:
            if self._mailbox.reaches(rank):
                self._mailbox.send(rank, message)

    def _assign(self, instance: int, rank: int) -> None:
        """A waiting rank is to be an instance."""
        leaders = [(other, self._roster.leader(other)) for other in sorted(self.here)]
        self._roster.assign(instance, rank)
        self.here.add(instance)
        self._watch.becomes(rank, instance)
        member = self._member(instance)
        self._mailbox.send(rank, Become(instance, member.label, member.role, leaders))

    def _member(self, instance: int) -> Membership:
        return self._members.members[instance]
