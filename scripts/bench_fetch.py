"""Fetch or recompute (Eq. 2), both ways on this machine: how often the policy's choice was the faster one.

    python scripts/bench_fetch.py model.path=../shared/models/stories260K          # some minutes
    python scripts/bench_fetch.py --transports gloo --cases 200 --json fetch.json model=tiny

Words with `=` are run.py's. The machine is fitted, as profile_cost_model.py does: steps of the model, and single
transfers between this process and another. Batches of prompts are drawn of which some KV is here and more is there, and
each is measured both ways: the transfer of what is missing, by each transport and granularity, and how much longer the
real model's step takes without it. Repeats of all this are interleaved in random order, in turn with a decode step as
pacing.py says, and medians count. The policy (`fetch=cost`) is asked with the fitted prices, which have not seen the
cases. Cases within 10 % of break-even, as measured, are counted apart. `repeat` is what nothing can be much better
than: the choice by every other measured repeat, judged by those between. Control messages are in neither side: in a
cluster they wait for steps, which Eq. 2 leaves out.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from fetch_cases import (
    WAYS,
    CaseTimes,
    Verdict,
    Wire,
    block_counts,
    draw_cases,
    judge,
    predict,
    ways_of,
)
from options import new_file
from pacing import Timed, paced_times
from rich.console import Console
from rich.table import Table
from step_grid import PACE, StepTimer, fitted_cases, linear_points
from transfer_ends import Ends

from memserve.cluster.engine import build_engine
from memserve.compose import load_config
from memserve.config.schema import RunConfig
from memserve.metrics.output import environment
from memserve.model.llama import Llama
from memserve.model.runner import geometry
from memserve.sched.cost_model.fit import MeasuredStep, fit_operators
from memserve.sched.cost_model.transfer import NUM_MESSAGES
from memserve.sched.fetch_policy import Choice, FetchIfCheaper, FetchPrices

TRANSPORTS = ("mapped", "gloo")
GOAL = 0.95
REPEAT_S = 0.02  # of a call's repeat, as pacing.py has it
ROOM = 4  # arenas beside the KV of one batch: so that its blocks lie scattered


def verdicts_of(
    cases: Sequence[list[Choice]], prices: Mapping[str, FetchPrices], measured: Mapping[str, CaseTimes]
) -> dict[str, dict[str, Verdict]]:
    """{wire: {"cost", "always", "never", "repeat"}}."""
    found = {}
    for name, times in measured.items():
        real = times.both(slice(None))
        chosen = np.array(
            [FetchIfCheaper().fetches(*sides) for sides in zip(*predict(cases, prices[name]), strict=True)]
        )
        before, after = times.both(slice(0, None, 2)), times.both(slice(1, None, 2))
        found[name] = {
            "cost": judge(chosen, *real),
            "always": judge(np.ones(len(cases), dtype=bool), *real),
            "never": judge(np.zeros(len(cases), dtype=bool), *real),
            "repeat": judge(before[0] <= before[1], *after),
        }
    return found


def errors_of(cases: Sequence[list[Choice]], prices: FetchPrices, times: CaseTimes) -> dict[str, float]:
    """Median relative errors of both predicted sides, and half the quartile range of the repeats, as shares."""
    predicted, real = predict(cases, prices), times.both(slice(None))
    low, high = np.quantile(times.fetch, (0.25, 0.75), axis=1)
    step_low, step_high = np.quantile(times.without - times.with_it, (0.25, 0.75), axis=1)
    sides = {"fetch": (predicted[0], real[0], high - low), "compute": (predicted[1], real[1], step_high - step_low)}
    return {
        key: float(np.median(value))
        for side, (said, was, spread) in sides.items()
        for key, value in ((f"{side}_error", np.abs(said / was - 1)), (f"{side}_noise", spread / 2 / np.abs(was)))
    }


def tables_of(verdicts: Mapping[str, Mapping[str, Verdict]], errors: Mapping[str, Mapping[str, float]]) -> list[Table]:
    """Shares of right choices, the policy's confusion, and the errors behind them."""
    right = Table(
        "right beyond 10 %", "far / all", "fetch=cost", "always", "never", "repeat", "goal", "cost, all cases"
    )
    confused = Table("fetch=cost beyond 10 %", "fetched, faster", "fetched, slower", "computed, faster",
                     "computed, slower")  # fmt: skip
    behind = Table("median error (noise)", "transfer", "computing")
    for name, found in verdicts.items():
        cost, e = found["cost"], errors[name]
        shares = [f"{100 * found[word].share_right(far=True):.1f} %" for word in ("cost", "always", "never", "repeat")]
        mark = "ok" if cost.share_right(far=True) >= GOAL else "--"
        right.add_row(name, f"{cost.far.sum()} / {len(cost.far)}", *shares, f"{100 * GOAL:.0f} % {mark}",
                      f"{100 * cost.share_right(far=False):.1f} %")  # fmt: skip
        pairs = ((True, True), (True, False), (False, False), (False, True))
        confused.add_row(name, *(str(cost.count(*pair)) for pair in pairs))
        behind.add_row(
            name,
            *(f"{100 * e[f'{side}_error']:.1f} % ({100 * e[f'{side}_noise']:.1f} %)" for side in ("fetch", "compute")),
        )
    return [right, confused, behind]


