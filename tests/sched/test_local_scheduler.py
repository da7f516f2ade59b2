import numpy as np
import pytest
from mini_cluster import collect, dispatch, hash_answer, hash_instance, serve, sizes

from memserve.kvcache.eviction import LFU
from memserve.messages import Abort
from memserve.sampling_params import SamplingParams
from memserve.sched.queue_policy import FCFS, LongestPrefixFirst

ANSWER = SamplingParams(max_tokens=4, ignore_eos=True)


def test_a_step_never_exceeds_the_token_budget_and_decodes_go_first():
    instance = hash_instance(token_budget=10, block_size=4)
    dispatch(instance, "a", np.arange(8), ANSWER)
    dispatch(instance, "b", np.arange(100, 120), ANSWER)
    assert sizes(instance) == [("a", 8), ("b", 2)]
    assert sizes(instance) == [("a", 1), ("b", 9)]
    assert sizes(instance) == [("a", 1), ("b", 9)]
    assert sizes(instance) == [("a", 1), ("b", 1)]


def test_chunks_bound_what_one_request_computes_in_a_step():
    instance = hash_instance(token_budget=100, chunk_size=6)
    dispatch(instance, "a", np.arange(14), ANSWER)
    dispatch(instance, "b", np.arange(50, 57), ANSWER)
    assert [sizes(instance) for _ in range(3)] == [
        [("a", 6), ("b", 6)],
        [("b", 1), ("a", 6)],
        [("b", 1), ("a", 2)],
    ]


def test_no_more_run_at_once_than_max_running():
    instance = hash_instance(max_running=2)
    for name in "abc":
        dispatch(instance, name, np.arange(5), ANSWER)
    assert len(instance.schedule(0).requests) == 2


def test_blocks_enter_the_index_only_when_computed():
    instance = hash_instance(block_size=4, chunk_size=8)
    dispatch(instance, "a", np.arange(16), ANSWER)
    batch = instance.schedule(0)
    assert instance.pool.index.num_blocks == 0
    instance.commit(batch, instance.forward(batch), np.array([0]))
    assert instance.pool.index.num_blocks == 2


def test_two_requests_with_one_prompt_in_one_step_share_nothing_yet_and_answer_alike():
    instance = hash_instance(block_size=4)
    answers = serve(instance, {"a": np.arange(13), "b": np.arange(13)}, 5)
    assert answers["a"] == answers["b"] == hash_answer(np.arange(13), 5)
    assert instance.scheduler.counts.cached == 0


def test_longest_prefix_first_admits_what_is_cached_before_what_came_earlier():
    instance = hash_instance(block_size=4, queue=LongestPrefixFirst(), max_running=1)
    serve(instance, {"warm": np.arange(20)}, 1)
    dispatch(instance, "cold", np.arange(500, 520), ANSWER, now_ns=1)
    dispatch(instance, "warm-again", np.arange(20), ANSWER, now_ns=2)
    assert sizes(instance)[0][0] == "warm-again"


def test_a_request_that_waits_for_room_has_used_nothing_of_the_cache_yet():
    """Else a prefix would be the more often used the longer somebody waits for room, and lfu would keep it for that."""
    instance = hash_instance(block_size=4, num_blocks=14, eviction=LFU())
    serve(instance, {"once": np.arange(8)}, 1)
    for name in ("twice", "again"):
        serve(instance, {name: np.arange(500, 508)}, 1)
    dispatch(instance, "runs", np.arange(100, 133), SamplingParams(max_tokens=8, ignore_eos=True))
    sizes(instance)
    dispatch(instance, "waits", np.arange(40), ANSWER)
    for _ in range(5):
        assert [name for name, _ in sizes(instance)] == ["runs"]
    instance.pool.alloc(instance.pool.allocator.num_free + 2, ("test",))
    assert instance.pool.index.match(np.arange(500, 508, dtype=np.int32)).num_tokens == 8
    assert instance.pool.index.match(np.arange(8, dtype=np.int32)).num_tokens == 0


@pytest.mark.parametrize(("lookahead", "left"), [(0, (4, 16, 16)), (1, (16, 4, 16)), (2, (16, 16, 4))])
def test_what_the_next_requests_have_cached_goes_after_all_else(lookahead, left):
    """In the order in which they are asked, whatever was used last; and without having been used once more for it."""
    instance = hash_instance(block_size=4, num_blocks=18, max_running=1, lookahead=lookahead)
    prompts = [np.arange(start, start + 17) for start in (0, 100, 200)]
    for number, prompt in enumerate(prompts):
        serve(instance, {f"warm-{number}": prompt}, 1)
    dispatch(instance, "runs", np.arange(300, 333), ANSWER)  # nine blocks, of which six are free
    for number in (0, 1):
        dispatch(instance, f"waits-{number}", prompts[number], ANSWER, now_ns=1 + number)
    assert sizes(instance) == [("runs", 33)]
    index = instance.pool.index
    assert tuple(index.peek(prompt.astype(np.int32)).num_tokens for prompt in prompts) == left
    assert all(set(index.uses(prompt.astype(np.int32)).tolist()) == {1} for prompt in prompts)


@pytest.mark.parametrize("queue", [FCFS(), LongestPrefixFirst()])
def test_answers_are_the_same_whatever_is_kept_for_those_that_wait(queue):
    prompts = {f"r{n}": np.arange(20 * (n % 3), 20 * (n % 3) + 12 + n) for n in range(9)}
    for lookahead in (0, 1, 3, 100):
        options = {"block_size": 2, "num_blocks": 24, "max_running": 3, "num_dram_blocks": 4}
        instance = hash_instance(**options, queue=queue, lookahead=lookahead)
        for _ in range(2):
            answers = serve(instance, prompts, 5)
            assert answers == {name: hash_answer(prompt, 5) for name, prompt in prompts.items()}


