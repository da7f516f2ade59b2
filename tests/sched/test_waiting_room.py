"""In which order those who wait are asked, and who waits for a copy between the media.

The latter is in nobody's way, and comes back when the copy has ended.
"""

import functools

import numpy as np
import pytest
from mini_cluster import collect, dispatch, hash_answer, hash_instance

from memserve.kvcache import InVirtualTime
from memserve.messages import Abort
from memserve.request import Phase, Request
from memserve.sampling_params import SamplingParams
from memserve.sched.preemption import SwapOut
from memserve.sched.queue_policy import FCFS, LongestPrefixFirst
from memserve.sched.swap_policy import Never
from memserve.sched.waiting_room import WaitingRoom

ANSWER, LONG = (SamplingParams(max_tokens=n, ignore_eos=True) for n in (3, 12))
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


def num_cached(request):
    return len(request.prompt)


@pytest.mark.parametrize("queue", [FCFS(), LongestPrefixFirst()])
def test_the_first_of_the_order_is_asked_and_of_equal_ones_the_first_that_came(queue):
    rng = np.random.default_rng(0)
    room, expected = WaitingRoom(queue), []
    for step in range(1000):
        if rng.random() < 0.52 or not expected:
            prompt = np.zeros(int(rng.integers(1, 5)), dtype=np.int32)
            expected.append(Request(str(step), prompt, ANSWER, arrival_ns=int(rng.integers(20))))
            room.waiting.append(expected[-1])
        else:
            leaves = rng.choice(["the first", "any", "any, for a while"])
            gone = room.next(num_cached) if leaves == "the first" else expected[rng.integers(len(expected))]
            room.remove(gone)
            expected.remove(gone)
            if leaves == "any, for a while":
                room.waiting.append(gone)
                expected.append(gone)
        first = min(expected, key=lambda r: (queue.key(r, num_cached), r.arrival_ns), default=None)
        assert room.next(num_cached) is first
        assert len(room) == len(expected)


def test_the_order_of_arrival_computes_one_key_for_a_request(monkeypatch):
    num_keys, key = 0, FCFS.key

    def counted(self, request, num_cached):
        nonlocal num_keys
        num_keys += 1
        return key(self, request, num_cached)

    monkeypatch.setattr(FCFS, "key", counted)
    room, served = WaitingRoom(FCFS()), []
    for i in range(100):
        room.waiting.append(Request(str(i), WARM, ANSWER, arrival_ns=99 - i))
    while (request := room.next(num_cached)) is not None:
        room.remove(request)
        served.append(request.arrival_ns)
    assert served == list(range(100)) and num_keys == 100


def test_an_order_of_ones_own_may_look_at_the_index_even_if_it_extends_that_of_arrival():
    class CachedFirst(FCFS):
        def key(self, request, num_cached):
            return -num_cached(request)

    room, cached = WaitingRoom(CachedFirst()), {"a": 0, "b": 4}
    for name in cached:
        room.waiting.append(Request(name, WARM, ANSWER))
    assert room.next(lambda r: cached[r.request_id]).request_id == "b"
    cached["a"] = 8
    assert room.next(lambda r: cached[r.request_id]).request_id == "a"


def test_a_block_that_was_computed_anew_above_one_that_waits_with_its_request_is_not_room():
    """A swapped request comes up slowly; another one computes its first block meanwhile and is done."""
    engine = functools.partial(InVirtualTime, seconds_for=lambda num_blocks: 1e-6)
    tiers = {"num_blocks": 6, "num_dram_blocks": 3, "engine": engine, "preemption": SwapOut(), "swap": Never()}
    instance = hash_instance(**tiers)
    dispatch(instance, "older", np.arange(100, 111), LONG)
    dispatch(instance, "swapped", np.arange(8), LONG)
    assert [step(instance, now_ns) for now_ns in (1, 2)] == [["older", "swapped"]] * 2
    assert step(instance, 3) == ["older"], "its fourth block took the place of the others' three"
    instance.receive(Abort("older", 0))
    dispatch(instance, "again", np.arange(6), LONG)
    assert step(instance, 4) == ["again"] and instance.pool.num_swapping == 1
    instance.receive(Abort("again", 0))
    step(instance, 5)
    instance.check()  # of what is cached, a block in use is below one that is not
    assert instance.pool.num_available == 2, "the block above those that are coming up is not to be had"
