"""Measured: the part of a run that its figures are of: all, or one without its beginning and end. Computes no metric.

# first arrival | ramp-up | from_s ------------------ until_s | drain | last end
#                         [ requests that arrive here count   )       whenever they end
#                         [ tokens, steps, stays count here   )       whosever they are
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from memserve.clock import to_ns, to_s
from memserve.timeline import RequestTimeline

WHOLE_RUN = (  # what a report has of the whole run though a part is measured: nobody kept when it happened
    "num_sessions",
    "workload",
    "turns_over_context",
    "turns_not_sent",
    "tokens.computed_in_vain",
    "tokens.generated_in_vain",
    "transfers",
    "store.num_stores",
    "store.num_stores_left",
    "store.num_blocks",
    "store.num_indexed_blocks",
    "store.num_evicted_blocks",
    "store.received",
    "store.sent",
    "store.skew_received",
    "store.skew_sent",
    "store.dropped_tokens",
    "instances.joined_s",
    "instances.left_s",
    "instances.tokens.computed_in_vain",
    "instances.tokens.generated_in_vain",
    "instances.num_steps",
    "instances.num_evicted_blocks",
    "instances.num_swapped_out_blocks",
    "instances.num_swapped_in_blocks",
    "instances.num_swaps_dropped",
    "instances.num_blocks",
    "instances.num_dram_blocks",
    "instances.peak_used_blocks",
    "instances.peak_used_share",
    "instances.num_indexed_blocks",
    "instances.peak_waiting_handoffs",
    "instances.num_computed",
    "instances.num_generated",
    "membership.joined",
    "membership.left",
    "membership.lost",
    "membership.switched",
    "membership.bequeathed_tokens",
    "membership.bequests_declined",
    "routing.tree_blocks",
    "routing.tree_evicted_blocks",
    "routing.tree_expired_blocks",
    "control",
    "quarantined_blocks",
    "near_ties",
    "makespan_s",
    "wall_s",
)


@dataclass(frozen=True)
class MeasuredPart:
    """[from_ns, until_ns) on the cluster's clock; None: no such bound."""

    from_ns: int | None = None
    until_ns: int | None = None

    @property
    def is_all(self) -> bool:
        return self.from_ns is None and self.until_ns is None

    def has(self, time_ns: int | None) -> bool:
        """Whether it happened then; None: it did not happen."""
        if time_ns is None:
            return False
        began = self.from_ns is None or time_ns >= self.from_ns
        return began and (self.until_ns is None or time_ns < self.until_ns)

    def count(self, times_ns: np.ndarray) -> int:
        """How many of int64 [n] it has."""
        has = np.ones(len(times_ns), dtype=bool)
        if self.from_ns is not None:
            has &= times_ns >= self.from_ns
        if self.until_ns is not None:
            has &= times_ns < self.until_ns
        return int(np.count_nonzero(has))

    def of(self, timelines: Sequence[RequestTimeline]) -> Sequence[RequestTimeline]:
        """The requests that arrived in it; the same object where it is all."""
        return timelines if self.is_all else [timeline for timeline in timelines if self.has(timeline.arrival_ns)]

    def within(self, window: tuple[int, int] | None) -> tuple[int, int] | None:
        """What it has of the window that a run took: no time of one that was over before. None where there is none."""
        if window is None:
            return None
        first_ns, last_ns = window
        from_ns = first_ns if self.from_ns is None else min(max(self.from_ns, first_ns), last_ns)
        return from_ns, last_ns if self.until_ns is None else min(max(self.until_ns, from_ns), last_ns)


ALL = MeasuredPart()


def measured_part(
    timelines: Sequence[RequestTimeline], from_s: float | None = None, until_s: float | None = None
) -> MeasuredPart:
    """Of a run with these requests. from_s, until_s: seconds after the first arrival; None: no such bound."""
    first_ns = min((timeline.arrival_ns for timeline in timelines), default=0)
    from_ns, until_ns = (None if bound_s is None else first_ns + to_ns(bound_s) for bound_s in (from_s, until_s))
    return MeasuredPart(from_ns, until_ns)


def measured_figures(
    part: MeasuredPart, timelines: Sequence[RequestTimeline], span_s: float | None
) -> dict[str, Any] | None:
    """The report's `measured`; None where the figures are of the whole run.

    seconds: that rates are of; less than from from_s to until_s where the run ended before.  num_left_out: requests
    that do not count, and num_left_out_failed, how many of those failed.  whole_run: the figures that are of the whole
    run nevertheless.
    """
    if part.is_all:
        return None
    first_ns = min((timeline.arrival_ns for timeline in timelines), default=0)
    left_out = [timeline for timeline in timelines if not part.has(timeline.arrival_ns)]
    return {
        "from_s": None if part.from_ns is None else to_s(part.from_ns - first_ns),
        "until_s": None if part.until_ns is None else to_s(part.until_ns - first_ns),
        "seconds": span_s,
        "num_requests": len(timelines) - len(left_out),
        "num_left_out": len(left_out),
        "num_left_out_failed": sum(not timeline.succeeded for timeline in left_out),
        "whole_run": list(WHOLE_RUN),
    }
