"""Node: an instance in an emulated cluster, its timeline, and the step that it is in. Decides nothing."""

from dataclasses import dataclass, field

import numpy as np

from memserve.clock import MAX_S, to_s
from memserve.instance import Instance
from memserve.messages import PoolMessage
from memserve.metrics.activity import Activity
from memserve.metrics.occupancy import Occupancy
from memserve.request import ScheduledBatch, StepOutput


@dataclass
class Step:
    """A step under way. ends_ns: int64 [num_steps]. `output` is there already when the step was measured, and with it
    layers_ns: when each layer was written.
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


@dataclass
class Node:
    """An instance and its timeline. `busy_ns`: virtual time spent in steps."""

    instance: Instance
    busy_ns: int = 0
    step: Step | None = None
    begin_is_due: bool = False
    epoch: int = 0  # grows when a step's end moves, so that its old end event is ignored
    commit_ns: int = 0  # measured cost of the last commit, charged to the next step
    timer_ns: int | None = None  # the next time at which its swaps or transfers want to be polled
    is_gone: bool = False
    is_stopped: bool = False
    deferred: list[tuple[int, int | tuple[int, PoolMessage]]] = field(default_factory=list)  # events while stopped

    def __post_init__(self) -> None:
        self.occupancy = Occupancy(self.instance.label, self.instance.pool)
        self.activity = Activity()

    def max_macro_steps(self, batch: ScheduledBatch) -> int:
        """As the local scheduler's; 1 while others wait for room here, which they are granted within steps."""
        handoffs = self.instance.handoffs
        if handoffs is not None and handoffs.transfers.has_waiting:
            return 1
        return self.instance.scheduler.max_macro_steps(batch)

    @property
    def next_time_ns(self) -> int | None:
        """When a swap or a transfer of this instance wants to be polled."""
        handoffs = self.instance.handoffs
        times = (self.instance.pool.next_time_ns, None if handoffs is None else handoffs.next_time_ns())
        return min((time_ns for time_ns in times if time_ns is not None), default=None)
