"""Capacity: the most load at which a system still answers well, found by bisection; systems side by side.

python scripts/capacity.py --window 60 exec=simulated workload=synthetic slo.ttft_s=.2 slo.tpot_s=.02
python scripts/capacity.py --systems pd_cc,1p1d_cc --share .99 --seeds 0,1,2 --out DIR exec=simulated slo.jct_s=3
python scripts/capacity.py --vary workload.speedup --systems four:cluster=colocated_4 exec=simulated tokens=workload \\
    workload=trace workload.path=FILE slo.ttft_s=10

A load holds when at least `--share` of all requests finish within every objective (`slo.`), of the requests of all
seeds where there are several, each held to the objectives of its class where `workload.classes` has any; other figures
are then means. Loads are doubled or halved from `--start` on until one holds and one does not, then the gap is narrowed
to `--precision`. A queue that grows has an effect only if it has the time, and so many sessions come the sooner the
higher their rate: with `--window S` there are as many as come in S seconds at each load. Of which requests the share
is, `measure.from_s=` and `measure.until_s=` say, as in run.py: `--window 60 measure.from_s=10 measure.until_s=60` is
without the ramp-up, and with as much of the drain as those requests see. Systems are compared by what holds for each
rank of their instances (`cluster.tensor_parallel`), a GPU. Systems and words are those of compare.py.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import matplotlib.figure
from compare import SYSTEMS, names_of, words_of_each
from options import integers, new_directory
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from memserve.cluster.local import LocalCluster, check_playable
from memserve.compose import load_config
from memserve.config.blame import told
from memserve.config.per_role import num_ranks
from memserve.config.schema import RunConfig
from memserve.metrics.figure_text import format_figure
from memserve.metrics.repeats import mean_of
from memserve.metrics.report import Report
from memserve.request import SERVING
from memserve.values import require_int, require_number
from memserve.workload.classes import OBJECTIVES

RATE = "workload.rate"
DOUBLINGS = 12  # away from the start
WIDTH = 120  # columns of the table
SHORT = 5  # times what a request takes: then the last one comes before many have ended
_DIGITS = 3  # of a load that is tried


@dataclass(frozen=True)
class Question:
    """What is asked of every system. vary: the option that is the load.  share: of requests that must be good.

    start: the first load tried.  precision: of the answer, relative.  window_s: seconds in which sessions come; None:
    as the words say.  words: of run.py, for all systems.
    """

    vary: str
    share: float
    start: float
    precision: float
    seeds: Sequence[int]
    window_s: float | None
    words: Sequence[str]

    def at(self, load: float) -> list[str]:
        """The words of a load."""
        come = [] if self.window_s is None else [f"workload.num_sessions={math.ceil(load * self.window_s)}"]
        return [*self.words, f"{self.vary}={load!r}", *come]

    def __post_init__(self) -> None:
        require_number("--share", self.share, "a number in (0, 1]", minimum=0.0, maximum=1.0, exclusive=True)
        require_number("--start", self.start, "a number > 0", minimum=0.0, exclusive=True)
        require_number("--precision", self.precision, "a number in [0.01, 10]", minimum=0.01, maximum=10.0)
        if self.window_s is not None:
            require_number("--window", self.window_s, "seconds > 0", minimum=0.0, exclusive=True)
            if self.vary != RATE:
                raise ValueError(f"--window={self.window_s} contradicts --vary={self.vary}: expected {RATE}")
        for seed in self.seeds:
            require_int("--seeds", seed, 0)
        ours = {self.vary: "--vary", "seed": "--seeds", "seeds": "--seeds"}
        if self.vary == "seed":
            raise ValueError("--vary=seed: expected an option that is a load; --seeds says which seeds")
        for word in self.words:
            if (option := ours.get(word.partition("=")[0].lstrip("+"))) is not None:
                raise ValueError(f"{word} contradicts {option}, which says that: expected one of them")


@dataclass
class Capacity:
    """What was found of one system: `holds`, the largest load that did; `fails`, the smallest above it that did not.

    None: no load did, or all that were tried. reports: of every load that was tried.  num_ranks: of the instances that
    serve requests; a rank stands for a GPU.
    """

    num_ranks: int
    holds: float | None = None
    fails: float | None = None
    reports: dict[float, Report] = field(default_factory=dict)


def narrow(
    holds: Callable[[float], bool], start: float, precision: float, doublings: int = DOUBLINGS
) -> tuple[float | None, float | None]:
    """A load that holds and one that does not, whose ratio is at most 1 + precision, a load being tried but once.

    Takes it that what holds at a load holds at lower ones. One of the two is None if it is further away than so many
    doublings.
    """
    good = bad = None
    load = start
    for _ in range(doublings + 1):
        if holds(load):
            good, load = load, 2 * load
        else:
            bad, load = load, load / 2
        if good is not None and bad is not None:
            break
    while good is not None and bad is not None and bad > good * (1 + precision):
        load = float(f"{math.sqrt(good * bad):.{_DIGITS}g}")
        if load in (good, bad):
            break
        good, bad = (load, bad) if holds(load) else (good, load)
    return good, bad


class Search:
    """One system: its words, and what its runs came to."""

    def __init__(self, name: str, words: Sequence[str], asked: Question) -> None:
        self._name, self._words, self._asked = name, words, asked
        cfg = self._config(asked.start, asked.seeds[0])
        check_playable(cfg)
        self._found = Capacity(sum(num_ranks(cfg, role) for role in cfg.cluster.roles if role in SERVING))

    def run(self) -> Capacity:
        found, asked = self._found, self._asked
        found.holds, found.fails = narrow(self._holds, asked.start, asked.precision)
        return found

    def _holds(self, load: float) -> bool:
        reports = [LocalCluster(self._config(load, seed)).run() for seed in self._asked.seeds]
        report = self._found.reports[load] = together(reports, self._asked.seeds)
        if report["measured"] is not None and not report["num_requests"]:
            raise ValueError(f"{self._name} at {load:g}: no request arrived between measure.from_s= and "
                             "measure.until_s=: expected some at every load, as with a longer --window")  # fmt: skip
        print(f"{self._name} at {load:g}: {format_figure(share_of(report), 'share')} good", flush=True)
        return share_of(report) >= self._asked.share

    def _config(self, load: float, seed: int) -> RunConfig:
        vary = self._asked.vary
        try:
            cfg = load_config([*self._words, *self._asked.at(load), f"seed={seed}"])
        except ValueError as error:
            if f"Could not override '{vary}'" in str(error):
                raise ValueError(f"--vary={vary}: expected an option that {self._name} has (a trace's load is "
                                 "workload.speedup)") from error  # fmt: skip
            raise
        theirs = [vars(cfg.slo), *(cfg.workload.get("classes") or ())]
        if all(each.get(name) is None for each in theirs for name in OBJECTIVES):
            raise ValueError("slo: expected at least one of slo.ttft_s=, slo.tpot_s=, slo.itl_s=, slo.jct_s= in "
                             "seconds, or one of a class in workload.classes")  # fmt: skip
        return cfg


def together(reports: Sequence[Report], seeds: Sequence[int]) -> Report:
    """A load's runs, one a seed, as one report: means, but for the share of good answers, which is of all requests."""
    report = mean_of(reports, seeds)
    num_requests = sum(each["num_requests"] for each in reports)
    share = sum(each["goodput"]["num_good"] for each in reports) / num_requests if num_requests else None
    return {**report, "goodput": {**report["goodput"], "share": share}}


