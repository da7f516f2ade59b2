"""Who comes first where requests have priorities: in the waiting room, at admission, and when blocks run out."""

import functools
import itertools

import numpy as np
import pytest
from mini_cluster import collect, dispatch, hash_answer, hash_instance, sizes

from memserve.kvcache import InVirtualTime
from memserve.request import Request
from memserve.sampling_params import SamplingParams
from memserve.sched.batching import Mixed, PrefillFirst
from memserve.sched.preemption import Recompute, SwapOut
from memserve.sched.queue_policy import FCFS, LongestPrefixFirst, Priority, QueuePolicy
from memserve.sched.waiting_room import WaitingRoom

ANSWER, LONG = (SamplingParams(max_tokens=n, ignore_eos=True) for n in (3, 12))


def request(name, priority=0, arrival_ns=0):
    return Request(name, np.zeros(4, dtype=np.int32), ANSWER, arrival_ns=arrival_ns, priority=priority)


def admitted(instance, names="abcdef"):
    """Requests in the order of their first step."""
    seen = {}
    while instance.num_unfinished or instance.has_inbox:
        seen |= dict.fromkeys(name for name, _ in sizes(instance))
        instance.check()
    return "".join(name for name in seen if name in names)


def test_the_smallest_priority_is_served_first_and_of_equal_ones_whoever_came_first():
    instance = hash_instance(queue=Priority(), max_running=1)
    for name, priority, now_ns in (("a", 1, 0), ("b", 0, 2), ("c", -7, 3), ("d", 0, 1), ("e", 1, 0)):
        dispatch(instance, name, np.arange(5), ANSWER, now_ns, priority)
    assert admitted(instance) == "cdbae"


@pytest.mark.parametrize("queue", [FCFS, LongestPrefixFirst])
def test_other_orders_do_not_look_at_priorities(queue):
    def steps(priorities):
        instance = hash_instance(block_size=2, num_blocks=14, max_running=4, queue=queue())
        for i, priority in enumerate(priorities):
            dispatch(instance, str(i), np.arange(3 * i, 3 * i + 6), LONG, i, priority)
        batches = []
        while instance.num_unfinished or instance.has_inbox:
            batches.append(sizes(instance))
        assert instance.scheduler.counts.preemptions > 0
        return batches

    assert steps([0] * 8) == steps([3, -1, 7, 0, -9, 2, 2, 5])


def test_the_least_urgent_is_preempted_first_and_of_equal_ones_whoever_came_last():
    running = [request("a", 1, 5), request("b", 2, 9), request("c", 2, 3), request("d", 0, 99), request("e", 2, 9)]
    order = []
    while running:
        running.remove(victim := Priority().victim(running))
        order.append(victim.request_id)
    assert order == ["e", "b", "c", "a", "d"]
    assert FCFS().victim([request("x", 5, 9), request("y", 0, 1)]).request_id == "y", "the one admitted last"


def test_an_urgent_request_keeps_its_blocks_and_is_never_preempted_for_one_admitted_before_it():
    instance = hash_instance(block_size=2, num_blocks=9, queue=Priority())
    dispatch(instance, "batch", np.arange(6), LONG, 0, priority=1)
    sizes(instance)
    dispatch(instance, "chat", np.arange(50, 56), LONG, 1, priority=0)
    ends = []
    while instance.num_unfinished:
        ends += [name for name, _ in sizes(instance)]
        instance.check()
    assert instance.scheduler.counts.preemptions > 0 and ends[-1] == "batch"
    assert ends.count("chat") == 12, "a prefill, then a token a step"


def test_nobody_who_runs_is_preempted_for_a_more_urgent_one_that_waits():
    instance = hash_instance(block_size=4, num_blocks=5, queue=Priority())
    dispatch(instance, "batch", np.arange(8), LONG, 0, priority=1)
    sizes(instance)
    dispatch(instance, "chat", np.arange(50, 62), ANSWER, 1, priority=0)
    order = []
    while instance.num_unfinished:
        order += [name for name, _ in sizes(instance)]
    assert order == ["batch"] * 11 + ["chat"] * 3 and instance.scheduler.counts.preemptions == 0


def test_a_preempted_request_goes_before_new_ones_of_its_priority_and_after_more_urgent_ones():
    room = WaitingRoom(Priority())
    for name, priority, arrival_ns in (("new 0", 0, 9), ("new 1", 1, 0), ("new 2", 2, 0)):
        room.waiting.append(request(name, priority, arrival_ns))
    for name, priority in (("back 2", 2), ("back 1", 1), ("back 1 later", 1)):
        room.put_first(request(name, priority, 5))
    room.put_last(request("handed over 1", 1))
    order = []
    while (first := room.next(lambda r: 0)) is not None:
        order.append(first.request_id)
        room.remove(first)
    assert order == ["new 0", "back 1 later", "back 1", "handed over 1", "new 1", "back 2", "new 2"]