@dataclass(frozen=True)
class Outcome:
    """All that was measured. prices: fitted, by wire.  times: of the cases, by wire."""

    cases: list[list[Choice]]
    prices: dict[str, FetchPrices]
    times: dict[str, CaseTimes]


def measure_all(model: Llama, cfg: RunConfig, args: argparse.Namespace) -> Outcome:
    """Fits the machine and measures the cases, all interleaved."""
    size, rng = cfg.kvcache.block_size, np.random.default_rng(cfg.seed)
    shape, most_blocks = geometry(model.config, size, model.dtype), args.max_context // size
    timer = StepTimer(model, size, cfg.model.attention, args.max_context, args.max_batch)
    points = linear_points(args.max_context, args.max_context)
    steps, counts = fitted_cases(points, args.max_context, args.max_batch, rng), block_counts(most_blocks)
    cases = draw_cases(args.cases, args.max_context, args.max_batch, size, rng)
    ends = Ends(ROOM * args.max_batch * most_blocks * shape.block_bytes)
    try:
        wires = [Wire(ends, transport, way, shape, rng) for transport in args.transports for way in WAYS]
        calls: list[Timed] = [partial(timer.seconds, step) for step in steps]
        calls += [partial(wire.seconds, [count]) for wire in wires for count in counts]
        calls += [call for case in cases for call in ways_of(case, wires, timer, size)]
        times = paced_times(calls, partial(timer.seconds, PACE), args.repeats, REPEAT_S, rng)
    finally:
        ends.close()
    num_fitted = len(steps) + len(wires) * len(counts)
    fitted, of_cases = np.median(times[:num_fitted], axis=1), times[num_fitted:]
    measured = [MeasuredStep(s.num_cached, s.num_new, t) for s, t in zip(steps, fitted.tolist(), strict=False)]
    costs, seconds = fit_operators(measured, points), fitted[len(steps) :].reshape(len(wires), len(counts))
    prices = {w.name: FetchPrices(costs, w.fit(counts, s), size) for w, s in zip(wires, seconds, strict=True)}
    by_case = of_cases.reshape(len(cases), len(wires) + 2, args.repeats)
    both = by_case[:, -2], by_case[:, -1]
    return Outcome(cases, prices, {w.name: CaseTimes(by_case[:, i], *both) for i, w in enumerate(wires)})


def bench(cfg: RunConfig, args: argparse.Namespace, console: Console) -> dict[str, object]:
    """Measures, prints; the figures. Raises ValueError for a context that is none."""
    engine = build_engine(cfg)
    if not isinstance(engine.model, Llama):
        raise ValueError(f"tokens={cfg.tokens}: expected a model, whose steps take time")
    if cfg.kvcache.block_size >= args.max_context:
        raise ValueError(f"--max-context={args.max_context}: expected more than kvcache.block_size="
                         f"{cfg.kvcache.block_size}, a block that is held and a token to compute")  # fmt: skip
    if args.max_context > engine.max_context:
        raise ValueError(f"--max-context={args.max_context}: the model's context has {engine.max_context} tokens")
    found = measure_all(engine.model, cfg, args)
    cases, prices, measured = found.cases, found.prices, found.times
    verdicts = verdicts_of(cases, prices, measured)
    errors = {name: errors_of(cases, prices[name], times) for name, times in measured.items()}
    for table in tables_of(verdicts, errors):
        console.print(table)
    links = {name: price.transfer.link for name, price in prices.items()}
    for name, link in links.items():
        fixed_s = NUM_MESSAGES * link.message_latency_s
        console.print(
            f"{name}: {1e6 * fixed_s:.0f} us a transfer, {1e6 * link.latency_s:.1f} a call, {link.gb_per_s:.2f} GB/s"
        )
    return {
        name: {
            "transfer_s": NUM_MESSAGES * links[name].message_latency_s,
            "latency_s": links[name].latency_s,
            "cases": len(cases),
            "far": int(found["cost"].far.sum()),
            "right": {word: verdict.share_right(far=True) for word, verdict in found.items()},
            **errors[name],
        }
        for name, found in verdicts.items()
    }


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="as for run.py: model=.., model.num_threads=..")
    parser.add_argument("--cases", type=int, default=120, help="batches of prompts")
    parser.add_argument("--repeats", type=int, default=9, help="of everything that is measured")
    parser.add_argument("--max-context", type=int, default=512, help="most tokens of a prompt")
    parser.add_argument("--max-batch", type=int, default=4, help="most prompts that are decided at once")
    parser.add_argument("--transports", default=",".join(TRANSPORTS), help="joined by commas")
    parser.add_argument("--json", type=new_file)
    args = parser.parse_args(argv)
    for name, least in (("cases", 1), ("repeats", 2), ("max_context", 64), ("max_batch", 2)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')}={getattr(args, name)}: expected an integer >= {least}")
    args.transports = args.transports.split(",")
    if unknown := [word for word in args.transports if word not in TRANSPORTS]:
        parser.error(f"--transports={unknown[0]}: expected of {', '.join(TRANSPORTS)}")
    return args


def main(argv: Sequence[str]) -> None:
    args = parse(argv)
    try:
        figures = bench(load_config(args.words), args, Console(width=120))
    except ValueError as error:
        sys.exit(f"error: {error}")
    if args.json is not None:
        written = {"figures": figures, "goal": GOAL, "env": environment({}, ["scripts/bench_fetch.py", *argv])}
        args.json.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