def share_of(report: Report) -> float:
    """The share of good answers; 0 of no request at all."""
    return report["goodput"]["share"] or 0.0


def table_of(found: Mapping[str, Capacity], vary: str) -> Table:
    """A row for each system: the load that holds and what it is like there, and what goes wrong above it."""
    table = Table(title=f"most {vary}", title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    table.add_column("system")
    for heading in ("holds", "a rank", "of the first", "good", "good/s", "TTFT P90", "TPOT P90", "hits", "fails"):
        table.add_column(heading, justify="right")
    first = next(iter(found.values()))
    for name, capacity in found.items():
        table.add_row(name, *_cells(capacity, first), _failure(capacity))
    return table


def _cells(capacity: Capacity, first: Capacity) -> list[str]:
    """first: of the system that each rank's load is compared with."""
    load = capacity.holds
    if load is None:
        return ["none", *["-"] * 7]
    report = capacity.reports[load]
    ratio = load / capacity.num_ranks / (first.holds / first.num_ranks) if first.holds else None
    return [
        f"{load:g}" if capacity.fails is not None else f">= {load:g}",
        format_figure(load / capacity.num_ranks, "number"),
        format_figure(ratio, "number"),
        format_figure(report["goodput"]["share"], "share"),
        format_figure(report["goodput"]["requests_per_s"], "number"),
        format_figure(report["ttft_s"]["p90"], "seconds"),
        format_figure(report["tpot_s"]["p90"], "seconds"),
        format_figure(report["hit_ratio"], "share"),
    ]


def _failure(capacity: Capacity) -> str:
    """The smallest load that does not hold, how far from it, and by what the most requests missed."""
    if capacity.fails is None:
        return "nothing tried"
    report = capacity.reports[capacity.fails]
    missed: dict[str, float] = {**report["goodput"]["missed"], "failed": report["num_failed"]}
    most = max(missed, key=lambda name: missed[name])
    return f"{capacity.fails:g}: {format_figure(share_of(report), 'share')}, {most.removesuffix('_s')}"


def too_short(found: Mapping[str, Capacity], asked: Question) -> Iterator[str]:
    """What to say of systems whose sessions had all come before much was answered: more load would be as good."""
    for name, capacity in found.items():
        if asked.vary != RATE or capacity.holds is None:
            continue
        report = capacity.reports[capacity.holds]
        came_s, jct_s = report["num_sessions"] / capacity.holds, report["jct_s"]["mean"] or 0.0
        if came_s < SHORT * jct_s:
            came, takes = format_figure(came_s, "seconds"), format_figure(jct_s, "seconds")
            yield f"{name}: all sessions came within {came}, and a request takes {takes}: try a longer --window"


def drawn(found: Mapping[str, Capacity], asked: Question) -> matplotlib.figure.Figure:
    """The share of good answers at each load, a line a system."""
    picture = matplotlib.figure.Figure(figsize=(6, 4), layout="constrained")
    panel = picture.subplots()
    for name, capacity in found.items():
        loads = sorted(capacity.reports)
        panel.plot(loads, [share_of(capacity.reports[load]) for load in loads], "o-", label=name)
    panel.axhline(asked.share, linestyle="--", color="gray")
    panel.set(xscale="log", xlabel=asked.vary, ylabel="share of good answers", ylim=(0, 1.02))
    panel.legend(fontsize="small")
    return picture


def write(found: Mapping[str, Capacity], asked: Question, out: Path) -> None:
    """capacity.json, every load's report in it, and capacity.png."""
    systems = {
        name: {
            "num_ranks": capacity.num_ranks,
            "holds": capacity.holds,
            "fails": capacity.fails,
            "points": [{"load": load, "report": capacity.reports[load]} for load in sorted(capacity.reports)],
        }
        for name, capacity in found.items()
    }
    drawn(found, asked).savefig(out / "capacity.png", dpi=120)
    (out / "capacity.json").write_text(json.dumps({**asdict(asked), "systems": systems}, indent=2) + "\n", "utf-8")
    print(f"written to {out}")


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", default=",".join(SYSTEMS), help="joined by commas")
    parser.add_argument("--vary", default=RATE, help="the option that is the load; else %(default)s")
    parser.add_argument("--share", type=float, default=0.9, help="of requests that must be good; else %(default)s")
    parser.add_argument("--start", type=float, default=1.0, help="the first load tried; else %(default)s")
    parser.add_argument("--precision", type=float, default=0.05, help="of what is found, relative; else %(default)s")
    parser.add_argument("--seeds", type=integers, default=[0], help="joined by commas; else 0")
    parser.add_argument("--window", type=float, help="seconds in which sessions come, however many that makes")
    parser.add_argument("--out", type=new_directory, help="directory for capacity.json and capacity.png")
    parser.add_argument("words", nargs="*")
    args = parser.parse_intermixed_args(argv)
    try:
        asked = Question(args.vary, args.share, args.start, args.precision, args.seeds, args.window, args.words)
        searches = [(name, Search(name, own, asked)) for name, own in words_of_each(names_of(args.systems)).items()]
        found = {name: search.run() for name, search in searches}
        console = Console(width=WIDTH)
        console.print(table_of(found, asked.vary))
        for line in too_short(found, asked):
            console.print(line, highlight=False)
        if args.out is not None:
            write(found, asked, args.out)
    except (ValueError, OSError) as error:
        sys.exit(told(error))


if __name__ == "__main__":
    main(sys.argv[1:])
