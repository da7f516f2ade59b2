"""Measures what steps cost on this machine, fits both cost models and saves them; held-out errors beside the noise.

    python scripts/profile_cost_model.py --out costs.json                      # configs/model/smollm2.yaml, minutes
    python scripts/profile_cost_model.py --out costs.json model=tiny --max-context 512
    python scripts/profile_cost_model.py --out gpu.json model.device=cuda model.dtype=bfloat16 model.attention=sdpa
    torchrun --nproc-per-node 2 scripts/profile_cost_model.py --out tp2.json   # of the model split over two ranks
    python scripts/run.py step_time=model cost_model=fitted cost_model.path=costs.json

Words with `=` are run.py's. The steps: one prompt of x cached and y new tokens, several prompts together, decode steps
over batches and context lengths, and decode steps with a chunk of a prompt beside them. Held out are steps with other
x, y and batch sizes than those fitted, drawn at random. Every step is measured --repeats times, and the repeats of all
steps are interleaved in random order, so that a machine that is busy for a while is busy for all alike; a figure is the
median. A repeat is as many runs of a step as take --repeat-s, and short ones are run in turn with one and the same
decode step, as pacing.py says. `noise` is half the distance between the quartiles of a step's repeats, over their
median: no model is better.
"""

import argparse
import datetime
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import msgspec
import numpy as np
import torch
import torch.distributed as dist
from options import new_file
from pacing import paced_times
from rich.console import Console
from rich.table import Table
from step_grid import PACE, Case, StepTimer, by_kind, fitted_cases, held_out_cases, linear_points

from memserve.cluster.costs import subject_of
from memserve.cluster.engine import build_engine
from memserve.cluster.launch import is_under_torchrun
from memserve.cluster.worker import Followers, IdleHand, follow
from memserve.compose import load_config
from memserve.config.schema import RunConfig
from memserve.kvcache.copy_engine import NothingToCopy
from memserve.metrics.output import usable_cpus
from memserve.model.llama import Llama
from memserve.model.parallel import LEADER, WHOLE, Shard, default_group
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


def measure(
    timer: StepTimer, cases: list[Case], repeats: int, repeat_s: float, rng: np.random.Generator
) -> list[MeasuredStep]:
    """Every case `repeats` times, in random order; the medians."""
    calls = [partial(timer.seconds, case) for case in cases]
    times = paced_times(calls, partial(timer.seconds, PACE), repeats, repeat_s, rng)
    low, median, high = np.quantile(times, (0.25, 0.5, 0.75), axis=1)
    spreads = (high - low) / 2 / median
    return [
        MeasuredStep(c.num_cached, c.num_new, float(s), float(d))
        for c, s, d in zip(cases, median, spreads, strict=True)
    ]


def show(fit: Fit, held_out: list[MeasuredStep], console: Console) -> dict[str, float]:
    """Prints the errors by kind of step; returns the mean of each level."""
    table = Table("held-out steps", "number", "noise %", "operator: mean %", "worst %", "arch: mean %", "worst %")
    means = {}
    for kind, steps in by_kind(held_out).items():
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


def profile(cfg: RunConfig, args: argparse.Namespace, shard: Shard, console: Console) -> CostFile | None:
    """Measures, fits, prints; None on ranks that only take part. Raises ValueError without a model, and for a context
    that it does not have.
    """
    engine = build_engine(cfg, shard=shard)
    if not isinstance(engine.model, Llama):
        raise ValueError(f"tokens={cfg.tokens}: expected a model, whose steps take time")
    if args.max_context > engine.max_context:
        raise ValueError(f"--max-context={args.max_context}: the model's context has {engine.max_context} tokens")
    make_timer = partial(
        StepTimer, engine.model, cfg.kvcache.block_size, cfg.model.attention, args.max_context, args.max_batch
    )
    if shard.rank != LEADER:
        follow(make_timer().runner, NothingToCopy(), IdleHand())
        return None
    if shard.size == 1:
        return fit_all(cfg, args, engine.model, make_timer(), console)
    followers = Followers(shard, engine.model.device)
    file = fit_all(cfg, args, engine.model, make_timer(followers), console)
    followers.stop()
    return file


def fit_all(cfg: RunConfig, args: argparse.Namespace, model: Llama, timer: StepTimer, console: Console) -> CostFile:
    """What the leader does."""
    rng = np.random.default_rng(cfg.seed)
    points = linear_points(args.max_context, args.max_tokens)
    cases = fitted_cases(points, args.max_context, args.max_batch, rng)
    held_out_of = held_out_cases(args.held_out, points[-1], args.max_context, args.max_batch, rng)
    measured = measure(timer, cases + held_out_of, args.repeats, args.repeat_s, rng)
    steps, held_out = measured[: len(cases)], measured[len(cases) :]
    swap_block_s = timer.swap_block_s(args.repeats)
    fit = Fit(fit_operators(steps, points, swap_block_s), fit_arch(steps, swap_block_s), steps)
    console.print(
        f"{len(steps)} steps fitted; a block of {cfg.kvcache.block_size} swapped in {1e6 * swap_block_s:.0f} us"
    )
    where = provenance(cfg, args, held_out, show(fit, held_out, console))
    return CostFile(subject_of(cfg, model), where, fit.operator.arguments(), fit.arch.arguments(), steps, held_out)


@contextmanager
def split_by_torchrun(cfg: RunConfig) -> Iterator[Shard]:
    """This rank's share of the model (all of it without torchrun) and, where none is said, of the host's CPUs."""
    size = int(os.environ["WORLD_SIZE"]) if is_under_torchrun() else 1
    if size == 1:
        yield WHOLE
        return
    cuda, local_rank = torch.device(cfg.model.device).type == "cuda", int(os.environ["LOCAL_RANK"])
    if cuda:
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
    torch.set_num_threads(cfg.model.num_threads or max(1, (usable_cpus() or 1) // int(os.environ["LOCAL_WORLD_SIZE"])))
    dist.init_process_group("nccl" if cuda else "gloo")
    with default_group() as shard:
        yield shard


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="as for run.py: model=.., model.num_threads=..")
    parser.add_argument("--out", type=new_file, required=True)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--repeat-s", type=float, default=0.1, help="seconds of each repeat, at least")
    parser.add_argument("--held-out", type=int, default=60, help="steps drawn at random to test the fit")
    parser.add_argument("--max-context", type=int, default=2048, help="most tokens of one request")
    parser.add_argument("--max-tokens", type=int, default=2048, help="most new tokens of one step")
    parser.add_argument("--max-batch", type=int, default=16, help="most requests of one step")
    args = parser.parse_args()
    if not 0 <= args.repeat_s < float("inf"):
        parser.error(f"--repeat-s={args.repeat_s}: expected seconds >= 0")
    for name, least in (("repeats", 1), ("held_out", 1), ("max_context", 64), ("max_tokens", 64), ("max_batch", 2)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')}={getattr(args, name)}: expected an integer >= {least}")
    console = Console()
    try:
        cfg = load_config(args.words)
        with split_by_torchrun(cfg) as shard:
            file = profile(cfg, args, shard, console)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if file is None:
        return
    args.out.write_bytes(msgspec.json.format(msgspec.json.encode(file)))
    console.print(f"written to {args.out}: {msgspec.structs.asdict(file.subject)}")


if __name__ == "__main__":
    main()