class MostCachedOfALevel(QueuePolicy):
    """Every other request is urgent, and of a level the longest prompt comes first."""

    def key(self, request, num_cached):
        return -num_cached(request)

    def level(self, request):
        return request.arrival_ns % 2


@pytest.mark.parametrize("queue", [Priority(), MostCachedOfALevel()])
def test_whoever_is_asked_next_is_the_first_of_the_order_whatever_came_and_went(queue):
    rng, num_cached = np.random.default_rng(0), lambda r: len(r.prompt)
    room, new, back = WaitingRoom(queue), [], []
    for step in range(1500):
        if rng.random() < 0.5 or not new + back:
            prompt, arrival_ns = np.zeros(int(rng.integers(1, 5)), dtype=np.int32), int(rng.integers(20))
            made = Request(str(step), prompt, ANSWER, arrival_ns=arrival_ns, priority=int(rng.integers(3)))
            where = rng.integers(3)
            (new.append, lambda r: back.insert(0, r), back.append)[where](made)
            (room.waiting.append, room.put_first, room.put_last)[where](made)
        else:
            gone = room.next(num_cached) if rng.random() < 0.6 else (new + back)[rng.integers(len(new + back))]
            room.remove(gone)
            (new if gone in new else back).remove(gone)
        new_first = sorted(new, key=lambda r: (queue.level(r), queue.key(r, num_cached), r.arrival_ns))
        in_order = sorted(sorted(back, key=queue.level)[:1] + new_first[:1], key=queue.level)
        assert room.next(num_cached) is (in_order[0] if in_order else None)
        assert len(room) == len(new) + len(back)


class NoLevel(Priority):
    def level(self, request):
        return float("nan")


def test_a_level_that_is_no_number_is_refused_by_name():
    instance = hash_instance(queue=NoLevel())
    dispatch(instance, "a", np.arange(5), ANSWER)
    with pytest.raises(ValueError, match=r"NoLevel\.level gave nan of 'a': expected a number"):
        instance.schedule(0)


def step(instance, now_ns):
    """Computes one; those that it has admitted."""
    ran = set(map(id, instance.scheduler.running))
    batch = instance.schedule(now_ns)
    if batch is not None:
        instance.commit(batch, instance.forward(batch), np.array([now_ns]))
    instance.check()
    return [request for request in instance.scheduler.running if id(request) not in ran]


@pytest.mark.parametrize("batching", [Mixed, PrefillFirst])
@pytest.mark.parametrize("preemption", [Recompute, SwapOut])
def test_answers_are_right_and_nobody_is_admitted_before_a_more_urgent_one(preemption, batching):
    num_preemptions = 0
    for seed, (chunk, beside, index) in enumerate(itertools.product((None, 5), (False, True), ("radix", "none"))):
        rng = np.random.default_rng(seed)
        engine = {"engine": functools.partial(InVirtualTime, seconds_for=lambda n: 2e-9 * n)} if beside else {}
        instance = hash_instance(
            index=index, block_size=4, num_blocks=16, num_dram_blocks=12, token_budget=24, chunk_size=chunk,
            max_running=5, queue=Priority(), preemption=preemption(), batching=batching(), **engine,
        )  # fmt: skip
        stem, expected, room = rng.integers(0, 1000, 20), {}, instance.scheduler.room
        for i, priority in enumerate(rng.permutation(np.arange(18) % 3).tolist()):
            prompt = np.concatenate([stem[: rng.integers(21)], rng.integers(0, 1000, rng.integers(1, 25))])
            params = SamplingParams(max_tokens=int(rng.integers(1, 20)), ignore_eos=True)
            expected[str(i)] = hash_answer(prompt, params.max_tokens)
            dispatch(instance, str(i), prompt, params, i, priority)
            for _ in range(rng.integers(4)):
                before, came = instance.scheduler.counts.preemptions, step(instance, i)
                left = room.next(instance.scheduler.num_cached)
                if left is not None and instance.scheduler.counts.preemptions == before:
                    assert all(request.priority <= left.priority for request in came)
        assert collect(instance)[0] == expected, (chunk, beside, index)
        num_preemptions += instance.scheduler.counts.preemptions
    assert num_preemptions > 10
