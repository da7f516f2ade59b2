"""EmulatedCluster: several instances in one process and one virtual time. Knows when; never what is computed.

Every instance has its own timeline. A step begins when its instance is free and has something to do, and its results
leave at its virtual end, however long this process took to compute them:

    client --Submit--> global scheduler --Dispatch--> inbox
    begin: schedule (+ forward, when its duration is to be measured) -> [virtual duration] -> end: commit -> messages

Between instances a pool's messages take the link's latency, moves what its model says; bytes are copied as they arrive.

At the same nanosecond: who comes and goes, calls, clients, who waited in vain for an instance, then events. Messages to
and from the global scheduler take what `control` says (control.py). A macro-step (a batch repeated `num_steps` times)
is computed only at its end, and a message that reaches the instance meanwhile ends it with the step under way.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from memserve.clock import earliest
from memserve.cluster.control import FREE, ControlCosts, control_plane
from memserve.cluster.emulated_node import Node
from memserve.cluster.event_queue import BEGIN, END, EVICTION, TIMER, Event, EventQueue
from memserve.cluster.manager import ClusterManager, Membership, Starting
from memserve.cluster.peer_mail import PeerMail
from memserve.cluster.pool_feed import PoolFeed
from memserve.cluster.step_time import StepTime
from memserve.cluster.summary import Summary
from memserve.instance import Instance
from memserve.messages import Message
from memserve.request import Role
from memserve.sched.global_scheduler import GlobalScheduler
from memserve.sched.scaling import Change, Crash, NoScaling, Standing
from memserve.transfer.faults import MessageFaults
from memserve.transfer.in_process import InProcess
from memserve.workload.player import SessionPlayer


@dataclass
class EmulatedCluster:
    """Runs `nodes` under `scheduler` for one `client` until every request has ended, and every transfer.

    nodes: those that are there; one that leaves is taken out, one that crashes stays.  transport: of those that send
    KV; it knows them by their place.  faults: of the messages between them.  manager: who comes and goes; None for
    nobody.  build: makes the instance of (label, role, incarnation) that comes.
    """

    nodes: list[Node]
    scheduler: GlobalScheduler
    client: SessionPlayer
    step_time: StepTime
    macro_steps: bool
    transport: InProcess | None = None
    faults: MessageFaults | None = None
    event_delay_ns: int = 0  # of index events on their way to a global scheduler that follows them
    control: ControlCosts = FREE
    manager: ClusterManager | None = None
    build: Callable[[str, Role, int], Instance] | None = None
    now_ns: int = 0
    _queue: EventQueue = field(default_factory=EventQueue)
    _departed: dict[int, Summary] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.control_plane = control_plane(self.scheduler, self.client, self._to_instance, self.control, self.call_at)
        self._feed = PoolFeed(self.scheduler, self.control_plane, self.event_delay_ns, self.call_at)
        for incarnation, node in enumerate(self.nodes):
            node.incarnation = incarnation
            self._feed.follow(node)
        self._by_label = {node.instance.label: node for node in self.nodes}
        self._by_incarnation = dict(enumerate(self.nodes))
        self._mail = PeerMail(self.transport, self._by_incarnation, self._queue)
        roles = [(node.instance.label, node.instance.role) for node in self.nodes]
        self.members = self.manager or ClusterManager(roles, NoScaling(), self.scheduler)

    def advance(self) -> bool:
        """Handles the next event in virtual time; False when nothing is left to do.

        Raises RuntimeError if requests are unfinished and nothing will ever happen to them.
        """
        call_ns, event_ns = self._queue.next_call_ns, self._queue.next_event_ns
        client_ns, patience_ns = self.client.next_time_ns(), self.scheduler.next_time_ns
        move_ns = self._mail.next_move_ns
        if (first_ns := earliest(call_ns, client_ns, patience_ns, event_ns, move_ns)) is None:
            if self.scheduler.num_unfinished:
                raise RuntimeError(f"the cluster stalled with {self.scheduler.num_unfinished} unfinished requests")
            return False
        change_ns = None if self._is_over else self.members.next_time_ns
        if change_ns is not None and change_ns <= first_ns:
            self.now_ns = max(self.now_ns, change_ns)
            self._perform(self.members.decide())
        elif first_ns in (call_ns, client_ns, patience_ns):
            self.now_ns = max(self.now_ns, first_ns)
            self._happens(first_ns, call_ns, client_ns)
        elif first_ns == move_ns and self._queue.is_after(first_ns):
            if (woken := self._mail.run_moves(earliest(call_ns, client_ns, patience_ns, change_ns))) is not None:
                self.now_ns, node = woken
                self._poll(node)
        else:
            self._next_event()
        if self.members.draining:
            self._see_off()
        return True

    def _happens(self, first_ns: int, call_ns: int | None, client_ns: int | None) -> None:
        """A call, what a client says, or the end of a wait for an instance: the first of them."""
        if first_ns == call_ns:
            self._queue.pop_call()()
        elif first_ns == client_ns:
            for submit in self.client.poll(self.now_ns):
                self._to_scheduler(submit)
        else:
            self.scheduler.poll(self.now_ns)
            self._from_scheduler()

    @property
    def _is_over(self) -> bool:
        return self.client.done and not self.scheduler.num_unfinished

    def _next_event(self) -> None:
        event = self._queue.pop_event()
        node, wanted_ns = event.node, self._mail.next_time_ns
        if node.is_gone or (event.kind == TIMER and not self._queue.is_due(event, wanted_ns)):
            return
        self.now_ns = event.time_ns
        if node.is_stopped:
            node.deferred.append((event.kind, event.what))
        else:
            self._handle(event)

    def call_at(self, time_ns: int, call: Callable[[], None]) -> None:
        """Calls `call` at a moment of virtual time, before anything else that happens then: faults on a schedule."""
        self._queue.call_at(max(time_ns, self.now_ns), call)

    def change(self, change: Change) -> None:
        """Adds, drains, switches or crashes an instance now. Raises ValueError for one that is not there, or drains."""
        self._perform(self.members.begin([change], self.now_ns))
        self._see_off()

    def crash(self, label: str) -> None:
        """An instance's process dies now, with all it has; the others, and the global scheduler, get proof of it."""
        self.change(Crash(label))

    def summaries(self) -> list[Summary]:
        """The books of every instance that is there, or has left; of one that crashed nobody has them."""
        here = {node.incarnation: node.summary(self.now_ns) for node in self.nodes if not node.is_gone}
        return [summary for _, summary in sorted((here | self._departed).items())]

    def _perform(self, orders: Sequence[Starting | Crash]) -> None:
        for order in orders:
            if isinstance(order, Starting):
                self.call_at(self.now_ns + order.delay_ns, partial(self._join, order.member))
            else:
                self._crash(order.label)
        self._from_scheduler()

    def _join(self, member: Membership) -> None:
        """An instance is there, unless nobody wants it any more, or it has crashed before."""
        if self._is_over or member.standing is not Standing.STARTING or member.is_doomed:
            return
        assert self.build is not None, "whoever changes a cluster says how to build its instances"
        node = Node(self.build(member.label, member.role, member.incarnation), member.incarnation)
        node.meet(self.nodes, self.now_ns)
        self.nodes.append(node)
        self._by_label[member.label] = self._by_incarnation[member.incarnation] = node
        self._feed.follow(node)
        self.members.joined(member, self.now_ns)
        self._from_scheduler()

    def _see_off(self) -> None:
        """Draining instances leave to others what they have cached, and leave when they have nothing left to do."""
        for member in list(self.members.draining):
            node = self._by_label[member.label]
            if node.is_gone:
                continue
            is_over = node.is_idle and self.members.is_idle(member)
            self._bequeath(node, member, is_last=is_over)
            if is_over and node.is_idle:
                node.instance.check()
                self._departed[member.incarnation] = node.summary(self.now_ns)
                self.nodes = [other for other in self.nodes if other is not node]
                del self._by_label[member.label], self._by_incarnation[member.incarnation]
                orders = self.members.left(member, self.now_ns)
                node.leave(self.transport)
                self._tell_peers(node)
                self._perform(orders)

    def _bequeath(self, node: Node, member: Membership, *, is_last: bool) -> None:
        """What is cached goes to whom the manager names, if it names somebody now."""
        inheritance = None if node.is_stopped else self.members.bequest(member, is_last=is_last)
        if inheritance is not None:
            node.bequeath(inheritance.heir, inheritance.share, self.now_ns)
            self._poll(node)

    def _crash(self, label: str) -> None:
        """Peers get proof at once; the global scheduler after the last message that the instance had sent it."""
        if (node := self._by_label.get(label)) is not None:
            self._interrupt(node)
            node.leave(self.transport)
        self.control_plane.notice(lambda then_ns: self._perform(self.members.lost(label, then_ns)), self.now_ns)
        if node is not None:
            self._tell_peers(node)

    def _tell_peers(self, node: Node) -> None:
        """The others get proof that a node is gone."""
        self._from_scheduler()
        for other in [other for other in self.nodes if not other.is_gone]:
            other.peer_gone(node.incarnation, self.now_ns)
            self._poll(other)

    def stop(self, label: str) -> None:
        """An instance does nothing until `resume`; what it has put on the wire goes on. Nobody is told."""
        node = self._by_label[self.members.present(label).label]
        self._interrupt(node)
        node.is_stopped = True

    def resume(self, label: str) -> None:
        """A stopped instance goes on with everything that has come meanwhile."""
        node = self._by_label[self.members.present(label).label]
        for kind, what in node.resume(self.now_ns):
            self._queue.push(self.now_ns, kind, node, what)
        self._poll(node)

    def _handle(self, event: Event) -> None:
        node = event.node
        if event.kind == BEGIN:
            self._begin(node)
        elif event.kind == TIMER:
            node.timer_ns = None
            self._poll(node)
        elif isinstance(event.what, tuple):
            node.receive_from_peer(*event.what, self.now_ns)
            self._arouse(node)
            self._send(node)
        elif event.what == node.epoch and event.kind == EVICTION:
            self._feed.evict(node, self.now_ns)
            self._queue.set_eviction(node)
        elif event.what == node.epoch:
            node.end(self.now_ns)
            self._send(node)
            self._arouse(node)

    def _poll(self, node: Node) -> None:
        """Lets time pass for a node's swaps and transfers; it may have room, or a request to go on with, since."""
        node.poll(self.now_ns)
        self._arouse(node)
        self._send(node)

    def _begin(self, node: Node) -> None:
        node.begin_is_due = False
        if node.step is not None:  # it began while what it had sent was answered
            self._arouse(node)
            return
        watch = node.look_for_work(self.step_time)
        batch = node.instance.schedule(self.now_ns)
        self._send(node)
        if batch is None:
            node.rest(self.now_ns)
            return
        ends_ns = node.begin(batch, self.now_ns, self.step_time, watch, self.macro_steps)
        self._queue.push(ends_ns, END, node, node.epoch)
        self._queue.set_eviction(node)

    def _deliver(self, node: Node, message: Message) -> None:
        node.instance.receive(message)
        self._arouse(node)

    def _arouse(self, node: Node) -> None:
        """Something is new for a node: an idle one begins a step at this very time, a macro-step under way is cut."""
        if node.step is None and not node.begin_is_due:
            node.begin_is_due = True
            self._queue.push(self.now_ns, BEGIN, node, node.epoch)
        else:
            self._cut(node)

    def _cut(self, node: Node) -> None:
        if (ends_ns := node.cut(self.now_ns)) is not None:
            self._queue.push(ends_ns, END, node, node.epoch)

    def _interrupt(self, node: Node) -> None:
        """A node stops, or is gone, in the middle of a step: of a macro-step, what was before that one is done."""
        self._cut(node)
        node.enter_ended(self.now_ns)
        self._send(node)

    def _send(self, node: Node) -> None:
        for message in node.instance.drain_outbox():
            self._to_scheduler(message)
        self._feed.send(node, self.now_ns)
        self._mail.send(node, self.faults, self.now_ns)
        self._queue.set_timer(node, node.next_time_ns, self.now_ns)

    def _to_scheduler(self, message: Message) -> None:
        self.control_plane.to_scheduler(message, self.now_ns)

    def _from_scheduler(self) -> None:
        self.control_plane.from_scheduler(self.now_ns)

    def _to_instance(self, label: str, message: Message) -> None:
        if (node := self._by_label.get(label)) is not None and not node.is_gone:
            self._deliver(node, message)
