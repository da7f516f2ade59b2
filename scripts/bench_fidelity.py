"""How near a simulation is to what it stands for: the same requests played for real and by costs that were measured.

python scripts/profile_cost_model.py --out costs.json model.path=DIR model.num_threads=1
python scripts/bench_fidelity.py --costs costs.json --rates 1,2,4 model.path=DIR model.num_threads=1
python scripts/bench_fidelity.py --costs costs.json --rates 1,2 --systems pd_cc,1p1d_cc --processes model.path=DIR

Every system (compare.py's words) is played at every rate both ways, the first of them --repeats times, in turn:

measured    exec=emulated: the real model, each step as long as it took; with --processes a process each under torchrun,
            by the wall clock, which adds messages, threads and two processes on one core
simulated   exec=simulated tokens=workload: no model, each step as long as the costs say

Printed for each figure: its median over the repeats, half their range over it (noise: no simulation is nearer), and how
far the simulation is off. What is compared must be the same requests: prompts and answers of other lengths are refused,
so a workload is to say how long answers are (synthetic does). Other arguments are words of run.py.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median

import msgspec
from compare import names_of, words_of_each
from options import integer, new_file
from rich.console import Console
from rich.table import Table

from memserve.cluster.local import LocalCluster, check_playable
from memserve.cluster.sweep import launcher_of
from memserve.compose import load_config
from memserve.config.overrides import quoted
from memserve.metrics.comparison import value_at
from memserve.metrics.figure_text import format_figure
from memserve.metrics.output import environment
from memserve.metrics.progress import Progress
from memserve.metrics.report import Report
from memserve.sched.cost_model.fitted import CostFile, load_cost_file

WORDS = ["workload=synthetic", "workload.num_sessions=40", "workload.num_turns=3", "workload.prompt_tokens=120",
         "workload.turn_tokens=30", "workload.max_output_tokens=32", "workload.think_time_s=0.5"]  # fmt: skip
REAL, PROCESSES = ["exec=emulated", "step_time=measured"], ["exec=distributed", "transport=mapped"]
SIMULATED = ["exec=simulated", "tokens=workload"]
FIGURES = {
    "TTFT mean": ("ttft_s", "mean"),
    "TTFT P50": ("ttft_s", "p50"),
    "TTFT P99": ("ttft_s", "p99"),
    "TPOT mean": ("tpot_s", "mean"),
    "TPOT P99": ("tpot_s", "p99"),
    "JCT mean": ("jct_s", "mean"),
    "JCT P99": ("jct_s", "p99"),
    "tokens/s": ("throughput", "output_tokens_per_s"),
}
RUN = Path(__file__).with_name("run.py")

Point = tuple[str, float]  # a system at a rate of sessions a second
Sizes = dict[str, tuple[int, int]]  # tokens of each request's prompt and answer


@dataclass(frozen=True)
class Played:
    """One run."""

    report: Report
    sizes: Sizes


@dataclass(frozen=True)
class Off:
    """A figure of one point. measured: median of the repeats.  noise, off: shares of it; of one repeat nobody knows."""

    measured: float
    noise: float | None
    simulated: float

    @property
    def off(self) -> float:
        return self.simulated / self.measured - 1


def words_for_simulation(costs: CostFile) -> list[str]:
    """What stands for the model that was measured beside its costs: what its KV weighs on a link.

    Raises ValueError for a file that names no model's sizes.
    """
    if not costs.subject.shape:
        raise ValueError("--costs: the file names no model's sizes, expected one of scripts/profile_cost_model.py")
    sizes = [f"geometry.{name}={costs.subject.shape[name]}" for name in ("num_layers", "num_kv_heads", "head_dim")]
    return [*SIMULATED, "geometry=llama3_8b", *sizes, f"geometry.dtype={costs.subject.dtype}"]


def play(words: Sequence[str], directory: Path) -> Played:
    """In this process."""
    with Progress(directory.name) as progress:
        LocalCluster(load_config(words)).run(directory, progress=progress)
    return played(directory)


def play_as_processes(words: Sequence[str], directory: Path) -> Played:
    """Under torchrun. Raises RuntimeError with the last it said if it fails."""
    command = [*launcher_of(load_config(words)), str(RUN), *words, f"hydra.run.dir={quoted(str(directory))}"]
    print(f"{directory.name}: under torchrun", file=sys.stderr, flush=True)
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(f"{' '.join(command)}: {ended.stderr[-2000:]}")
    return played(directory)


def played(directory: Path) -> Played:
    """What a run has left. Raises ValueError if a request has failed."""
    report = json.loads((directory / "report.json").read_text("utf-8"))
    if report["num_failed"]:
        raise ValueError(f"{directory.name}: {report['num_failed']} requests failed: {list(report['failures'])[:3]}")
    lines = (directory / "requests.jsonl").read_text("utf-8").splitlines()
    requests = [json.loads(line) for line in lines]
    return Played(report, {r["request_id"]: (r["num_prompt"], r["num_generated"]) for r in requests})


def check_same(point: Point, real: Sizes, simulated: Sizes) -> None:
    """Raises ValueError for requests that are not the same ones."""
    for request_id in sorted(real.keys() | simulated.keys()):
        sizes, others = real.get(request_id), simulated.get(request_id)
        if sizes != others:
            raise ValueError(f"{point[0]} at {point[1]:g}: {request_id} has {sizes} tokens of prompt and answer where "
                             f"a model runs, {others} simulated: expected the same")  # fmt: skip


def offs_of(runs: Sequence[Played], simulated: Played) -> dict[str, Off]:
    """Every figure that all of them have."""
    offs = {}
    for name, path in FIGURES.items():
        real, other = [value_at(run.report, path) for run in runs], value_at(simulated.report, path)
        if other is not None and None not in real:
            middle = median(real)
            offs[name] = Off(middle, (max(real) - min(real)) / 2 / middle if len(real) > 1 else None, other)
    return offs


def measure(
    points: Mapping[Point, Sequence[str]], costs: CostFile, args: argparse.Namespace, out: Path
) -> dict[Point, dict[str, Off]]:
    """Every point's figures; `points` has its words. All configurations are checked before one is run."""
    real = PROCESSES if args.processes else REAL
    player: Callable[[Sequence[str], Path], Played] = play_as_processes if args.processes else play
    instead = words_for_simulation(costs)
    for words in points.values():
        measured = load_config([*words, *real])
        if not args.processes:
            check_playable(measured)
        check_playable(load_config([*words, *instead]))
    simulated = {point: play([*words, *instead], out / f"{label(point)}-simulated") for point, words in points.items()}
    runs: dict[Point, list[Played]] = {point: [] for point in points}
    for repeat in range(args.repeats):
        for point, words in points.items():
            runs[point].append(player([*words, *real], out / f"{label(point)}-measured-{repeat}"))
            check_same(point, runs[point][-1].sizes, simulated[point].sizes)
    return {point: offs_of(runs[point], simulated[point]) for point in points}


