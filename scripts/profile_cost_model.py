"""Measures what steps cost on this machine, fits both cost models and saves them; held-out errors beside the noise.

    python scripts/profile_cost_model.py --out costs.json                      # configs/model/smollm2.yaml, minutes
    python scripts/profile_cost_model.py --out costs.json model=tiny --max-context 512
    python scripts/profile_cost_model.py --out gpu.json model.device=cuda model.dtype=bfloat16 model.attention=sdpa
    python scripts/run.py step_time=model cost_model=fitted cost_model.path=costs.json

Words with `=` are run.py's. The steps: one prompt of x cached and y new tokens, several prompts together, decode steps
over batches and context lengths, and decode steps with a chunk of a prompt beside them. Held out are steps with other
x, y and batch sizes than those fitted, drawn at random. Every step is measured --repeats times, and the repeats of all
steps are interleaved in random order, so that a machine that is busy for a while is busy for all alike; a figure is the
median. `noise` is half the distance between the quartiles of a step's repeats, over their median: no model is better.
"""

import argparse
import datetime
import sys
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from step_grid import Case, StepTimer, fitted_cases, held_out_cases, linear_points

from memserve.cluster.build import build_engine
from memserve.cluster.costs import subject_of
from memserve.compose import load_config
from memserve.config.schema import RunConfig
from memserve.model.llama import Llama
from memserve.sched.cost_model.arch import ArchCostModel
from memserve.sched.cost_model.fit import MeasuredStep, fit_arch, fit_operators, relative_errors
from memserve.sched.cost_model.fitted import CostFile, Provenance
from memserve.sched.cost_model.operator import OperatorCostModel


@dataclass(frozen=True)
class Fit:
    """Both models, and what they were fitted to."""

    operator: OperatorCostModel
    arch: ArchCostModel
    steps: list[MeasuredStep]


def measure(timer: StepTimer, cases: list[Case], repeats: int, rng: np.random.Generator) -> list[MeasuredStep]:
    """Every case `repeats` times, in random order; the medians."""
    for case in cases:  # first touches: of memory, of the compiler, of the allocator
        timer.seconds(case)
    times = np.zeros((len(cases), repeats))
    for repeat in track(range(repeats), description=f"{len(cases)} steps"):
        for i in rng.permutation(len(cases)):
            times[i, repeat] = timer.seconds(cases[i])
    low, median, high = np.quantile(times, (0.25, 0.5, 0.75), axis=1)
    spreads = (high - low) / 2 / median
    return [
        MeasuredStep(c.num_cached, c.num_new, float(s), float(d))
        for c, s, d in zip(cases, median, spreads, strict=True)
    ]


def show(fit: Fit, held_out: list[MeasuredStep], console: Console) -> dict[str, float]:
    """Prints the errors by kind of step; returns the mean of each level."""
    table = Table("held-out steps", "number", "noise %", "operator: mean %", "worst %", "arch: mean %", "worst %")
    kinds = {
        "one prompt": [s for s in held_out if len(s.num_new) == 1 and s.num_new[0] > 1],
        "several prompts": [s for s in held_out if len(s.num_new) > 1 and min(s.num_new) > 1],
        "decode": [s for s in held_out if max(s.num_new) == 1],
        "decode and a chunk": [s for s in held_out if max(s.num_new) > 1 and min(s.num_new) == 1],
        "all": held_out,
    }
    means = {}
    for kind, steps in kinds.items():
        if not steps:
            continue
        noise = 100 * float(np.mean([s.spread for s in steps]))
        errors = [100 * np.abs(relative_errors(model, steps)) for model in (fit.operator, fit.arch)]
        means = dict(zip(("operator", "arch"), (float(e.mean()) for e in errors), strict=True))
        table.add_row(kind, str(len(steps)), f"{noise:.1f}", *(f"{x:.1f}" for e in errors for x in (e.mean(), e.max())))
    console.print(table)
    return means


def provenance(cfg: RunConfig, args: argparse.Namespace, held_out: list[MeasuredStep], means: dict) -> Provenance:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    model = cfg.model.path or "random weights"
    noise = 100 * float(np.mean([s.spread for s in held_out]))
    return Provenance(now, model, str(torch.__version__), cfg.kvcache.block_size, args.repeats, noise, means)


def profile(cfg: RunConfig, args: argparse.Namespace, console: Console) -> CostFile:
    """Measures, fits, prints. Raises ValueError for a context that the model does not have."""
    engine = build_engine(cfg)
    assert isinstance(engine.model, Llama)
    if args.max_context > engine.max_context:
        raise ValueError(f"--max-context={args.max_context}: the model's context has {engine.max_context} tokens")
    rng = np.random.default_rng(cfg.seed)
    timer = StepTimer(engine.model, cfg.kvcache.block_size, cfg.model.attention, args.max_context, args.max_batch)
    points = linear_points(args.max_context, args.max_tokens)
    cases = fitted_cases(points, args.max_context, args.max_batch)
    held_out_of = held_out_cases(args.held_out, points[-1], args.max_context, args.max_batch, rng)
    measured = measure(timer, cases + held_out_of, args.repeats, rng)
    steps, held_out = measured[: len(cases)], measured[len(cases) :]
    swap_block_s = timer.swap_block_s(args.repeats)
    fit = Fit(fit_operators(steps, points, swap_block_s), fit_arch(steps, swap_block_s), steps)
    console.print(
        f"{len(steps)} steps fitted; a block of {cfg.kvcache.block_size} swapped in {1e6 * swap_block_s:.0f} us"
    )
    where = provenance(cfg, args, held_out, show(fit, held_out, console))
    subject = subject_of(cfg, engine.model)
    return CostFile(subject, where, fit.operator.arguments(), fit.arch.arguments(), steps, held_out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="as for run.py: model=.., model.num_threads=..")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--held-out", type=int, default=60, help="steps drawn at random to test the fit")
    parser.add_argument("--max-context", type=int, default=2048, help="most tokens of one request")
    parser.add_argument("--max-tokens", type=int, default=2048, help="most new tokens of one step")
    parser.add_argument("--max-batch", type=int, default=16, help="most requests of one step")
    args = parser.parse_args()
    for name, least in (("repeats", 1), ("held_out", 1), ("max_context", 64), ("max_tokens", 64), ("max_batch", 2)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')}={getattr(args, name)}: expected an integer >= {least}")
    console = Console()
    try:
        file = profile(load_config(args.words), args, console)
    except ValueError as error:
        sys.exit(f"error: {error}")
    args.out.write_bytes(msgspec.json.format(msgspec.json.encode(file)))
    console.print(f"written to {args.out}: {msgspec.structs.asdict(file.subject)}")


if __name__ == "__main__":
    main()
