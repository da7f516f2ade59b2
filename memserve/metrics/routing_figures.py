"""Routing in figures: what the prompt trees promised, what the instances then had, and how evenly requests were spread.

# a request's prompt: [0, promised) the tree said its instance has | [0, found) was in its index at admission
# promised > found is a wrong hit; promised - found tokens were computed that the choice had counted on reusing
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from memserve.metrics import formulas
from memserve.request import TAKING
from memserve.timeline import RequestTimeline


def routing_figures(
    timelines: Sequence[RequestTimeline], rows: Sequence[Mapping[str, Any]], tree_counts: Mapping[str, int]
) -> dict[str, Any]:
    """The report's `routing`. rows: its `instances`.  tree_counts: of the global scheduler's trees at the end.

    wrong_hit_ratio is of the requests that were promised anything. Skews are largest over mean among the instances that
    take requests: of the requests each began, and of the prompt tokens each had to compute.  soonest_ratio and
    mean_regret_s are by the cost model, whatever the policy looks at.
    """
    begun = [
        (timeline.num_promised, stats.num_cached_local)
        for timeline in timelines
        if (stats := timeline.stats) is not None and stats.first_scheduled_ns is not None
    ]
    missing = [promised - found for promised, found in begun if promised > found]
    num_promised = sum(promised > 0 for promised, _ in begun)
    takers = [row for row in rows if row["role"] in TAKING]
    return {
        "promised_tokens": sum(promised for promised, _ in begun),
        "num_promised": num_promised,
        "wrong_hits": len(missing),
        "wrong_hit_ratio": formulas.ratio(len(missing), num_promised),
        "wrong_hit_tokens": sum(missing),
        **_predicted(timelines),
        "skew_requests": formulas.skew([row["num_requests"] for row in takers]),
        "skew_computed_tokens": formulas.skew([row["tokens"]["computed"] for row in takers]),
        **tree_counts,
    }


def _predicted(timelines: Sequence[RequestTimeline]) -> dict[str, float | None]:
    """Of each request's first choice: the share that went where its first token was predicted soonest, and by how much
    it was predicted later than there, in the mean.
    """
    regrets = [t.routes[0].regret_s for t in timelines if t.routes]
    known = np.array([regret for regret in regrets if regret is not None])
    soonest = int(np.count_nonzero(known < 1e-9))
    return {
        "soonest_ratio": formulas.ratio(soonest, len(known)),
        "mean_regret_s": float(known.mean()) if len(known) else None,
    }
