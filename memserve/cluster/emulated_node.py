"""Node: an instance in an emulated cluster, its timeline, and the step that it is in. Decides nothing.

begin: a batch, computed at once if its duration is measured, or if its KV leaves by layer -> catch_up, cut: of a
macro-step -> end: commit
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from memserve.clock import MAX_S, Stopwatch, earliest, to_s
from memserve.cluster.step_time import StepTime, StepWatch
from memserve.cluster.summary import Summary, summarize
from memserve.instance import Instance
from memserve.kvcache.head_parts import endpoint_of
from memserve.messages import PoolMessage
from memserve.metrics.activity import Activity
from memserve.metrics.occupancy import Occupancy
from memserve.request import LayerRun, Role, ScheduledBatch, StepOutput
from memserve.transfer.transport import Arrived, Transport


@dataclass
class Step:
    """A step under way. ends_ns: int64 [num_steps]. `output` is there already when the step was computed at its
    beginning, and with it layers_ns: when each layer is written.
    """

    batch: ScheduledBatch
    start_ns: int
    ends_ns: np.ndarray
    output: StepOutput | None
    layers_ns: list[int]

    @classmethod
    def lasting(
        cls,
        batch: ScheduledBatch,
        start_ns: int,
        durations_ns: list[int],
        output: StepOutput | None,
        layers_ns: list[int],
    ) -> "Step":
        """A step of now. Raises ValueError if it ends later than the clock can tell."""
        end_s = to_s(start_ns + sum(durations_ns))
        if end_s > MAX_S:
            raise ValueError(
                f"a step ends {end_s:.3g} s after the run began, by its cost_model: expected within 146 years"
            )
        ends_ns = start_ns + np.cumsum(durations_ns, dtype=np.int64)
        return cls(batch, start_ns, ends_ns, output, layers_ns)

    def num_begun(self, now_ns: int) -> int:
        """Steps of a macro-step that have begun by now; one that ends now is the last of them."""
        return int(np.searchsorted(self.ends_ns, now_ns)) + 1


@dataclass(eq=False)
class Node:
    """An instance and its timeline. incarnation: its number in the cluster.  busy_ns: virtual time spent in steps."""

    instance: Instance
    incarnation: int = 0
    busy_ns: int = 0
    step: Step | None = None
    begin_is_due: bool = False
    epoch: int = 0  # grows when a step's end moves, so that its old end event is ignored
    carried_ns: int = 0  # measured cost of the last commit, and of swaps without a step, charged to the next step
    timer_ns: int | None = None  # the next time at which its swaps or transfers want to be polled
    is_gone: bool = False
    is_stopped: bool = False
    deferred: list[tuple[int, int | tuple[int, PoolMessage]]] = field(default_factory=list)  # events while stopped
    _paid_ns: int = 0  # of the pool's waited_ns, what is in the duration of a step

    def __post_init__(self) -> None:
        self.occupancy = Occupancy(self.instance.label, self.instance.pool)
        self.activity = Activity()

    def begin(
        self, batch: ScheduledBatch, now_ns: int, step_time: StepTime, watch: StepWatch, macro_steps: bool
    ) -> int:
        """A step is under way from now on; returns when it ends. watch: measures it since before it was scheduled."""
        output: StepOutput | None = None
        layers_ns: list[int] = []
        if step_time.is_measured:
            output = self._forward(batch, watch)
            step_ns, layers_ns = watch.stop()
            self._paid_ns = self.instance.pool.waited_ns
            durations, self.carried_ns = [step_ns + self.carried_ns], 0
            layers_ns = [now_ns + elapsed_ns for elapsed_ns in layers_ns]
        else:
            if macro_steps:
                batch = replace(batch, num_steps=self.max_macro_steps(batch))
            durations = step_time.durations_ns(batch, self.instance.role)
            if batch.num_steps == 1 and (layers_ns := self._evenly(batch, now_ns, durations[0], step_time)):
                output = self.instance.forward(batch)
        self.step = Step.lasting(batch, now_ns, durations, output, layers_ns)
        self._announce(batch, layers_ns[:-1])
        return int(self.step.ends_ns[-1])

    def _evenly(self, batch: ScheduledBatch, now_ns: int, step_ns: int, step_time: StepTime) -> list[int]:
        """When each layer is written of a step whose duration alone is known; what was swapped comes before the first.
        Nothing where none leaves by itself.
        """
        handoffs, role = self.instance.handoffs, self.instance.role
        if handoffs is None or not handoffs.asks_at_first_chunk or role is not Role.PREFILL:
            return []
        lasts_ns, num_layers = step_ns, handoffs.transfers.geometry.num_layers
        if batch.num_swapped_blocks:
            lasts_ns = step_time.durations_ns(replace(batch, num_swapped_blocks=0), role)[0]
        begins_ns = now_ns + step_ns - lasts_ns
        return [begins_ns + lasts_ns * (layer + 1) // num_layers for layer in range(num_layers)]

    def _announce(self, batch: ScheduledBatch, layers_ns: Sequence[int]) -> None:
        """Puts a step's first layers on the wire, from when each is written; the last one leaves when the step has
        ended, since what is told with a request's KV is known then.
        """
        if self.instance.handoffs is not None and layers_ns:
            self.instance.handoffs.layers_written(batch, dict(enumerate(layers_ns)))

    def look_for_work(self, step_time: StepTime) -> StepWatch:
        """Times a step from now on, if there is one."""
        self._carry_swaps()
        return step_time.watch()

    def _carry_swaps(self) -> None:
        """What was swapped beside steps, for a peer, say, is the next one's to pay, in measured time.

        By a cost model it is a part of that step's duration anyway.
        """
        waited_ns = self.instance.pool.waited_ns
        self.carried_ns += waited_ns - self._paid_ns
        self._paid_ns = waited_ns

    def _forward(self, batch: ScheduledBatch, watch: StepWatch) -> StepOutput:
        layers = LayerRun(self.instance.forward_by_layer(batch))
        for _ in layers:
            watch.layer_written()
        return layers.output

    def catch_up(self, now_ns: int) -> None:
        """Those steps of a macro-step that have begun take their blocks, before anything else may take or free some."""
        step = self.step
        if step is not None and step.batch.num_steps > 1:
            num_steps = min(step.num_begun(now_ns), step.batch.num_steps)
            self.instance.scheduler.extend(replace(step.batch, num_steps=num_steps))

    def receive_from_peer(self, sender: int, message: PoolMessage, now_ns: int) -> None:
        """A message of another instance's pool comes."""
        self.catch_up(now_ns)
        self.instance.receive_from_peer(sender, message, now_ns)

    def peer_gone(self, incarnation: int, now_ns: int) -> None:
        """There is proof that another instance is gone."""
        self.catch_up(now_ns)
        self.instance.peer_gone(incarnation, now_ns)

    def meet(self, others: Iterable["Node"], now_ns: int) -> None:
        """It comes. Of those that are gone the global scheduler may not know yet, and name them here."""
        for other in others:
            if other.is_gone:
                self.peer_gone(other.incarnation, now_ns)

    def bequeath(self, heir: int, share: float, now_ns: int) -> None:
        """What is cached goes to another instance, if they transfer at all; at most such a share of the blocks."""
        if self.instance.handoffs is not None:
            self.catch_up(now_ns)  # what leaves is held, and no more there for steps to come
            self.instance.handoffs.bequest.begin(heir, share, now_ns)

    def poll(self, now_ns: int) -> None:
        """Lets time pass for its swaps and transfers."""
        self.catch_up(now_ns)
        self.instance.poll(now_ns)

    def next_eviction_ns(self) -> int | None:
        """When a step of the macro-step under way begins that has to evict, if the router is to be told of that."""
        step = self.step
        if step is None or step.batch.num_steps == 1:
            return None
        num_before = self.instance.scheduler.steps_before_eviction(step.batch)
        return int(step.ends_ns[num_before - 1]) if num_before < step.batch.num_steps else None

    def cut(self, now_ns: int) -> int | None:
        """Ends a macro-step at the first boundary that is not before now; returns when, or None if it did before."""
        step = self.step
        num_steps = 0 if step is None else step.num_begun(now_ns)
        if step is None or num_steps >= step.batch.num_steps:
            return None
        step.batch = replace(step.batch, num_steps=num_steps)
        step.ends_ns = step.ends_ns[:num_steps]
        self.epoch += 1
        return int(step.ends_ns[-1])

    def enter_ended(self, now_ns: int) -> None:
        """Those steps of a macro-step that ended before now are over; the others are under way as before."""
        step = self.step
        num_ended = 0 if step is None else int(np.searchsorted(step.ends_ns, now_ns))
        if step is None or not 0 < num_ended < step.batch.num_steps:
            return
        ended_ns, later_ns = step.ends_ns[:num_ended], step.ends_ns[num_ended:]
        later = replace(step.batch, num_steps=len(later_ns), num_swapped_blocks=0)
        step.batch, step.ends_ns = replace(step.batch, num_steps=num_ended), ended_ns
        self.end(int(ended_ns[-1]))
        self.step = Step(later, int(ended_ns[-1]), later_ns, None, [])

    def end(self, now_ns: int) -> None:
        """The step is over: its results are entered, and its messages left in the outbox."""
        step, self.step = self.step, None
        assert step is not None
        if self.instance.handoffs is not None:
            self._announce(step.batch, step.layers_ns)
        self._note_sent()
        self.busy_ns += now_ns - step.start_ns
        if step.output is None:
            self.instance.scheduler.extend(step.batch)
            step.output = self.instance.forward(step.batch)
        self.activity.step(step.batch, step.start_ns, now_ns)
        self._carry_swaps()
        watch = Stopwatch()
        self.instance.commit(step.batch, step.output, step.ends_ns)
        self.carried_ns += watch.stop_ns()
        self._paid_ns = self.instance.pool.waited_ns
        self.occupancy.offer(now_ns)

    def rest(self, now_ns: int) -> None:
        """There is nothing to compute, on a store there never is: what it has sent is noted all the same."""
        self._note_sent()
        self.occupancy.offer(now_ns)

    def _note_sent(self) -> None:
        if self.instance.handoffs is not None:
            self.activity.sent(self.instance.handoffs.transfers.drain_sent())

    def resume(self, now_ns: int) -> list[tuple[int, int | tuple[int, PoolMessage]]]:
        """Goes on after it was stopped; (kind, what) of the events that have come meanwhile."""
        self.is_stopped, self.timer_ns = False, None
        if self.step is not None:
            self.step.ends_ns = np.maximum(self.step.ends_ns, now_ns)
        deferred, self.deferred = self.deferred, []
        return deferred

    def max_macro_steps(self, batch: ScheduledBatch) -> int:
        """As the local scheduler's; 1 while others wait for room here, which they are granted within steps, and of a
        request that goes on elsewhere after this one.
        """
        handoffs = self.instance.handoffs
        if handoffs is not None and handoffs.transfers.has_waiting:
            return 1
        if handoffs is not None and any(handoffs.migrations.is_asked(r.request_id) for r in batch.requests):
            return 1
        return self.instance.scheduler.max_macro_steps(batch)

    def leave(self, transport: Transport | None) -> None:
        """It is there no more, nor are its ranks."""
        self.is_gone, self.step = True, None
        handoffs = self.instance.handoffs
        if transport is not None and handoffs is not None:
            for rank in range(handoffs.transfers.granularity.num_ranks):
                transport.detach(endpoint_of(self.incarnation, rank))

    @property
    def is_idle(self) -> bool:
        """Whether it computes nothing and has nothing to do."""
        return self.step is None and not self.is_stopped and self.instance.is_idle

    def summary(self, now_ns: int) -> Summary:
        """Its books now."""
        return summarize(self.instance, self.busy_ns, self.occupancy, self.activity, now_ns)

    def wants(self, arrived: Arrived) -> bool:
        """Whether it is to be told at once of a move of its own that is over."""
        return self.instance.handoffs is not None and self.instance.handoffs.transfers.wants(arrived)

    @property
    def next_time_ns(self) -> int | None:
        """When a swap or a transfer of this instance wants to be polled."""
        handoffs = self.instance.handoffs
        return earliest(self.instance.pool.next_time_ns, None if handoffs is None else handoffs.next_time_ns())
