"""Clusters of words drawn at random, of every group of a simulation, and what befalls them; what must hold of each.

One seed is one cluster, workload and fate. Words that contradict each other are refused by name, and drawn again. Used
by test_fuzz.py, and with many seeds:

    PYTHONPATH=tests python -m cluster.fuzz --minutes 10 --seed 1
"""

import argparse
import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from cluster.playing import at_random, nothing_is_left, play, rows_of, tokens_of

from memserve import LocalCluster, load_config
from memserve.config.errors import ConfigError

MOST_EVENTS = 2_000_000
FATES = ("none", "none", "changes", "crashes")
NAMED = ("refused", "transfer_failed", "instance_lost")  # why a request may fail
WORDS = {  # of which any goes with any other, or is refused by name
    "batching": "mixed prefill_first",
    "queue": "fcfs priority longest_prefix",
    "policy": "balanced_prefix balanced_prefix_bounded cost_based cost_based_bounded least_kv least_load prompt_tree "
              "prompt_tree_bounded random round_robin session_affinity sticky_least_load",
    "policy@decode_policy": "least_load random round_robin session_affinity sticky_least_load least_kv prompt_tree",
    "index_source": "exact optimistic none",
    "eviction": "lru lfu fifo cost_aware",
    "preemption": "recompute swap",
    "swap": "always never cost",
    "fetch": "never always cost",
    "layout": "discrete aggregated",
    "granularity": "by_layer by_request packed by_request_agg",
    "granularity.merge": "false true",
    "link": "nvlink_h800 unlimited ethernet_10g ib_400g",
    "link.contention": "true false",
    "departure": "wait migrate",
    "migration": "stop_and_copy live",
    "rebalancing": "none by_answers by_room",
    "heir": "none least_load",
    "transfer.deadline_s": ".05 .5 60",
    "transfer.patience_s": ".2 5 600",
    "transfer.retry_s": ".05 1",
    "transfer.on_failure": "recompute fail",
    "sched.token_budget": "17 64 512",
    "sched.chunk_size": "null 5 16 100",
    "sched.max_running": "3 16 256",
    "sched.lookahead": "0 2 64",
    "sched.decode_headroom_blocks": "0 2 8",
    "cluster.max_unfinished": "null 3 10",
    "cluster.patience_s": "0 .5 5",
    "control.latency_s": "0 1e-4 1e-2",
    "control.request_s": "0 1e-4",
}  # fmt: skip
WORKLOAD = {
    "num_sessions": "6 12 20", "num_turns": "1 2 4", "prompt_tokens": "3 40 150", "turn_tokens": "1 20",
    "max_output_tokens": "1 8 60", "rate": "2 20 500", "think_time_s": "0 .1 1",
}  # fmt: skip
SOON = ["full.prefill=1", "full.decode=2", "interval_s=.1", "window_s=.3"]
SCALING = {
    "fixed": [],
    "by_load": ["full.colocated=2", *SOON],
    "switch_roles": SOON,
    "schedule": ["changes=[{at_s: .1, add: ROLE}, {at_s: .5, add: ROLE}]"],
}
MODES = ("pd_basic", "pd_caching_1", "pd_caching_2", "pd_caching_3")


@dataclass(frozen=True)
class Drawn:
    """words: of the cluster.  workload: of what it answers, and by whose tokens.  fate: what befalls it."""

    words: tuple[str, ...]
    workload: tuple[str, ...]
    fate: str


def drawn(seed: int) -> Drawn:
    """The first that contradicts itself nowhere."""
    rng = Random(seed)
    while True:
        one = Drawn(tuple(_cluster(rng)), tuple(_workload(rng)), rng.choice(FATES))
        try:
            LocalCluster(load_config([*one.workload, *one.words]))
        except ConfigError:
            continue
        return one


