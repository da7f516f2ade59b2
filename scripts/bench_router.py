"""What choosing an instance costs: microseconds a request, by policy and by number of instances.

python scripts/bench_router.py                              # 4,096-token requests, 1M cached blocks, 4 to 256 instances
python scripts/bench_router.py --instances 64 --blocks 100000 --repeats 200 --json out.json

A choice is all that the global scheduler does to place a request: match it in the prompt tree for all instances, take
the snapshot, choose, count and record it. Prompts share their first quarter by 8 and their second by 64 and half of
the requests have been seen before. The goal of 200 us stands beside the medians; no figure here depends on a model.
"""

import argparse
from collections.abc import Sequence
from functools import partial

import numpy as np
from options import integer, integers, new_file, write_figures
from rich.console import Console
from rich.table import Table

from memserve.clock import Stopwatch
from memserve.messages import pack_tokens
from memserve.sched.cost_model.fixed import FixedCostModel
from memserve.sched.group import Group
from memserve.sched.prefix_routing import BalancedPrefix, CostBased, LeastKV, PromptTree
from memserve.sched.prompt_tree import Optimistic
from memserve.sched.routing import LeastLoad, Policy, RouteRequest, SessionAffinity

BLOCK_SIZE, GOAL_US = 16, 200
COSTS = FixedCostModel(0.01, 3e-5, 1e-4)
POLICIES: dict[str, Policy] = {
    "prompt_tree_bounded": PromptTree(max_lead=2),
    "cost_based_bounded": CostBased(COSTS, max_skew=1.75),
    "balanced_prefix": BalancedPrefix(),
    "least_kv": LeastKV(),
    "least_load": LeastLoad(),
    "session_affinity": SessionAffinity(),
}


class Prompts:
    """Prompts of num_tokens: a quarter shared by all of a family, a quarter by all of a branch, half of their own."""

    def __init__(self, num_tokens: int, rng: np.random.Generator) -> None:
        self._num_tokens, self._rng = num_tokens, rng
        self._families, self._branches = self._tokens(8, num_tokens // 4), self._tokens(64, num_tokens // 4)

    def draw(self) -> np.ndarray:
        """int32 [num_tokens]."""
        branch = int(self._rng.integers(len(self._branches)))
        own = self._tokens(1, self._num_tokens - 2 * (self._num_tokens // 4))[0]
        return np.concatenate([self._families[branch % 8], self._branches[branch], own])

    def _tokens(self, *shape: int) -> np.ndarray:
        return self._rng.integers(0, 32000, shape, dtype=np.int32)


def fill(tree: Optimistic, num_rows: int, num_blocks: int, prompts: Prompts) -> list[np.ndarray]:
    """Prompts go to the instances in turn until so many blocks are cached; returns them."""
    seen: list[np.ndarray] = []
    while tree.num_blocks < num_blocks:
        seen.append(prompts.draw())
        tree.learn(len(seen) % num_rows, pack_tokens(seen[-1]), len(seen))
    return seen


def measure(num_rows: int, num_blocks: int, num_tokens: int, repeats: int) -> dict[str, dict[str, float]]:
    """{policy: {"median_us", "p99_us"}} for one number of instances."""
    rng = np.random.default_rng(0)
    prompts, tree = Prompts(num_tokens, rng), Optimistic(num_rows, BLOCK_SIZE, max_blocks=num_blocks)
    seen = fill(tree, num_rows, num_blocks, prompts)
    drawn = [seen[int(rng.integers(len(seen)))] if i % 2 else prompts.draw() for i in range(repeats)]
    requests = [RouteRequest(f"r{i}", f"s{i}", tokens, 0.0, 128) for i, tokens in enumerate(drawn)]
    labels = [f"prefill-{i}" for i in range(num_rows)]
    figures = {}
    for name, policy in POLICIES.items():
        group = Group(labels, range(num_rows), policy, tree, COSTS)
        times_us = [_choice_us(group, request, len(seen), rng) for request in requests]
        median, p99 = np.percentile(times_us, [50, 99])
        figures[name] = {"median_us": float(median), "p99_us": float(p99)}
    return figures


def _choice_us(group: Group, request: RouteRequest, now_ns: int, rng: np.random.Generator) -> float:
    watch = Stopwatch()
    group.take(group.choose(request, now_ns, rng), request.session_id)
    return watch.elapsed_ns() / 1000


def print_table(results: dict[int, dict[str, dict[str, float]]], title: str) -> None:
    """A row a policy: median and P99 for each number of instances."""
    table = Table(title=title, title_justify="left")
    table.add_column("us per choice, median (P99)")
    for num_rows in results:
        table.add_column(f"{num_rows} instances", justify="right")
    table.add_column("goal, median", justify="right")
    for name in POLICIES:
        cells = [f"{r[name]['median_us']:.0f} ({r[name]['p99_us']:.0f})" for r in results.values()]
        table.add_row(name, *cells, str(GOAL_US))
    Console(width=120).print(table)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    some, whole_block = partial(integer, least=1), partial(integer, least=BLOCK_SIZE)
    parser.add_argument("--instances", type=partial(integers, least=1), default="4,16,64,256", help="joined by commas")
    parser.add_argument("--blocks", type=some, default=1_000_000, help="cached, of all instances together")
    parser.add_argument("--tokens", type=whole_block, default=4096, help=f"of a request, at least {BLOCK_SIZE}")
    parser.add_argument("--repeats", type=some, default=1000)
    parser.add_argument("--json", type=new_file)
    args = parser.parse_args(argv)
    results = {num_rows: measure(num_rows, args.blocks, args.tokens, args.repeats) for num_rows in args.instances}
    print_table(results, f"{args.tokens}-token requests, {args.blocks:,} cached blocks of {BLOCK_SIZE} tokens")
    if args.json is not None:
        write_figures(args.json, {"goal_us": GOAL_US, "results": results})


if __name__ == "__main__":
    main()
