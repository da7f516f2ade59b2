"""SchedulerCounts: what a local scheduler has done so far."""

from dataclasses import dataclass

from memserve.request import Request


@dataclass
class SchedulerCounts:
    """Tokens and events since the scheduler was made. `computed`: tokens prefilled, recomputed ones included.
    `preemptions`: requests that lost their place or their KV. `swaps_dropped`: those moved to DRAM that had to be
    recomputed after all.
    """

    computed: int = 0
    cached: int = 0
    generated: int = 0
    preemptions: int = 0
    swaps_dropped: int = 0
    steps: int = 0

    def preempted(self, request: Request) -> None:
        """A request runs no longer."""
        request.num_preemptions += 1
        self.preemptions += 1

    def dropped(self, request: Request) -> None:
        """A request that waits with its KV has lost it: one that was swapped, or that came here and has never run."""
        if request.num_preemptions:
            self.swaps_dropped += 1
        else:
            self.preempted(request)
