"""SchedulerCounts: what a local scheduler has done so far."""

from dataclasses import dataclass


@dataclass
class SchedulerCounts:
    """Tokens and events since the scheduler was made. `computed`: tokens prefilled, recomputed ones included.
    `swaps_dropped`: preempted requests that had to be recomputed after all.
    """

    computed: int = 0
    cached: int = 0
    generated: int = 0
    preemptions: int = 0
    swaps_dropped: int = 0
    steps: int = 0
