"""Who waits for a copy between the media is in nobody's way, and comes back when it has ended."""

import functools

import numpy as np
from mini_cluster import collect, dispatch, hash_answer, hash_instance

from memserve.kvcache import InVirtualTime
from memserve.messages import Abort
from memserve.request import Phase, SamplingParams
from memserve.sched.preemption import SwapOut

ANSWER = SamplingParams(max_tokens=3, ignore_eos=True)
WARM, OTHER = np.arange(16), np.arange(500, 512)


def with_warm_prompt_in_dram():
    """An instance that has WARM cached in DRAM; a block takes 10 ns to come up."""
    engine = functools.partial(InVirtualTime, seconds_for=lambda num_blocks: 10e-9 * num_blocks)
    instance = hash_instance(num_blocks=30, num_dram_blocks=30, engine=engine, preemption=SwapOut())
    dispatch(instance, "first", WARM, ANSWER)
    collect(instance)
    instance.pool.swap_out(30)
    instance.pool.wait()
    return instance


def step(instance, now_ns):
    """Ids of who was computed."""
    batch = instance.schedule(now_ns)
    if batch is None:
        return []
    instance.commit(batch, instance.forward(batch), np.array([now_ns]))
    instance.check()
    return [request.request_id for request in batch.requests]


def test_others_run_while_a_prompt_comes_up_and_it_computes_only_what_was_not_cached():
    instance = with_warm_prompt_in_dram()
    dispatch(instance, "warm", WARM, ANSWER, now_ns=100)
    dispatch(instance, "other", OTHER, ANSWER, now_ns=100)
    assert step(instance, 100) == ["other"]
    assert step(instance, 110) == ["other"] and instance.pool.num_swapping == 1
    computed = instance.scheduler.counts.computed
    assert step(instance, 140) == ["other", "warm"]
    assert instance.scheduler.counts.computed == computed + 4, "three blocks of four came from the cache"
    answers, _ = collect(instance)
    assert answers["warm"] == hash_answer(WARM, 3)


def test_two_that_share_what_comes_up_wait_for_one_copy():
    instance = with_warm_prompt_in_dram()
    dispatch(instance, "a", WARM, ANSWER, now_ns=100)
    dispatch(instance, "b", np.append(WARM, 7), ANSWER, now_ns=100)
    assert step(instance, 100) == [] and instance.pool.num_swapping == 1
    assert [request.phase for request in instance.scheduler.room.holders()] == [Phase.SWAPPING_IN] * 2
    answers, _ = collect(instance)
    assert answers["a"][-3:] == hash_answer(WARM, 3) and answers["b"] == hash_answer(np.append(WARM, 7), 3)
    assert instance.pool.stats().num_swapped_in <= 4


def test_a_request_that_is_aborted_while_it_waits_for_a_copy_leaves_nothing_behind():
    instance = with_warm_prompt_in_dram()
    dispatch(instance, "warm", WARM, ANSWER, now_ns=100)
    assert step(instance, 100) == []
    instance.receive(Abort("warm", 0))
    assert step(instance, 101) == [] and instance.num_unfinished == 0
    instance.pool.wait()
    instance.check()
    stats = instance.pool.stats()
    assert stats.num_free + stats.num_evictable == 30 and stats.num_free_dram + stats.num_evictable_dram == 30
