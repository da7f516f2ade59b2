"""EmulatedCluster: several instances in one process and one virtual time. Knows when; never what is computed.

Every instance has its own timeline. A step begins when its instance is free and has something to do, and its results
leave at its virtual end, however long this process took to compute them:

    client --Submit--> global scheduler --Dispatch--> inbox
    begin: schedule (+ forward, when its duration is to be measured) -> [virtual duration] -> end: commit -> messages

Between instances: a pool's messages take the link's message latency, its moves what the link model says, and a move's
bytes are copied at the moment it arrives.

Events at the same nanosecond: clients first, then what comes from other instances, ends of steps, begins, then in order
of creation. Messages to and from the global scheduler take no virtual time of their own. A macro-step (a batch repeated
`num_steps` times) is computed only at its end, and a message that reaches the instance meanwhile cuts it at the next
boundary between two of its steps.
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from memserve.clock import Stopwatch
from memserve.cluster.emulated_node import Node, Step
from memserve.cluster.index_feed import IndexFeed
from memserve.cluster.step_time import StepTime, StepWatch
from memserve.instance import Instance
from memserve.messages import Finished, Message, PoolMessage, Tokens
from memserve.request import LayerRun, ScheduledBatch, StepOutput
from memserve.sched.global_scheduler import CLIENT, GlobalScheduler
from memserve.transfer.faults import MessageFaults
from memserve.transfer.in_process import InProcess
from memserve.workload.player import SessionPlayer

_PEER, _TIMER, _END, _BEGIN = 0, 1, 2, 3


@dataclass
class EmulatedCluster:
    """Runs `nodes` under `scheduler` for one `client` until every request has ended, and every transfer.

    transport: of the nodes that transfer KV, which are known to it by their place in `nodes`.  faults: of the messages
    between them.
    """

    nodes: list[Node]
    scheduler: GlobalScheduler
    client: SessionPlayer
    step_time: StepTime
    macro_steps: bool
    transport: InProcess | None = None
    faults: MessageFaults | None = None
    event_delay_ns: int = 0  # of index events on their way to a global scheduler that follows them
    now_ns: int = 0
    _events: list[tuple[int, int, int, Node, int | tuple[int, PoolMessage]]] = field(default_factory=list)
    _num_events: int = 0
    _calls: list[tuple[int, int, Callable[[], None]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._by_label = {node.instance.label: node for node in self.nodes}
        self._feed = IndexFeed(self.scheduler, self.nodes, self.event_delay_ns, self.call_at)

    def advance(self) -> bool:
        """Handles the next event in virtual time; False when nothing is left to do.

        Raises RuntimeError if requests are unfinished and nothing will ever happen to them.
        """
        call_ns = self._calls[0][0] if self._calls else None
        client_ns = self.client.next_time_ns()
        event_ns = self._events[0][0] if self._events else None
        times_ns = [time_ns for time_ns in (call_ns, client_ns, event_ns) if time_ns is not None]
        if not times_ns:
            if self.scheduler.num_unfinished:
                raise RuntimeError(f"the cluster stalled with {self.scheduler.num_unfinished} unfinished requests")
            return False
        first_ns = min(times_ns)
        if first_ns == call_ns:
            _, _, call = heapq.heappop(self._calls)
            self.now_ns = max(self.now_ns, first_ns)
            call()
        elif first_ns == client_ns:
            self.now_ns = max(self.now_ns, first_ns)
            for submit in self.client.poll(self.now_ns):
                self._to_scheduler(submit)
        else:
            self._next_event()
        return True

    def _next_event(self) -> None:
        time_ns, kind, _, node, what = heapq.heappop(self._events)
        if node.is_gone or (kind == _TIMER and not self._is_due(node, time_ns)):
            return
        self.now_ns = time_ns
        if node.is_stopped:
            node.deferred.append((kind, what))
        else:
            self._handle(kind, node, what)

    def call_at(self, time_ns: int, call: Callable[[], None]) -> None:
        """Calls `call` at a moment of virtual time, before anything else that happens then: faults on a schedule."""
        self._num_events += 1
        heapq.heappush(self._calls, (max(time_ns, self.now_ns), self._num_events, call))

    def crash(self, label: str) -> None:
        """An instance's process dies now, with all it has; the others, and the global scheduler, get proof of it."""
        node = self._by_label[label]
        assert not node.is_gone, f"{label} is gone already"
        incarnation = self.nodes.index(node)
        node.is_gone, node.step = True, None
        if self.transport is not None:
            self.transport.detach(incarnation)
        self.scheduler.instance_gone(label, self.now_ns)
        self._from_scheduler()
        for other in self.nodes:
            if not other.is_gone:
                self._catch_up(other)
                other.instance.peer_gone(incarnation, self.now_ns)
                self._arouse(other)
                self._send(other)

    def stop(self, label: str) -> None:
        """An instance does nothing until `resume`; what it has put on the wire goes on. Nobody is told."""
        self._by_label[label].is_stopped = True

    def resume(self, label: str) -> None:
        """A stopped instance goes on with everything that has come meanwhile."""
        node = self._by_label[label]
        node.is_stopped = False
        if node.step is not None:
            node.step.ends_ns = np.maximum(node.step.ends_ns, self.now_ns)
        deferred, node.deferred = node.deferred, []
        for kind, what in deferred:
            self._push(self.now_ns, kind, node, what)
        node.timer_ns = None
        self._poll(node)

    def _handle(self, kind: int, node: Node, what: int | tuple[int, PoolMessage]) -> None:
        if kind == _BEGIN:
            self._begin(node)
        elif kind == _TIMER:
            node.timer_ns = None
            self._poll(node)
        elif isinstance(what, tuple):
            self._catch_up(node)
            node.instance.receive_from_peer(*what, self.now_ns)
            self._arouse(node)
            self._send(node)
        elif what == node.epoch:
            self._end(node)

    def _is_due(self, node: Node, time_ns: int) -> bool:
        """Whether anything still waits for a timer; what it was set for may have ended long ago."""
        if time_ns != node.timer_ns:
            return False
        arrives_ns = None if self.transport is None else self.transport.due_ns().get(self.nodes.index(node))
        wanted_ns = [t for t in (node.next_time_ns, arrives_ns) if t is not None]
        if wanted_ns and min(wanted_ns) <= time_ns:
            return True
        node.timer_ns = None
        self._set_timer(node, min(wanted_ns, default=None))
        return False

    def _poll(self, node: Node) -> None:
        """Lets time pass for a node's swaps and transfers; it may have room, or a request to go on with, since."""
        self._catch_up(node)
        node.instance.poll(self.now_ns)
        self._arouse(node)
        self._send(node)

    def _begin(self, node: Node) -> None:
        node.begin_is_due = False
        watch = self.step_time.watch()
        batch = node.instance.schedule(self.now_ns)
        self._send(node)
        if batch is None:
            node.occupancy.offer(self.now_ns)
            return
        output: StepOutput | None = None
        layers_ns: list[int] = []
        if self.step_time.is_measured:
            output = self._forward(node.instance, batch, watch)
            step_ns, layers_ns = watch.stop()
            durations = [step_ns + node.commit_ns]
            layers_ns = [self.now_ns + elapsed_ns for elapsed_ns in layers_ns]
        else:
            if self.macro_steps:
                batch = replace(batch, num_steps=node.max_macro_steps(batch))
            durations = self.step_time.durations_ns(batch)
        node.step = Step.lasting(batch, self.now_ns, durations, output, layers_ns)
        self._push(int(node.step.ends_ns[-1]), _END, node, node.epoch)

    def _forward(self, instance: Instance, batch: ScheduledBatch, watch: StepWatch) -> StepOutput:
        layers = LayerRun(instance.forward_by_layer(batch))
        for _ in layers:
            watch.layer_written()
        return layers.output

    def _end(self, node: Node) -> None:
        step, node.step = node.step, None
        assert step is not None
        if node.instance.handoffs is not None:
            for layer, written_ns in enumerate(step.layers_ns):
                node.instance.handoffs.layer_written(step.batch, layer, written_ns)
            node.activity.sent(node.instance.handoffs.transfers.drain_sent())
        node.busy_ns += self.now_ns - step.start_ns
        if step.output is None:
            node.instance.scheduler.extend(step.batch)
            step.output = node.instance.forward(step.batch)
        node.activity.step(step.batch, step.start_ns, self.now_ns)
        watch = Stopwatch()
        node.instance.commit(step.batch, step.output, step.ends_ns)
        node.commit_ns = watch.stop_ns()
        node.occupancy.offer(self.now_ns)
        self._send(node)
        self._wake(node)

    def _wake(self, node: Node) -> None:
        """Lets an idle instance begin a step at this very time."""
        if node.step is None and not node.begin_is_due:
            node.begin_is_due = True
            self._push(self.now_ns, _BEGIN, node, node.epoch)

    def _deliver(self, node: Node, message: Message) -> None:
        if node.is_gone:
            return
        node.instance.receive(message)
        self._arouse(node)

    def _arouse(self, node: Node) -> None:
        """Something is new for a node: an idle one begins a step, a macro-step under way is cut."""
        if node.step is None:
            self._wake(node)
        elif node.step.batch.num_steps > 1:
            self._cut(node, node.step)

    def _catch_up(self, node: Node) -> None:
        """Those steps of a macro-step that have begun take their blocks, before anything else may take or free some."""
        step = node.step
        if step is not None and step.batch.num_steps > 1:
            num_steps = min(step.num_begun(self.now_ns), step.batch.num_steps)
            node.instance.scheduler.extend(replace(step.batch, num_steps=num_steps))

    def _cut(self, node: Node, step: Step) -> None:
        """Ends a macro-step at the first boundary that is not before now."""
        num_steps = step.num_begun(self.now_ns)
        if num_steps < step.batch.num_steps:
            step.batch = replace(step.batch, num_steps=num_steps)
            step.ends_ns = step.ends_ns[:num_steps]
            node.epoch += 1
            self._push(int(step.ends_ns[-1]), _END, node, node.epoch)

    def _send(self, node: Node) -> None:
        for message in node.instance.drain_outbox():
            self._to_scheduler(message)
        self._feed.send(node, self.now_ns)
        if self.transport is not None:
            self._send_to_peers(node, self.transport)
        self._set_timer(node, node.next_time_ns)

    def _send_to_peers(self, node: Node, transport: InProcess) -> None:
        """Puts a node's messages on the wire, and notes when anybody's moves want attention next."""
        sender = self.nodes.index(node)
        for peer, message in node.instance.drain_peer_outbox():
            due_ns = self.now_ns + transport.link.message_ns
            times = [due_ns] if self.faults is None else self.faults.times_ns(type(message).__name__, due_ns)
            for time_ns in times:
                self._push(time_ns, _PEER, self.nodes[peer], (sender, message))
        for endpoint, due_ns in transport.due_ns().items():
            self._set_timer(self.nodes[endpoint], due_ns)

    def _set_timer(self, node: Node, time_ns: int | None) -> None:
        """Polls a node at time_ns, or before."""
        if time_ns is None:
            return
        time_ns = max(time_ns, self.now_ns)
        if node.timer_ns is None or time_ns < node.timer_ns:
            node.timer_ns = time_ns
            self._push(time_ns, _TIMER, node, 0)

    def _to_scheduler(self, message: Message) -> None:
        self.scheduler.receive(message, self.now_ns)
        self._from_scheduler()

    def _from_scheduler(self) -> None:
        for destination, out in self.scheduler.drain_outbox():
            if destination == CLIENT:
                assert isinstance(out, Tokens | Finished)
                self.client.receive(out, self.now_ns)
            else:
                self._deliver(self._by_label[destination], out)

    def _push(self, time_ns: int, kind: int, node: Node, what: int | tuple[int, PoolMessage]) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (time_ns, kind, self._num_events, node, what))
