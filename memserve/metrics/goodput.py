"""Goodput: the requests that succeeded within their objectives, of all and of each class. Computes no latency."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from memserve.metrics.formulas import RequestMetrics, Slo, ratio
from memserve.metrics.latencies import latencies
from memserve.timeline import RequestTimeline

_NO_SLO = Slo()
_NO_CLASSES: Mapping[str, Slo] = {}


def goodput_figures(
    num_requests: int,
    succeeded: Sequence[RequestMetrics],
    slo: Slo,
    classes: Mapping[str, Slo],
    makespan_s: float | None,
) -> dict[str, Any] | None:
    """The requests that succeeded within every objective, of all that there were and in each second; and how many of
    those that succeeded missed which. None where nothing is asked for.

    slo: of requests that are of no class.  classes: the objectives of each class.
    """
    if all(each == _NO_SLO for each in (slo, *classes.values())):
        return None
    missed = [classes.get(metrics.class_name, slo).missed(metrics) for metrics in succeeded]
    num_good = missed.count([])
    return {
        "slo": asdict(slo),
        "num_good": num_good,
        "share": ratio(num_good, num_requests),
        "requests_per_s": ratio(num_good, makespan_s),
        "missed": {name: sum(name in names for names in missed) for name in asdict(slo)},
    }


def class_figures(
    timelines: Sequence[RequestTimeline],
    succeeded: Sequence[RequestMetrics],
    classes: Mapping[str, Slo],
    makespan_s: float | None,
) -> dict[str, Any] | None:
    """The requests of each class by themselves; None where there are no classes."""
    num_requests = Counter(timeline.class_name for timeline in timelines)
    theirs = {name: [metrics for metrics in succeeded if metrics.class_name == name] for name in classes}
    figures = {
        name: {
            "num_requests": num_requests[name],
            "num_finished": len(theirs[name]),
            **latencies(theirs[name]),
            "goodput": goodput_figures(num_requests[name], theirs[name], slo, _NO_CLASSES, makespan_s),
        }
        for name, slo in classes.items()
    }
    return figures or None
