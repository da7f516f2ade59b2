"""Systems side by side on one workload: a column each, over several runs, with their range.

python scripts/compare.py exec=simulated                     # PD, PD-CC, 1P1D, 1P1D-CC, C1, C2 on the chat workload
python scripts/compare.py                                    # the same with the model: 18 runs of 200 answers, slow
python scripts/compare.py --systems pd,1p1d,1p1d_cc exec=simulated workload=synthetic workload.num_turns=3
python scripts/compare.py --systems pd_cc,big:cluster=1p2d+mode=pd_caching_3 seeds=1 workload.rate=2

A system is a word of the table below or NAME:words, joined by "+" (another one before a word that begins with it), as
in two:cluster=1p2d++per_role.decode.sched.max_running=9. Other arguments are words of run.py and hold for all of them.
Where steps take what a cost model says there are three runs of each, with seeds of their own (seeds=3), and figures are
means; where they are measured there are three of the same (repeats=3), and figures are medians. Every run starts from
empty pools; a measured one is preceded by a warm-up that counts nowhere.
"""

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from options import new_directory
from rich.console import Console

from memserve.cluster.local import LocalCluster, check_playable
from memserve.cluster.result import NotWritten
from memserve.compose import load_config
from memserve.config.blame import told
from memserve.config.runs import num_runs
from memserve.config.schema import RunConfig
from memserve.metrics.comparison import print_comparison
from memserve.metrics.progress import Progress
from memserve.metrics.report import Report

NUM_RUNS = 3  # of each system
SYSTEMS = {  # two instances each; the paper's names (section 8.1 and Table 4)
    "pd": ["cluster=colocated_2", "index=none", "policy=session_affinity"],
    "pd_cc": ["cluster=colocated_2", "policy=session_affinity"],
    "1p1d": ["cluster=1p1d", "mode=pd_basic"],
    "c1": ["cluster=1p1d", "mode=pd_caching_1"],
    "c2": ["cluster=1p1d", "mode=pd_caching_2"],
    "1p1d_cc": ["cluster=1p1d", "mode=pd_caching_3"],
}


def words_of(system: str) -> tuple[str, list[str]]:
    """The system's name and its words. Raises ValueError for a name that is in no table, or can be no directory's."""
    name, colon, words = system.partition(":")
    if colon:
        if not name or Path(name).name != name or not words:
            raise ValueError(f"--systems {system}: expected a name that can be a directory's, a colon and words")
        return name, re.split(r"(?<!\+)\+", words)
    if name not in SYSTEMS:
        raise ValueError(f"--systems {name}: expected one of {', '.join(SYSTEMS)}, or NAME:word+word")
    return name, SYSTEMS[name]


def names_of(text: str) -> list[str]:
    """The systems in a text that joins them by commas, of which some may be within a list or a dict."""
    names = [""]
    for part in re.split("(,)", text):
        is_within = sum(names[-1].count(opening) for opening in "[{") > sum(
            names[-1].count(closing) for closing in "]}"
        )
        if part == "," and not is_within:
            names.append("")
        else:
            names[-1] += part
    return names


def words_of_each(systems: Sequence[str]) -> dict[str, list[str]]:
    """The systems' words by their names. Raises ValueError for a name that is in no table, or given twice."""
    named = [words_of(system) for system in systems]
    for name, count in Counter(name for name, _ in named).items():
        if count > 1:
            raise ValueError(f"--systems: {name} is given {count} times: expected a name of its own for each")
    return dict(named)


def config_of(words: Sequence[str]) -> RunConfig:
    """A system's configuration, with several runs where its words say nothing of that."""
    cfg = load_config(words)
    if any(word.lstrip("+").startswith(("seeds=", "repeats=")) for word in words):
        return cfg
    return load_config([*words, f"seeds={NUM_RUNS}" if cfg.step_time == "model" else f"repeats={NUM_RUNS}"])


def plan_of(configured: Mapping[str, RunConfig]) -> str:
    """What is about to run, in a line."""
    runs = sum(map(num_runs, configured.values()))
    plan = f"systems: {len(configured)}, runs in all: {runs}"
    if any(cfg.exec == "emulated" for cfg in configured.values()):
        plan += "; the model computes every step of each: exec=simulated needs none, and takes a small part of the time"
    return plan


def compare(systems: Sequence[str], words: Sequence[str], out: Path | None) -> tuple[dict[str, Report], list[OSError]]:
    """The report of each system, and which files could not be written; out: a directory that gets an output directory
    for each, and reports.json.

    Every system is composed and checked before the first one runs.
    """
    named = words_of_each(systems)
    configured = dict[str, RunConfig]()
    for name, own in named.items():
        try:
            configured[name] = config_of([*own, *words])
            check_playable(configured[name])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    print(plan_of(configured), file=sys.stderr, flush=True)
    reports, not_written = {}, list[OSError]()
    for name, cfg in configured.items():
        try:
            with Progress(name) as progress:
                reports[name] = LocalCluster(cfg).run(None if out is None else out / name, progress=progress)
        except NotWritten as error:
            reports[name] = error.report
            not_written.append(error)
    try:
        if out is not None:
            (out / "reports.json").write_text(json.dumps(reports, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        not_written.append(error)
    return reports, not_written


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", default=",".join(SYSTEMS), help="joined by commas")
    parser.add_argument(
        "--out", type=new_directory, help="directory for every system's output directory and reports.json"
    )
    parser.add_argument("words", nargs="*")
    args = parser.parse_intermixed_args(argv)
    try:
        reports, not_written = compare(names_of(args.systems), args.words, args.out)
    except (ValueError, OSError) as error:
        sys.exit(told(error))
    width = 30 if len(reports) < 5 else 22  # of a column: a figure and its range, in a line if there are few
    console = Console(width=max(100, width * len(reports) + 26))
    print_comparison(reports, " ".join(args.words) or "defaults", console)
    if not_written:
        sys.exit("\n".join(f"error: {error}" for error in not_written))


if __name__ == "__main__":
    main(sys.argv[1:])
