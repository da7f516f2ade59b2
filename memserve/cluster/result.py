"""Result: what a run leaves, and what is made of several: one report, the output directory, the tracker's record."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from memserve.cluster.make import make
from memserve.compose import to_dict, to_yaml
from memserve.config.runs import seeds_of
from memserve.config.schema import RunConfig
from memserve.metrics.activity import ActivitySpan
from memserve.metrics.measured import measured_part
from memserve.metrics.occupancy import Sample
from memserve.metrics.output import environment, write_output
from memserve.metrics.repeats import combined
from memserve.metrics.report import Report
from memserve.metrics.tracking import Tracking
from memserve.timeline import RequestTimeline


@dataclass(frozen=True)
class Result:
    """One run: its report, every request's timeline in order of submission, the pools and what was done, instance by
    instance.

    missing: instances and spare ranks that were not there at the end, and why: "gone", with proof, or else "silent".
    """

    report: Report
    timelines: list[RequestTimeline]
    occupancy: list[Sample]
    activity: list[ActivitySpan]
    num_threads: Mapping[str, int] = field(default_factory=dict)  # of instances that are processes of their own
    missing: Mapping[str, str] = field(default_factory=dict)


class NotWritten(OSError):
    """A run has ended, and its files cannot be written. report: what it found."""

    def __init__(self, error: OSError, report: Report) -> None:
        super().__init__(*error.args)
        self.filename, self.report = error.filename, report


def finish_runs(cfg: RunConfig, results: Sequence[Result], output_dir: str | Path | None) -> Report:
    """The report; of several repeats the medians, of several seeds the means, and their spread.

    output_dir: where the files go (requests, occupancy and activity: of the last run); None writes none. Raises
    NotWritten, with the report, where they cannot be written; who tracks it has the report by then.
    """
    report, last = combined([result.report for result in results], seeds_of(cfg)), results[-1]
    directory = None if output_dir is None else Path(output_dir)
    try:
        if directory is not None:
            _write(cfg, report, last, directory)
    except OSError as error:
        _track(cfg, report, None)
        raise NotWritten(error, report) from error
    _track(cfg, report, directory)
    return report


def _track(cfg: RunConfig, report: Report, directory: Path | None) -> None:
    tracking: Tracking = make(cfg.tracking)
    tracking.record(to_dict(cfg), report, directory)


def _write(cfg: RunConfig, report: Report, last: Result, directory: Path) -> None:
    recorded = environment({"seed": cfg.seed}, sys.argv)
    if last.num_threads:
        recorded["threads"] = {**recorded["threads"], "instances": dict(last.num_threads)}
    write_output(
        directory,
        config_yaml=to_yaml(cfg),
        report=report,
        timelines=last.timelines,
        part=measured_part(last.timelines, cfg.measure.from_s, cfg.measure.until_s),
        occupancy=last.occupancy,
        activity=last.activity,
        environment=recorded,
        with_tokens=cfg.tokens != "workload",
    )
