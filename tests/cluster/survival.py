"""Real processes that are killed or stopped at random moments of a run; what must hold afterwards.

One seed is one cluster of two prefill and two decode instances. It loses one of each, or has them stopped for longer
than a transfer's deadline, or for good; or any of them are killed, while they load, serve or end, and started again.
Used by test_survival.py, and by `make survive` with many seeds:

    python tests/cluster/survival.py --seeds 50
"""

import argparse
import functools
import json
import random
import signal
import tempfile
import time
from pathlib import Path

from cluster.forked_members import ForkedMembers
from cluster.forked_ranks import Forked

from memserve import LocalCluster, load_config
from memserve.sched.global_scheduler import MAX_ATTEMPTS

WORKLOAD = [
    "workload=synthetic", "workload.num_sessions=16", "workload.num_turns=3", "workload.prompt_tokens=400",
    "workload.turn_tokens=60", "workload.prefix_tokens=100", "workload.share_ratio=4", "workload.max_output_tokens=60",
    "workload.rate=5", "workload.think_time_s=0.3",
]  # fmt: skip
CLUSTER = [
    "exec=distributed", "tokens=hash", "cluster.roles=[prefill,prefill,decode,decode]", "model.num_threads=1",
    "mode=pd_caching_3", "transfer.deadline_s=1", "transfer.patience_s=5", "transfer.retry_s=0.2",
    "cluster.silence_s=3", "policy=random", "policy@decode_policy=random",
]  # fmt: skip
STORE = [
    "cluster.roles=[prefill,prefill,decode,store]", "store=write_through", "fetch=always",
    "+per_role.store.kvcache.num_dram_blocks=200",
]  # fmt: skip
GRANULARITIES = ("by_layer", "by_request", "packed")
FATES = ("killed", "stopped and goes on", "stopped for good")
NAMED = ("instance_lost", "transfer_failed")
NUM_RANKS = 5
START_S, LIMIT_S = 90.0, 150.0
LASTS_S = 6.0  # about as long as the workload does


@functools.cache
def expected() -> dict[str, list[int]]:
    words = ["exec=simulated", "cluster=colocated_1", "index=none", *WORKLOAD]
    return {t.request_id: t.token_ids.tolist() for t in LocalCluster(load_config(words)).run_once().timelines}


def wait_for(is_so, limit_s: float, what: str, ranks: Forked) -> None:
    until = time.monotonic() + limit_s
    while not is_so():
        if time.monotonic() > until:
            for rank, code in enumerate(ranks.codes()):
                if code is None:
                    ranks.signal(rank, signal.SIGUSR1)  # says where it hangs
            time.sleep(1.0)
            logs = "\n".join(path.read_text() for path in sorted(ranks.directory.glob("*.log")))
            raise AssertionError(f"{what} within {limit_s} s: no\n{ranks.printed()}\n{logs}")
        time.sleep(0.05)


def found_by(directory: Path, cases, num_ranks: int, limit_s: float) -> list[dict]:
    """What rank 0 found in each run of the cases, [(words, ranks), ..], when all ranks have ended well."""
    ranks = Forked(directory, cases, num_ranks)
    try:
        wait_for(ranks.ended, limit_s, "all cases end", ranks)
    finally:
        ranks.kill()
    assert ranks.codes() == [0] * num_ranks, ranks.printed()
    return json.loads((directory / "found.json").read_text())


def have_started(directory: Path, leaders=range(1, NUM_RANKS)) -> bool:
    logs = [directory / f"found.json.rank-{rank}.log" for rank in leaders]
    return all(log.exists() and "starts" in log.read_text() for log in logs)


def survive(seed: int, transport: str, directory: Path) -> dict[str, object]:
    """Plays one seed; what befell whom, and how the requests ended. Raises AssertionError for what must not be."""
    rng = random.Random(seed)
    words = [*CLUSTER, *WORKLOAD, f"transport={transport}", f"granularity={rng.choice(GRANULARITIES)}"]
    victims = [rng.choice((1, 2)), rng.choice((3, 4))]  # a rank of each role
    fates = [(rng.uniform(0.2, LASTS_S), victim, rng.choice(FATES)) for victim in victims]
    return _survived(words, fates, directory)


def survive_without_store(seed: int, transport: str, directory: Path) -> dict[str, object]:
    """The same where a store, and nobody else, is lost or stopped: no request fails, or is served a second time."""
    rng = random.Random(seed)
    words = [*CLUSTER, *WORKLOAD, *STORE, f"transport={transport}", f"granularity={rng.choice(GRANULARITIES)}"]
    said = _survived(words, [(rng.uniform(0.2, LASTS_S / 2), NUM_RANKS - 1, rng.choice(FATES))], directory)
    assert set(said["ends"]) == {"length", "new attempts"} and not said["ends"]["new attempts"], said
    return said


