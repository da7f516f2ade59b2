"""Repeats: several runs of one configuration as one report: the same run again, or one for each of several seeds."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from memserve.metrics.report import Report


def combined(reports: Sequence[Report], seeds: Sequence[int]) -> Report:
    """The report of a configuration's runs: of one the run's own, of several seeds means, else of repeats medians."""
    if len(reports) == 1:
        return reports[0]
    return mean_of(reports, seeds) if len(seeds) > 1 else median_of(reports)


def median_of(reports: Sequence[Report]) -> Report:
    """Several runs of one workload as one report: medians under the same keys, plus `repeats` and `spread`.

    spread: the same tree with {"min", "max"} in place of each figure. A figure that some runs lack (null) is taken over
    those that have it; a key that some lack (a reason under `failures`) counts as 0 there.
    Raises ValueError when there is no report.
    """
    return {**_combined(reports, np.median), "repeats": len(reports), "spread": _spread(reports)}


def mean_of(reports: Sequence[Report], seeds: Sequence[int]) -> Report:
    """Runs of different seeds as one report, as `median_of`, but with means, and with `seeds` in place of `repeats`."""
    return {**_combined(reports, np.mean), "seeds": list(seeds), "spread": _spread(reports)}


def of_what(report: Report) -> str:
    """What a report's figures are of several runs, in words; "" of one run."""
    if "seeds" in report:
        return f"mean of seeds {', '.join(f'{seed:g}' for seed in report['seeds'])}"
    return f"median of {report['repeats']} repeats" if "repeats" in report else ""


def _combined(reports: Sequence[Report], figure: Callable[[list[float]], Any]) -> Report:
    if not reports:
        raise ValueError("reports=[]: expected at least one report")
    tree: Report = _combine(reports, lambda values: float(figure(values)))
    return tree


def _spread(reports: Sequence[Report]) -> Report:
    tree: Report = _combine(reports, lambda values: {"min": min(values), "max": max(values)})
    return tree


def _combine(values: Sequence[Any], figure: Callable[[list[float]], Any]) -> Any:
    """One tree in place of several alike: `figure` of the numbers at each place, strings kept."""
    first = values[0]
    if isinstance(first, dict):
        keys = dict.fromkeys(key for value in values for key in value)
        return {key: _combine([value.get(key, 0) for value in values], figure) for key in keys}
    if isinstance(first, list):
        return [_combine(rows, figure) for rows in _alike(values)]
    if isinstance(first, str):
        assert all(value == first for value in values), "reports of different configurations"
        return first
    numbers = [value for value in values if value is not None]
    return figure(numbers) if numbers else None


def _alike(lists: Sequence[list[Any]]) -> list[list[Any]]:
    """The items of several lists that belong together: those of one `id`, where they have one, else of one place."""
    if all(isinstance(item, dict) and "id" in item for items in lists for item in items):
        ids = dict.fromkeys(item["id"] for items in lists for item in items)
        return [[item for items in lists for item in items if item["id"] == name] for name in ids]
    return [list(items) for items in zip(*lists, strict=True)]