def test_what_waits_for_room_is_not_in_the_pools_peak():
    instance = hash_instance(block_size=4, num_blocks=14)
    serve(instance, {"warm": np.arange(21)}, 1)
    dispatch(instance, "runs", np.arange(100, 130), SamplingParams(max_tokens=3, ignore_eos=True))
    sizes(instance)
    dispatch(instance, "waits", np.arange(41), ANSWER)
    assert [name for name, _ in sizes(instance)] == ["runs"] and instance.pool.stats().peak_used == 8


def test_who_has_its_kv_here_runs_while_one_that_was_preempted_before_it_finds_no_room():
    """Its blocks are of no use to anybody else: it stood still for a minute, where most of the pool was such blocks."""
    instance = hash_instance(block_size=4, num_blocks=12, index="none")
    for name in "bac":
        dispatch(instance, name, np.arange(8 if name == "b" else 16), SamplingParams(max_tokens=12, ignore_eos=True))
    sizes(instance)
    b = next(request for request in instance.scheduler.running if request.request_id == "b")
    instance.scheduler.stop(b)
    while not instance.scheduler.counts.preemptions:
        sizes(instance)
    instance.scheduler.adopt(b)
    assert [request.request_id for request in instance.scheduler.room.returning] == ["c", "b"]
    assert [name for name, _ in sizes(instance)] == ["a", "b"]
    answers, finished = collect(instance)
    assert set(finished) == {"a", "b", "c"} and answers["b"] == hash_answer(np.arange(8), 12)


def test_the_youngest_is_preempted_and_comes_back_before_the_queue():
    instance = hash_instance(block_size=2, num_blocks=8, max_running=2)
    for i, name in enumerate("abc"):
        dispatch(instance, name, np.arange(10 * i, 10 * i + 6), SamplingParams(max_tokens=6, ignore_eos=True), i)
    order = []
    while instance.num_unfinished or instance.has_inbox:
        order += [name for name, n in sizes(instance) if n > 1]
        instance.check()
    assert order[:3] == ["a", "b", "b"] and order[-1] == "c"
    assert instance.scheduler.counts.preemptions >= 1


@pytest.mark.parametrize("when", ["waiting", "prefilling", "decoding", "before it came", "after its end"])
def test_an_abort_frees_everything_and_disturbs_nobody(when):
    instance = hash_instance(block_size=4, chunk_size=8, max_running=1 if when == "waiting" else 8)
    prompts = {"other": np.arange(100, 121), "gone": np.arange(30)}
    steps = {"waiting": 1, "prefilling": 2, "decoding": 5, "before it came": 0, "after its end": 8}[when]
    if when == "before it came":
        instance.receive(Abort("gone", 0))
    for name, prompt in prompts.items():
        dispatch(instance, name, prompt, SamplingParams(max_tokens=5, ignore_eos=True))
    for _ in range(steps):
        sizes(instance)
    if when != "before it came":
        instance.receive(Abort("gone", 0))
    _, finished = collect(instance)
    assert finished["other"].reason == "length"
    assert finished["gone"].reason == ("length" if when in ("before it came", "after its end") else "aborted")
    stats = instance.pool.stats()
    assert stats.num_free + stats.num_evictable == stats.num_blocks


def test_what_an_aborted_request_computed_stays_cached_and_correct():
    instance = hash_instance(block_size=4, chunk_size=8)
    dispatch(instance, "gone", np.arange(30), ANSWER)
    sizes(instance), sizes(instance)
    instance.receive(Abort("gone", 0))
    collect(instance)
    assert serve(instance, {"b": np.arange(30)}, 4)["b"] == hash_answer(np.arange(30), 4)
    assert instance.scheduler.counts.cached == 16


REFUSALS = [
    ([], {}, "empty prompt"),
    (range(60), {}, "context of 60 tokens"),
    ([5, 1000], {}, "token 1000: expected 0 to 999"),
    (range(40), {"max_tokens": 20}, "need 15 blocks of 4 tokens: the pool has 12"),
    ([1], {"stop": ("x",)}, "need a tokenizer"),
]


@pytest.mark.parametrize(("prompt", "params", "message"), REFUSALS)
def test_a_request_that_can_never_be_served_is_refused_by_name_and_alone(prompt, params, message):
    instance = hash_instance(block_size=4, num_blocks=12, max_context=60)
    dispatch(instance, "good", np.arange(9), ANSWER)
    dispatch(instance, "bad", np.array(list(prompt)), SamplingParams(ignore_eos=True, **{"max_tokens": 4, **params}))
    answers, finished = collect(instance)
    assert finished["bad"].reason == "refused" and message in finished["bad"].detail
    assert answers == {"good": hash_answer(np.arange(9), 4)}


def test_the_context_ends_an_answer_that_would_pass_it():
    instance = hash_instance(max_context=20)
    assert serve(instance, {"a": np.arange(15)}, 100)["a"] == hash_answer(np.arange(15), 5)


def test_stop_tokens_and_eos_end_an_answer_and_ignore_eos_does_not():
    answer = hash_answer(np.arange(9), 6)
    for params, length in [
        (SamplingParams(max_tokens=6, stop_token_ids=(answer[3],), ignore_eos=True), 4),
        (SamplingParams(max_tokens=6), 2),
        (SamplingParams(max_tokens=6, ignore_eos=True), 6),
    ]:
        instance = hash_instance()
        instance._eos_token_ids = frozenset({answer[1]})
        dispatch(instance, "a", np.arange(9), params)
        answers, finished = collect(instance)
        assert answers["a"] == answer[:length]
        assert finished["a"].reason == ("length" if length == 6 else "stop")
