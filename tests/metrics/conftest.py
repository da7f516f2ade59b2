"""Timelines made of plain numbers: one unit is a second."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from memserve.clock import to_ns
from memserve.request import FinishReason
from memserve.request_stats import RequestStats
from memserve.timeline import RequestTimeline

MakeTimeline = Callable[..., RequestTimeline]


@pytest.fixture
def make_timeline() -> MakeTimeline:
    def make(
        request_id: str = "s0/0",
        arrival: float = 0.0,
        queued: float = 0.5,
        scheduled: float | None = 1.0,
        token_times: Sequence[float] = (2.0, 3.0, 5.0),
        finished: float | None = 5.0,
        reason: FinishReason | None = FinishReason.LENGTH,
        instance: str = "colocated-0",
        num_prompt: int = 100,
        num_cached: int = 40,
        num_computed: int = 60,
        num_preemptions: int = 0,
    ) -> RequestTimeline:
        timeline = RequestTimeline(request_id, request_id.split("/")[0], to_ns(arrival), num_prompt)
        timeline.dispatched_ns, timeline.instance, timeline.reason = to_ns(arrival), instance, reason
        timeline.finished_ns = None if finished is None else to_ns(finished)
        times_ns = np.array([to_ns(t) for t in token_times], dtype=np.int64)
        for k in range(len(times_ns)):
            timeline.add_tokens(np.array([10 + k], dtype=np.int32), times_ns[k : k + 1])
        timeline.stats = RequestStats(
            instance=instance,
            queued_ns=to_ns(queued),
            first_scheduled_ns=None if scheduled is None else to_ns(scheduled),
            prefill_end_ns=int(times_ns[0]) if len(times_ns) else None,
            num_prompt=num_prompt,
            num_cached_local=num_cached,
            num_computed=num_computed,
            num_generated=len(times_ns),
            num_preemptions=num_preemptions,
        )
        return timeline

    return make
