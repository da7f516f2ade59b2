"""Sweep: `run.py -m`: each point in a fresh child process, in its own directory; then a table of all of them.

A point's directory stands directly in `hydra.sweep.dir` and is named by the point's words, as far as a file system
takes them; the words themselves are in a file there. A point that is done already, with the same configuration, is not
run again, so a sweep that was interrupted goes on when it is started with the same `hydra.sweep.dir`. One that fails
leaves its reason there and does not stop the others; the sweep's own exit status is then 1. SIGINT or SIGTERM to the
sweep ends the point that runs, too; so does its death (point.py).
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from memserve.cluster.interruption import raised_on_sigterm
from memserve.cluster.roster import Roster
from memserve.compose import resolve, to_yaml
from memserve.config.errors import ConfigError
from memserve.config.overrides import quoted
from memserve.config.schema import RunConfig
from memserve.metrics.comparison import print_points
from memserve.metrics.report import Report

_REPORT, _CONFIG, _LOG, _WORDS = "report.json", "config.yaml", "printed.log", "words.json"
MAX_NAME_BYTES = 200  # of a directory; file systems take 255
_HEED_S = 60.0  # for an interrupted point to end by itself; torchrun gives its ranks 30 seconds


def run_point(
    composed: DictConfig, script: Path, words: Sequence[str], sweep_dir: Path, search: Sequence[str] = ()
) -> int:
    """Runs one point in a process of its own, under torchrun if it is distributed; what it printed is in a file.

    search: words that say where else words are looked for, and name no point. Returns its exit status: 0 without
    running where the same configuration has its report already, 1 where the configuration is refused.
    """
    name, directory = point_name(words), sweep_dir / directory_name(words)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / _WORDS).write_text(json.dumps(sorted(words)) + "\n", encoding="utf-8")
    try:
        cfg = resolve(composed)
        if is_done(cfg, directory):
            print(f"{name}: done before", flush=True)
            return 0
        status = _run(launcher_of(cfg), script, [*words, *search], directory)
    except ValueError as error:
        status = _refuse(error, directory)
    outcome = "done" if status == 0 else f"failed with status {status}, see {directory / _LOG}"
    print(f"{name}: {outcome}", flush=True)
    return status


def point_name(words: Sequence[str]) -> str:
    """A point as people read it: its words, in the alphabet's order."""
    return ",".join(sorted(words)) or "defaults"


def directory_name(words: Sequence[str]) -> str:
    """The point's name as one that every file system takes; a hash tells apart what was replaced or cut off."""
    name = point_name(words)
    safe = re.sub(r"[^\w.,=+@~-]", "_", name, flags=re.ASCII)
    if safe == name and len(safe) <= MAX_NAME_BYTES:
        return name
    mark = sha256(name.encode()).hexdigest()[:8]
    return f"{safe[: MAX_NAME_BYTES - len(mark) - 1]}-{mark}"


def is_done(cfg: RunConfig, directory: Path) -> bool:
    """Whether this configuration's report is there: it is written last."""
    config = directory / _CONFIG
    return (directory / _REPORT).is_file() and config.is_file() and config.read_text("utf-8") == to_yaml(cfg)


def launcher_of(cfg: RunConfig) -> list[str]:
    """What starts a script for this configuration, as a child of this process that does not outlive it.

    Raises ConfigError where each member is started by itself.
    """
    point = [sys.executable, "-m", "memserve.cluster.point", str(os.getpid())]
    if cfg.exec != "distributed":
        return point
    if cfg.cluster.store is not None:
        raise ConfigError(
            f"cluster.store={cfg.cluster.store} contradicts a sweep: expected one torchrun for each point"
        )
    num_ranks = Roster.of(cfg).world_size
    return [*point, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]


def _run(launcher: Sequence[str], script: Path, words: Sequence[str], directory: Path) -> int:
    """The child's exit status. An earlier run's report goes first: it says nothing of this one, should it fail."""
    (directory / _REPORT).unlink(missing_ok=True)
    command = [*launcher, str(script), *words, f"hydra.run.dir={quoted(str(directory))}"]
    with (directory / _LOG).open("w", encoding="utf-8") as printed, raised_on_sigterm():
        child = subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT)
        try:
            return child.wait()
        finally:
            if child.returncode is None:  # the sweep is interrupted, and its point with it
                _end(child)


def _end(child: subprocess.Popen[bytes]) -> None:
    child.terminate()
    try:
        child.wait(_HEED_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _refuse(error: ValueError, directory: Path) -> int:
    """Leaves the reason where a run would have; the exit status that a run of its own would have had."""
    (directory / _REPORT).unlink(missing_ok=True)
    (directory / _LOG).write_text(f"error: {error}\n", encoding="utf-8")
    return 1


class SweepTable(Callback):
    """Hydra's callback at a sweep's end: a row for each point of the sweep's directory."""

    def __init__(self) -> None:
        self._any_failed = False

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Remembers whether a point failed. One that raised ends the sweep by itself."""
        self._any_failed |= job_return.status is JobStatus.COMPLETED and bool(job_return.return_value)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Prints the table, and where to look for the reason of points without a report.

        Raises SystemExit with status 1 when a point of this sweep failed.
        """
        directory = Path(config.hydra.sweep.dir)
        reports: dict[tuple[str, ...], Report] = {}
        failed = []
        for point in sorted(path.parent for path in directory.glob(f"*/{_WORDS}")):
            words = tuple(json.loads((point / _WORDS).read_text("utf-8")))
            if (point / _REPORT).is_file():
                reports[words] = json.loads((point / _REPORT).read_text("utf-8"))
            else:
                failed.append(f"{point_name(words)}: no report, see {point / _LOG}")
        shared = set.intersection(*map(set, reports)) if len(reports) > 1 else set()
        if reports:
            print_points({_without(words, shared): report for words, report in reports.items()}, str(directory))
        for line in failed:
            print(line)
        if self._any_failed:
            sys.exit(1)


def _without(words: Sequence[str], shared: set[str]) -> str:
    """A point's name without the words that all points have."""
    return point_name([word for word in words if word not in shared])
