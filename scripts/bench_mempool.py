"""How fast the pool and its index are on this machine, beside the project's goals and the paper's figures.

    python scripts/bench_mempool.py                                   # everything, some minutes
    python scripts/bench_mempool.py --parts index,evict --sizes 10000,100000 --repeats 50
    python scripts/bench_mempool.py --parts replay --trace my_trace.jsonl --requests 2000
    python scripts/bench_mempool.py --out mempool.json

index: match and insert of 4096-token prompts of 16-token blocks, given as int32 arrays, by how much of them is cached
and how many blocks are.  lists: the same match given a list.  fig10: the radix tree beside a hash of every prefix,
nothing cached.  alloc, evict, memory: what they say.  grow: an answer entered block after block.  replay: the trace of
real conversations beside this checkout (../shared/workloads), or where that is absent synthetic ones, through match,
alloc, insert and release; capacity as a share of the trace's unique blocks, hit ratio with that of an exact LRU oracle
as its goal. Times are medians of --repeats calls (a tenth as many runs of evict and grow, 3 of replay). The paper's
figures are of its machine: alloc and match from Fig. 9, the index's time from Fig. 10.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from options import integers, new_file
from pool_figures import (
    Figure,
    alloc_figures,
    evict_figures,
    fig10_figures,
    grow_figures,
    index_figures,
    list_figures,
    memory_figures,
)
from rich.console import Console
from rich.table import Table
from trace_replay import Trace, load_trace, replay_figures, synthetic_trace

from memserve.metrics.output import environment

PARTS = ("index", "lists", "fig10", "alloc", "evict", "grow", "memory", "replay")
MOONCAKE = Path(__file__).parents[2] / "shared" / "workloads" / "mooncake_conversation_trace.jsonl"
NUM_EVICT_BLOCKS = 102_400
NUM_MEMORY_BLOCKS = 51_200
NUM_SYNTHETIC_REQUESTS = 5_000
NUM_REPLAYS = 3


def measure(part: str, args: argparse.Namespace) -> Iterator[Figure]:
    """The figures of one part. Raises ValueError or OSError for a trace that cannot be read."""
    if part == "index":
        yield from index_figures(args.sizes, args.repeats, args.seed)
    elif part == "lists":
        yield from list_figures(min(args.sizes), args.repeats, args.seed)
    elif part == "fig10":
        yield from fig10_figures(args.repeats, args.seed)
    elif part == "alloc":
        yield from alloc_figures(args.repeats)
    elif part == "evict":
        num_blocks = min(NUM_EVICT_BLOCKS, max(args.sizes))
        yield from evict_figures(num_blocks, max(1, args.repeats // 10), args.seed)
    elif part == "grow":
        yield from grow_figures(max(1, args.repeats // 10), args.seed)
    elif part == "memory":
        yield from memory_figures(min(NUM_MEMORY_BLOCKS, max(args.sizes)), args.seed)
    else:
        yield from replay_figures(open_trace(args), NUM_REPLAYS)


def open_trace(args: argparse.Namespace) -> Trace:
    if args.trace is None and not MOONCAKE.exists():
        return synthetic_trace(args.requests or NUM_SYNTHETIC_REQUESTS, args.seed)
    return load_trace(args.trace or MOONCAKE, args.requests)


def table_of(part: str, figures: Sequence[Figure]) -> Table:
    table = Table(title=part, title_justify="left")
    for name in ("", "ours", "unit", "goal", "/ goal", "paper", "/ paper"):
        table.add_column(name, justify="left" if name in ("", "unit") else "right", no_wrap=True)
    for f in figures:
        mark = {None: "", True: " ok", False: " --"}[f.reached]
        table.add_row(
            f.what, number(f.value), f.unit, number(f.goal), ratio(f.value, f.goal) + mark,
            number(f.paper), ratio(f.value, f.paper),
        )  # fmt: skip
    return table


def number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" if value >= 1 else f"{value:.4f}"


def ratio(value: float, other: float | None) -> str:
    return "" if other is None else "0" if not other else f"{value / other:.2f}"


def as_json(figure: Figure) -> dict[str, object]:
    ratios = {"goal": figure.goal, "paper": figure.paper}
    quotients = {f"ours_over_{name}": figure.value / other if other else None for name, other in ratios.items()}
    return asdict(figure) | {"reached": figure.reached} | quotients


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}; joined by commas")
    add(
        "--sizes",
        type=integers,
        default="10000,100000,1000000",
        help="cached blocks of part index; the largest also limits others",
    )
    add("--repeats", type=int, default=100)
    add("--trace", type=Path, help="JSONL with hash_ids a line")
    add("--requests", type=int, help="of the trace, from its start; all by default")
    add("--seed", type=int, default=0)
    add("--out", type=new_file, help="write the figures as JSON")
    args = parser.parse_args(argv)
    args.parts = args.parts.split(",")
    if unknown := [part for part in args.parts if part not in PARTS]:
        parser.error(f"--parts={unknown[0]}: expected of {', '.join(PARTS)}")
    for name, value, low in (("sizes", min(args.sizes), 256), ("repeats", args.repeats, 1), ("seed", args.seed, 0)):
        if value < low:
            parser.error(f"--{name}={value}: expected an integer >= {low}")
    if args.requests is not None and args.requests < 1:
        parser.error(f"--requests={args.requests}: expected an integer >= 1")
    return args


def main(argv: Sequence[str]) -> None:
    args = parse(argv)
    console, figures = Console(width=110), []
    for part in args.parts:
        try:
            measured = list(measure(part, args))
        except (ValueError, OSError) as error:
            sys.exit(f"error: {error}")
        title = f"{part}: {open_trace(args).name}" if part == "replay" else part
        console.print(table_of(title, measured))
        figures += measured
    if args.out is not None:
        env = environment({"seed": args.seed}, ["scripts/bench_mempool.py", *argv])
        written = {"figures": [as_json(figure) for figure in figures], "env": env}
        args.out.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
