"""What simulations cost: requests a second of wall time, by configuration and by number of instances.

python scripts/bench_simulations.py                                       # 1,000 synthetic requests, 4 instances
python scripts/bench_simulations.py --path FILE --requests 2500 --instances 4,16,32 --only colocated
python scripts/bench_simulations.py --path FILE --requests 2500 --repeats 3 --json out.json

Each configuration beside the first, colocated instances and the router's optimistic trees, as a ratio of wall times;
--repeats of them are in turn.
All are Llama-3-8B on H100s by a roofline (experiment=h100_llama3_8b), lengths alone; half of the instances prefill and
half decode where the two are apart. The load grows with the instances. --path: a trace, of which the first requests
are played; without one they are synthetic, of 4,096 tokens on average, answers of 256, and share prefixes.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median

from options import integer, integers, new_file, write_figures
from rich.console import Console
from rich.table import Table

from memserve import LocalCluster, load_config
from memserve.config.overrides import quoted

BASELINE = "colocated"
APART = ["mode=pd_caching_3"]
CONFIGURATIONS: dict[str, list[str]] = {
    BASELINE: [],
    "colocated, index_source=exact": ["index_source=exact"],
    "colocated, policy=least_load": ["policy=least_load", "index_source=none"],
    "prefill, decode": APART,
    "prefill, decode, index_source=exact": [*APART, "index_source=exact"],
    "prefill, decode, by_layer": [*APART, "granularity=by_layer"],
}
SYNTHETIC = [
    "workload=synthetic", "workload/lengths=lognormal", "workload.prompt_tokens=4096", "workload.max_output_tokens=256",
    "workload.num_turns=2", "workload.prefix_tokens=1024", "workload.share_ratio=8",
]  # fmt: skip
RATE_AN_INSTANCE = 1.0  # synthetic sessions a second
TRACED_INSTANCES = 4  # of which a trace is played at its own times


def words_of(name: str, num_instances: int, num_requests: int, path: Path | None) -> list[str]:
    """Of a configuration's run."""
    half = num_instances // 2
    roles = ["prefill"] * half + ["decode"] * half if "decode" in name else ["colocated"] * num_instances
    words = ["+experiment=h100_llama3_8b", f"cluster.roles=[{','.join(roles)}]", *CONFIGURATIONS[name]]
    if path is None:
        rate = f"workload.rate={RATE_AN_INSTANCE * num_instances:g}"
        return [*words, *SYNTHETIC, f"workload.num_sessions={-(-num_requests // 2)}", rate]
    speedup = f"workload.speedup={num_instances / TRACED_INSTANCES:g}"
    return [
        *words,
        "workload=trace",
        f"workload.path={quoted(str(path))}",
        f"workload.num_sessions={num_requests}",
        speedup,
    ]


def requests_per_s(words: Sequence[str]) -> float:
    """Of one run, without what is loaded and built before."""
    report = LocalCluster(load_config(words)).run()
    return float(report["num_requests"] / report["wall_s"])


def measure(num_instances: int, num_requests: int, path: Path | None, repeats: int, only: str) -> dict[str, float]:
    """{configuration: median requests a second}, of those that have `only` in their names, the baseline among them.

    They take turns, so that a machine that is busy for a while is busy for all alike.
    """
    names = [name for name in CONFIGURATIONS if name == BASELINE or only in name]
    words = {name: words_of(name, num_instances, num_requests, path) for name in names}
    turns = [{name: requests_per_s(words[name]) for name in names} for _ in range(repeats)]
    return {name: median(turn[name] for turn in turns) for name in names}


def print_table(results: dict[int, dict[str, float]], title: str) -> None:
    """A row a configuration: requests a second, and the baseline's as a multiple of that."""
    table = Table(title=title, title_justify="left")
    table.add_column("requests/s of wall time (the baseline's wall time x)")
    for num_instances in results:
        table.add_column(f"{num_instances} instances", justify="right")
    for name in next(iter(results.values())):
        table.add_row(name, *(f"{r[name]:.0f} (x {r[BASELINE] / r[name]:.2f})" for r in results.values()))
    Console(width=120).print(table)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    some = partial(integer, least=1)
    parser.add_argument("--requests", type=some, default=1000)
    parser.add_argument("--instances", type=partial(integers, least=2), default="4", help="even numbers, by commas")
    parser.add_argument("--path", type=Path, help="of a trace; without one, synthetic requests")
    parser.add_argument("--only", default="", help="configurations with this in their names, beside the first")
    parser.add_argument("--repeats", type=some, default=1)
    parser.add_argument("--json", type=new_file)
    args = parser.parse_args(argv)
    if odd := [number for number in args.instances if number % 2]:
        parser.error(f"--instances {odd[0]}: expected even numbers, of which half can prefill and half decode")
    try:
        results = {n: measure(n, args.requests, args.path, args.repeats, args.only) for n in args.instances}
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print_table(results, f"{args.requests:,} requests of {args.path.name if args.path else 'a synthetic workload'}")
    if args.json is not None:
        write_figures(args.json, {"baseline": BASELINE, "results": results})


if __name__ == "__main__":
    main()
