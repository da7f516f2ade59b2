"""Output: the directory of a run: requests, occupancy, activity (.jsonl), config.yaml, env.json, report.json.

Knows no metric. Each file appears whole or not at all, and report.json last: where there is a report, the rest is there
too.
"""

import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from memserve.clock import wall_time_s
from memserve.metrics.activity import ActivitySpan, activity_lines, load_activity
from memserve.metrics.measured import ALL, MeasuredPart
from memserve.metrics.occupancy import Sample, load_occupancy, occupancy_lines
from memserve.metrics.records import record_lines
from memserve.metrics.report import Report
from memserve.timeline import RequestTimeline

FILES = ("config.yaml", "requests.jsonl", "occupancy.jsonl", "activity.jsonl", "env.json", "report.json")
PACKAGES = ("memserve", "torch", "transformers", "triton", "numpy", "hydra-core", "msgspec")


def write_output(
    directory: Path | str,
    *,
    config_yaml: str,
    report: Report,
    timelines: Iterable[RequestTimeline],
    occupancy: Iterable[Sample],
    activity: Iterable[ActivitySpan],
    environment: Mapping[str, Any],
    with_tokens: bool = True,
    part: MeasuredPart = ALL,
) -> Path:
    """Writes the six files into `directory`, made if need be. Returns it.

    config_yaml: the resolved configuration as text.  environment: see `environment`.  with_tokens: answers' token ids
    in requests.jsonl, which mean nothing where they are filler.  part: what the report is of.
    Raises OSError if it cannot write there; nothing half-written is left under the final names.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "report.json").unlink(missing_ok=True)  # of an earlier run into the same place
    _write(directory / "config.yaml", [config_yaml])
    _write(directory / "requests.jsonl", record_lines(timelines, with_tokens=with_tokens, part=part))
    _write(directory / "occupancy.jsonl", occupancy_lines(occupancy))
    _write(directory / "activity.jsonl", activity_lines(activity))
    _write(directory / "env.json", [_json(environment)])
    _write(directory / "report.json", [_json(report)])
    return directory


@dataclass(frozen=True)
class RunFiles:
    """What a run left in its output directory. records: of requests.jsonl."""

    directory: Path
    config_yaml: str
    environment: dict[str, Any]
    report: Report
    records: list[dict[str, Any]]
    occupancy: list[Sample]
    activity: list[ActivitySpan]


def load_run(directory: Path | str) -> RunFiles:
    """Raises ValueError for a directory that is not a finished run's, naming the file that is missing or broken."""
    directory = Path(directory)
    missing = [name for name in FILES if not (directory / name).is_file()]
    if missing:
        raise ValueError(f"{directory}: expected the output directory of a finished run, it has no {missing[0]}")
    return RunFiles(
        directory,
        (directory / "config.yaml").read_text(encoding="utf-8"),
        _loaded(directory, "env.json", json.loads),
        _loaded(directory, "report.json", json.loads),
        _loaded(directory, "requests.jsonl", lambda text: [json.loads(line) for line in text.split("\n") if line]),
        load_occupancy(directory),
        _loaded(directory, "activity.jsonl", lambda _: load_activity(directory)),
    )


def _loaded(directory: Path, name: str, load: Callable[[str], Any]) -> Any:
    """What `load` makes of a file's text."""
    try:
        return load((directory / name).read_text(encoding="utf-8"))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{directory / name}: expected what a run wrote ({error})") from error


def environment(seeds: Mapping[str, int], command_line: Sequence[str]) -> dict[str, Any]:
    """What a result depends on beside its configuration: code, versions, machine, threads, seeds, words."""
    return {
        "written_at_unix_s": wall_time_s(),
        "command_line": list(command_line),
        "working_directory": str(Path.cwd()),
        "seeds": dict(seeds),
        "git": git_state(Path(__file__)),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "platform": platform.platform(),
        "cpu": {"model": cpu_model(), "logical_cpus": os.cpu_count(), "usable_cpus": usable_cpus()},
        "threads": {"torch": torch.get_num_threads(), "torch_interop": torch.get_num_interop_threads()},
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def git_state(file: Path) -> dict[str, Any] | None:
    """{"revision", "modified"} of the repository that tracks `file`; None if none does, or there is no git.

    An installed copy lies inside a virtual environment, and that often inside someone's repository, which is not ours.
    """
    if _git(file.parent, "ls-files", "--error-unmatch", file.name) is None:
        return None
    revision = _git(file.parent, "rev-parse", "HEAD")
    if revision is None:
        return None
    changes = _git(file.parent, "status", "--porcelain", "--untracked-files=no")
    return {"revision": revision.strip(), "modified": bool(changes)}


def _git(directory: Path, *arguments: str) -> str | None:
    """What git prints, or None if it fails or is not installed."""
    try:
        done = subprocess.run(["git", *arguments], cwd=directory, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    """The processor's name, as far as the operating system tells."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def usable_cpus() -> int | None:
    """CPUs this process may run on; some systems only know how many there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _write(path: Path, parts: Iterable[str]) -> None:
    """Writes beside `path`, then puts the whole file in its place."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(parts)
        partial.replace(path)
    except OSError as error:
        why = error.strerror or str(error)  # a full disk's does not say where
        raise OSError(error.errno, why, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)