def label(point: Point) -> str:
    return f"{point[0]}-at-{point[1]:g}"


def table_of(found: Mapping[Point, Mapping[str, Off]], title: str) -> Table:
    """A row for each figure of each point, then the mean over all points."""
    table = Table(
        "system, sessions/s", "figure", "measured", "noise", "simulated", "off", title=title, title_justify="left"
    )
    for (system, rate), offs in found.items():
        for i, (name, off) in enumerate(offs.items()):
            table.add_row(
                f"{system}, {rate:g}" if i == 0 else "", name, f"{off.measured:.4g}", format_figure(off.noise, "share"),
                f"{off.simulated:.4g}", f"{100 * off.off:+.1f} %", end_section=i == len(offs) - 1,
            )  # fmt: skip
    for name in FIGURES:
        each = [offs[name] for offs in found.values() if name in offs]
        if each:
            noises = [o.noise for o in each if o.noise is not None]
            off = mean(abs(o.off) for o in each)
            noise = format_figure(mean(noises) if noises else None, "share")
            table.add_row("mean of all", name, "", noise, "", format_figure(off, "share"))
    return table


def rates_of(word: str) -> list[float]:
    """For argparse's type=: numbers above 0, joined by commas."""
    try:
        rates = [float(part) for part in word.split(",")]
    except ValueError:
        rates = [0.0]
    if not all(0 < rate < float("inf") for rate in rates):
        raise argparse.ArgumentTypeError(f"{word}: expected sessions a second above 0, joined by commas")
    return rates


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--costs", type=Path, required=True, help="of scripts/profile_cost_model.py")
    parser.add_argument("--systems", default="pd_cc,1p1d_cc", help="joined by commas; see compare.py")
    parser.add_argument("--rates", type=rates_of, default="1,2", help="sessions a second")
    parser.add_argument("--repeats", type=partial(integer, least=1), default=3)
    parser.add_argument("--processes", action="store_true", help="measure processes under torchrun, by the wall clock")
    parser.add_argument("--json", type=new_file)
    parser.add_argument("words", nargs="*")
    args = parser.parse_intermixed_args(argv)
    try:
        costs = load_cost_file(args.costs)
        by_costs = ["cost_model=fitted", f"cost_model.path={quoted(str(args.costs))}"]
        named = words_of_each(names_of(args.systems))
        points = {
            (name, rate): [*WORDS, *by_costs, *own, *args.words, f"workload.rate={rate:g}"]
            for name, own in named.items()
            for rate in args.rates
        }
        with tempfile.TemporaryDirectory() as out:
            found = measure(points, costs, args, Path(out))
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    clock = "by the wall clock, a process each" if args.processes else "in virtual time, measured steps"
    Console(width=120).print(table_of(found, f"Measured {clock}; simulated by costs of {costs.provenance.written_at}"))
    if args.json is not None:
        figures = {label(p): {n: vars(o) | {"off": o.off} for n, o in offs.items()} for p, offs in found.items()}
        written = {
            "environment": environment({}, sys.argv),
            "costs": msgspec.to_builtins(costs.provenance),
            "figures": figures,
        }
        args.json.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