def _survived(words: list[str], fates: list[tuple[float, int, str]], directory: Path) -> dict[str, object]:
    victims = [victim for _, victim, _ in fates]
    ranks = Forked(directory, [[words, NUM_RANKS]], NUM_RANKS)
    try:
        wait_for(lambda: have_started(directory), START_S, "the cluster starts", ranks)
        befall(sorted(fates), ranks)
        wait_for(lambda: ranks.codes()[0] is not None, LIMIT_S, "rank 0 ends", ranks)
        survivors = [rank for rank in range(NUM_RANKS) if rank not in victims]
        wait_for(lambda: None not in [ranks.codes()[rank] for rank in survivors], 30, "the survivors end", ranks)
        assert all(ranks.codes()[rank] == 0 for rank in survivors), ranks.codes()
    finally:
        ranks.kill()
    (found,) = json.loads((directory / "found.json").read_text())
    ends = check(found, expected())
    return {"fates": [f"rank {victim} {fate} at {at_s:.1f} s" for at_s, victim, fate in sorted(fates)], "ends": ends}


def survive_restarts(seed: int, transport: str, directory: Path) -> dict[str, object]:
    """The same where victims are started again, in one run or two: none fails, unless it may have been lost thrice."""
    rng = random.Random(seed)
    words = [*CLUSTER, *WORKLOAD, f"transport={transport}", f"granularity={rng.choice(GRANULARITIES)}"]
    words += ["cluster.patience_s=60", f"repeats={rng.choice((1, 1, 2))}"]
    kills = sorted((rng.uniform(0.0, 2 * LASTS_S), rng.randrange(1, NUM_RANKS)) for _ in range(rng.randint(1, 5)))
    members = ForkedMembers(directory, words, [1] * NUM_RANKS, pause_s=rng.choice((0.0, 0.3, 1.0)))
    begins = (directory / "pids.json").exists if rng.random() < 0.3 else lambda: have_started(directory)
    try:
        wait_for(begins, START_S, "the cluster starts", members)
        befall([(at_s, victim, "killed") for at_s, victim in kills], members)
        wait_for(members.ended, LIMIT_S, "all end", members)
    finally:
        members.kill()
    assert members.codes() == [0] * NUM_RANKS, members.printed()
    ends = [check(result, expected()) for result in json.loads((directory / "found.json").read_text())]
    may_fail = NAMED if len(kills) >= MAX_ATTEMPTS else ()
    assert all(set(counts) <= {"length", "stop", "new attempts", *may_fail} for counts in ends), ends
    return {"kills": [f"rank {victim} at {at_s:.1f} s" for at_s, victim in kills], "ends": ends}


def befall(fates: list[tuple[float, int, str]], ranks: Forked) -> None:
    began = time.monotonic()
    wakes: list[tuple[float, int]] = []
    for at_s, victim, fate in fates:
        time.sleep(max(0.0, began + at_s - time.monotonic()))
        ranks.signal(victim, signal.SIGKILL if fate == "killed" else signal.SIGSTOP)
        if fate == "stopped and goes on":
            wakes.append((time.monotonic() + 2.0, victim))
    for at, victim in wakes:
        time.sleep(max(0.0, at - time.monotonic()))
        ranks.signal(victim, signal.SIGCONT)


def check(found: dict[str, dict], tokens: dict[str, list[int]]) -> dict[str, int]:
    """Every request has the right `tokens` or a named failure; returns how many ended in each way."""
    counts: dict[str, int] = {}
    for request_id, (reason, detail, _) in found["ends"].items():
        counts[reason] = counts.get(reason, 0) + 1
        if reason in ("length", "stop"):
            assert found["tokens"][request_id] == tokens[request_id], request_id
        else:
            assert reason in NAMED and detail, (request_id, reason, detail)
    counts["new attempts"] = sum(attempt for _, _, attempt in found["ends"].values())
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--first", type=int, default=0)
    args = parser.parse_args()
    for seed in range(args.first, args.first + args.seeds):
        transport = ("mapped", "gloo")[seed % 2]
        with tempfile.TemporaryDirectory() as directory:
            play = (survive, survive_restarts)[seed // 2 % 2]
            print(f"seed {seed}, {transport}: {play(seed, transport, Path(directory))}", flush=True)


if __name__ == "__main__":
    main()
