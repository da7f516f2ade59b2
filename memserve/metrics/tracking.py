"""Tracking: where a run's figures are sent beside its output directory. NoTracking is the baseline and the default."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from memserve.metrics.report import Report


class Tracking(ABC):
    """A place to send results to."""

    @abstractmethod
    def record(self, config: dict[str, Any], report: Report, directory: Path | None) -> None:
        """Sends one finished run: its resolved configuration and report. directory: its output, if it has one."""


class NoTracking(Tracking):
    """The baseline: results stay in the output directory."""

    def record(self, config: dict[str, Any], report: Report, directory: Path | None) -> None:
        """Sends nothing."""


def flatten_figures(tree: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a report as ("ttft_s/p99", value); members of a list go by their position."""
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from flatten_figures(value, f"{prefix}/{key}" if prefix else str(key))
    elif isinstance(tree, int | float):
        yield prefix, tree
