"""One rank of test_worker, in one of the stories below. Called with rank, size, the directory to meet in, the story."""

import functools
import json
import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from mini_cluster import dispatch, serve
from mini_engine import MiniEngine
from parallel_models import answers, engine_for, model_of
from ranks import join

from memserve.cluster.worker import Followers, IdleHand, ParallelCopier, ParallelRunner, follow
from memserve.instance import Instance
from memserve.kvcache import LRU, DiscreteLayout, RadixIndex
from memserve.kvcache.arena import Arena, TwoTiers
from memserve.kvcache.block_pool import BlockPool
from memserve.kvcache.copy_engine import AtOnce, BlockCopier, NothingToCopy
from memserve.model.llama import Llama
from memserve.model.parallel import GroupBroken, GroupShard
from memserve.model.runner import ModelRunner, geometry
from memserve.model.sampler import InvalidLogits, Sampler
from memserve.request import Role
from memserve.sampling_params import SamplingParams
from memserve.sched.admission import Limits
from memserve.sched.local_scheduler import LocalScheduler
from memserve.sched.preemption import SwapOut
from memserve.sched.queue_policy import FCFS
from memserve.sched.swap_policy import Always

ENGINE_CASES = ("chunks", "steps", "cached", "drawn")
NUM_BLOCKS, NUM_DRAM_BLOCKS, BLOCK_SIZE = 40, 60, 4


def parts_of_an_instance(model: Llama) -> tuple[ModelRunner, TwoTiers]:
    """A rank's share of an instance with two tiers: its runner and what copies between its arenas."""
    g, cpu = geometry(model.config, BLOCK_SIZE, model.dtype), torch.device("cpu")
    hbm, dram = (Arena(DiscreteLayout(), g, n, cpu) for n in (NUM_BLOCKS, NUM_DRAM_BLOCKS))
    return ModelRunner(model, hbm.kv, BLOCK_SIZE), TwoTiers(hbm, dram, NUM_BLOCKS)


def instance_over(runner: ModelRunner | ParallelRunner, copier: BlockCopier) -> Instance:
    """An instance whose pool is too small for what it is asked, so that it swaps and preempts."""
    index = functools.partial(RadixIndex, eviction=LRU())
    pool = BlockPool(NUM_BLOCKS, BLOCK_SIZE, index, num_dram_blocks=NUM_DRAM_BLOCKS, engine=AtOnce(copier))
    scheduler = LocalScheduler(pool, FCFS(), SwapOut(), Always(), token_budget=64, chunk_size=None, max_running=8)
    return Instance("colocated-0", Role.COLOCATED, scheduler, runner, Limits(512, 104, NUM_BLOCKS, BLOCK_SIZE))


def served(instance: Instance) -> dict:
    """Answers under pressure, two rounds over one prefix, and how many blocks were moved for it."""
    rng = np.random.default_rng(1)
    shared = rng.integers(0, 104, 30).tolist()
    prompts = {f"r{i}": shared + rng.integers(0, 104, 5 + 7 * i).tolist() for i in range(5)}
    rounds = [serve(instance, {f"{name}/{n}": p for name, p in prompts.items()}, 12) for n in range(2)]
    stats = instance.pool.stats()
    return {"rounds": rounds, "swapped": [stats.num_swapped_out, stats.num_swapped_in]}


def answer(model: Llama, directory: Path) -> None:
    """Every way to compute a batch, then an instance that swaps; each ends with a stop, and the next one begins."""
    tokens = {}
    for case in ENGINE_CASES:
        engine = engine_for(model, case)
        if model.shard.rank:
            follow(engine.runner, NothingToCopy(), IdleHand())
            continue
        followers = Followers(model.shard, model.device)
        engine.runner = ParallelRunner(engine.runner, followers)
        tokens[case] = answers(engine, case)
        followers.stop()
    runner, copier = parts_of_an_instance(model)
    if model.shard.rank:
        follow(runner, copier, IdleHand())
        return
    followers = Followers(model.shard, model.device)
    leading, copier = ParallelRunner(runner, followers), ParallelCopier(copier, followers)
    tokens["served"] = served(instance_over(leading, copier))
    tokens["layers"] = layers_of(leading, copier, model.config.num_layers)
    followers.stop()
    (directory / "tokens.json").write_text(json.dumps(tokens))


def lose_the_leader(model: Llama, directory: Path) -> None:
    """Rank 0 goes after a step; the other is told so by name."""
    engine = engine_for(model, "chunks")
    if model.shard.rank:
        expect_broken(lambda: follow(engine.runner, NothingToCopy(), IdleHand()))
        return
    engine.runner = ParallelRunner(engine.runner, Followers(model.shard, model.device))
    engine.generate([[1, 2, 3]], 2)
    os._exit(0)


def lose_the_follower(model: Llama, directory: Path) -> None:
    """Rank 1 goes at its third step; the leader is told so by name, in the middle of a batch or before it."""
    engine = engine_for(model, "chunks")
    if model.shard.rank:
        engine.runner = _GoingRunner(engine.runner)
        follow(engine.runner, NothingToCopy(), IdleHand())
    engine.runner = ParallelRunner(engine.runner, Followers(model.shard, model.device))
    expect_broken(lambda: engine.generate([[1, 2, 3]], 20))


class _GoingRunner:
    """Computes two batches, and takes its process with it at the next."""

    def __init__(self, runner: ModelRunner) -> None:
        self.model, self._runner, self._num_left = runner.model, runner, 2

    def forward_by_layer(self, batch):
        if not self._num_left:
            os._exit(0)
        self._num_left -= 1
        return self._runner.forward_by_layer(batch)


def fail_half_way(model: Llama, directory: Path) -> None:
    """The leader's sampler fails: followers wait for tokens that never come, so nothing more may be told them."""
    engine = MiniEngine(model, 4, sampler=_FailingSampler())
    if model.shard.rank:
        expect_broken(lambda: follow(engine.runner, NothingToCopy(), IdleHand()))
        return
    followers = Followers(model.shard, model.device)
    engine.runner = ParallelRunner(engine.runner, followers)
    try:
        engine.generate([[1, 2, 3]], 2)
    except InvalidLogits:
        expect_broken(lambda: engine.generate([[1, 2, 3]], 2))
        expect_broken(followers.stop)
        os._exit(0)


class _FailingSampler(Sampler):
    def sample(self, logits_RV, rows):
        raise InvalidLogits("row 0 of 1")


def layers_of(leading: ParallelRunner, copier: ParallelCopier, num_layers: int) -> list[int]:
    """What a leader yields while it computes a prompt by layer."""
    instance = instance_over(leading, copier)
    dispatch(instance, "r", [5, 6, 7], SamplingParams(max_tokens=4))
    layers = leading.forward_by_layer(instance.schedule(1))
    return [*(next(layers) for _ in range(num_layers)), *layers]


def expect_broken(action) -> None:
    try:
        action()
    except GroupBroken as error:
        print("GroupBroken:", error, flush=True)
        return
    raise AssertionError("nothing was broken")


STORIES = {
    "answer": answer,
    "lose_the_leader": lose_the_leader,
    "lose_the_follower": lose_the_follower,
    "fail_half_way": fail_half_way,
}


def main(rank: int, size: int, directory: Path, story: str) -> None:
    join(rank, size, directory)
    STORIES[story](model_of("qwen", None, GroupShard(dist.group.WORLD)), directory)
    os._exit(0)  # where a rank was lost, the group cannot be left in good order