def _cluster(rng: Random) -> Iterator[str]:
    serving = ["colocated"] * rng.randint(1, 4)
    yield "exec=simulated"
    if rng.random() < 0.65:
        serving = ["prefill"] * rng.randint(1, 3) + ["decode"] * rng.randint(1, 3)
        yield f"mode={rng.choice(MODES)}"
    stores = ["store"] * rng.choice((0, 0, 1, 2))
    block_size = rng.choice((1, 2, 4, 8, 16))
    yield f"cluster.roles=[{','.join(rng.sample([*serving, *stores], len(serving) + len(stores)))}]"
    yield f"kvcache.block_size={block_size}"
    yield f"kvcache.num_hbm_blocks={rng.choice((400, 700, 1500, 6000)) // block_size + 8}"
    yield f"index={'radix' if stores else rng.choice(('radix', 'radix', 'hash', 'none'))}"
    if stores:
        yield f"store={rng.choice(('write_through', 'write_through_selective', 'write_back'))}"
        yield f"store.max_incoming={rng.choice((1, 4))}"
        yield f"+per_role.store.kvcache.num_dram_blocks={rng.choice((20, 200, 3000)) // block_size + 4}"
    if rng.random() < 0.4:
        yield f"kvcache.num_dram_blocks={rng.choice((50, 300, 2000)) // block_size + 4}"
        yield f"kvcache.async_swap={rng.choice(('true', 'false'))}"
    scaling = rng.choice([*SCALING])
    yield f"scaling={scaling}"
    yield from (f"scaling.{word.replace('ROLE', rng.choice(serving))}" for word in SCALING[scaling])
    for name in rng.sample([*WORDS], rng.randint(4, len(WORDS) - 6)):  # the others stay as they are by default
        yield f"{name}={rng.choice(WORDS[name].split())}"


def _workload(rng: Random) -> Iterator[str]:
    yield from (
        "workload=synthetic",
        f"seed={rng.randrange(100)}",
        f"tokens={rng.choice(('hash', 'hash', 'workload'))}",
    )
    yield from (f"workload.{name}={rng.choice(values.split())}" for name, values in WORKLOAD.items())
    yield f"workload/lengths={rng.choice(('fixed', 'lognormal', 'uniform'))}"
    if rng.random() < 0.5:
        yield from ("workload.prefix_tokens=16", "workload.share_ratio=3")
    if rng.random() < 0.3:
        yield "workload.classes=[{name: a, share: .4, priority: 0},{name: b, share: .6, priority: 2}]"


@functools.lru_cache(8)
def _expected(workload: tuple[str, ...]) -> dict[str, list[int]]:
    words = ["exec=simulated", "index=none", "kvcache.num_hbm_blocks=20000", "kvcache.block_size=4"]
    return tokens_of(play(LocalCluster(load_config([*words, *workload])).cluster()))


def played(one: Drawn, seed: int, *more: str):
    """Its timelines, once it has come to an end and all books are right."""
    cluster = LocalCluster(load_config([*one.workload, *one.words, *more])).cluster()
    befalls = at_random(seed, 0.01, crash=0.002 * (one.fate == "crashes"))

    def act(cluster, number):
        assert number < MOST_EVENTS, "it does not end"
        if one.fate != "none":
            befalls(cluster, number)

    timelines = play(cluster, act)
    nothing_is_left(cluster)
    return timelines


def check(seed: int) -> Drawn:
    """Raises AssertionError where an answer is another than it is alone, or what failed is not said to have."""
    one = drawn(seed)
    timelines, expected = played(one, seed), _expected(one.workload)
    for timeline in timelines:
        if timeline.succeeded:
            assert timeline.token_ids.tolist() == expected[timeline.request_id], timeline.request_id
        else:
            assert timeline.reason in NAMED, timeline.reason
    if all(timeline.succeeded for timeline in timelines):  # a session goes on only where it was answered
        assert len(timelines) == len(expected)
    if one.fate == "none":
        assert rows_of(played(one, seed, "macro_steps=false")) == rows_of(timelines), "macro-steps change it"
    return one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=Random().randrange(10**9), help="the first; by default a fresh one")
    options = parser.parse_args()
    until, seed = time.monotonic() + 60 * options.minutes, options.seed
    while time.monotonic() < until:
        try:
            check(seed)
        except Exception:
            print(f"seed {seed}: {drawn(seed)}", flush=True)
            raise
        seed += 1
    print(f"seeds {options.seed} to {seed - 1}: all as they should be")


if __name__ == "__main__":
    main()
