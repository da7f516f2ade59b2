"""Sweep: `run.py -m`: each point in a fresh child process, in its own directory; then a table of all of them.

A point that is done already, with the same configuration, is not run again, so a sweep that was interrupted goes on
when it is started with the same `hydra.sweep.dir`. One that fails leaves its reason there and does not stop the others.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from memserve.cluster.roster import Roster
from memserve.compose import to_yaml
from memserve.config.schema import RunConfig
from memserve.metrics.report import Report
from memserve.metrics.table import print_points

_REPORT, _CONFIG, _LOG = "report.json", "config.yaml", "printed.log"


def run_point(cfg: RunConfig, script: Path, words: Sequence[str], directory: Path) -> int:
    """Runs one point in a process of its own, under torchrun if it is distributed; what it printed is in a file.

    Returns its exit status; 0 without running where the same configuration has its report already.
    """
    if is_done(cfg, directory):
        print(f"{directory.name}: done before")
        return 0
    launcher = [sys.executable]
    if cfg.exec == "distributed":
        num_ranks = Roster.of(cfg).world_size
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / _LOG).open("w", encoding="utf-8") as printed:
        quoted = str(directory).replace("'", "\\'")  # Hydra reads "=" and "," in a bare value
        command = [*launcher, str(script), *words, f"hydra.run.dir='{quoted}'"]
        status = subprocess.run(command, stdout=printed, stderr=subprocess.STDOUT, check=False).returncode
    outcome = "done" if status == 0 else f"failed with status {status}, see {directory / _LOG}"
    print(f"{directory.name}: {outcome}", flush=True)
    return status


def is_done(cfg: RunConfig, directory: Path) -> bool:
    """Whether this configuration's report is there: it is written last."""
    config = directory / _CONFIG
    return (directory / _REPORT).is_file() and config.is_file() and config.read_text() == to_yaml(cfg)


class SweepTable(Callback):
    """Hydra's callback at a sweep's end: a row for each point of the sweep's directory."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Prints the table, and where to look for the reason of points without a report."""
        directory = Path(config.hydra.sweep.dir)
        reports: dict[str, Report] = {}
        failed = []
        for point in sorted(path for path in directory.iterdir() if path.is_dir()):
            if (point / _REPORT).is_file():
                reports[point.name] = json.loads((point / _REPORT).read_text())
            else:
                failed.append(point.name)
        shared = set.intersection(*(set(name.split(",")) for name in reports)) if len(reports) > 1 else set()
        print_points({_without(name, shared): report for name, report in reports.items()}, str(directory))
        for name in failed:
            print(f"{name}: no report, see {directory / name / _LOG}")


def _without(name: str, shared: set[str]) -> str:
    """A point's name without the words that all points have."""
    return ",".join(word for word in name.split(",") if word not in shared)
