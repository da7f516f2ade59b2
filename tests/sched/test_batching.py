"""Who shares a step: answers with prompts, or nobody with prompts."""

import numpy as np
import pytest
from mini_cluster import collect, dispatch, hash_answer, hash_instance, sizes

from memserve import LocalCluster, load_config
from memserve.sampling_params import SamplingParams
from memserve.sched.batching import Batching, Mixed, PrefillFirst
from memserve.sched.preemption import SwapOut

ANSWER = SamplingParams(max_tokens=4, ignore_eos=True)


def test_prompts_go_first_and_answers_have_steps_of_their_own():
    instance = hash_instance(token_budget=10, block_size=4, batching=PrefillFirst())
    dispatch(instance, "a", np.arange(8), ANSWER)
    assert sizes(instance) == [("a", 8)]
    dispatch(instance, "b", np.arange(100, 118), ANSWER)
    dispatch(instance, "c", np.arange(200, 203), ANSWER)
    assert [sizes(instance) for _ in range(3)] == [[("b", 10)], [("b", 8), ("c", 2)], [("c", 1)]]
    assert sizes(instance) == [("a", 1), ("b", 1), ("c", 1)]
    dispatch(instance, "d", np.arange(9), ANSWER)
    assert sizes(instance) == [("d", 1)], "one token of it is not cached: a prompt all the same"
    assert sizes(instance) == [("a", 1), ("b", 1), ("c", 1), ("d", 1)]


def test_a_prompt_that_finds_no_room_keeps_no_answer_waiting():
    instance = hash_instance(num_blocks=6, block_size=4, batching=PrefillFirst())
    dispatch(instance, "a", np.arange(17), ANSWER)
    assert sizes(instance) == [("a", 17)]
    dispatch(instance, "b", np.arange(100, 112), ANSWER)
    assert [sizes(instance) for _ in range(4)] == [[("a", 1)], [("a", 1)], [("a", 1)], [("b", 12)]]


def test_who_gives_a_request_twice_is_named():
    class Doubling(PrefillFirst):
        def first(self, running):
            return super().first(running) * 2

    instance = hash_instance(block_size=4, token_budget=100, chunk_size=4, batching=Doubling())
    dispatch(instance, "a", np.arange(16), ANSWER)
    with pytest.raises(ValueError, match="Doubling gives a request twice"):
        sizes(instance)


def test_who_leaves_out_all_that_run_is_named():
    class PromptsAlone(PrefillFirst):
        def otherwise(self, running):
            return []

    instance = hash_instance(block_size=4, batching=PromptsAlone())
    dispatch(instance, "a", np.arange(16), ANSWER)
    assert sizes(instance) == [("a", 16)]
    with pytest.raises(ValueError, match="PromptsAlone leaves out 'a', and no other runs"):
        sizes(instance)


@pytest.mark.parametrize("words", [["cluster=colocated_1"], ["cluster=1p1d", "mode=pd_caching_3"]])
def test_of_colocated_answers_alone_it_makes_the_tokens_come_unevenly(words):
    workload = ["workload=synthetic", "workload.num_sessions=60", "workload.rate=20", "workload.prompt_tokens=512"]
    found = {}
    for batching in ("mixed", "prefill_first"):
        cfg = load_config(["exec=simulated", *workload, "sched.chunk_size=256", *words, f"batching={batching}"])
        found[batching] = LocalCluster(cfg).run()
    longest = {name: report["tpot_s"]["p99"] for name, report in found.items()}
    assert (longest["prefill_first"] > 1.2 * longest["mixed"]) == (words == ["cluster=colocated_1"])
    assert {report["num_finished"] for report in found.values()} == {60}


class YoungestFirst(Batching):
    """Who came last is served first, which is fair to nobody and allowed."""

    def first(self, running):
        return list(reversed(running))

    def otherwise(self, running):
        return []


class YoungestAlone(YoungestFirst):
    def first(self, running):
        return running[-1:]

    def otherwise(self, running):
        return running[:-1]


def test_who_is_preempted_by_an_older_one_and_comes_back_in_the_same_step_is_not_taken_for_given_twice():
    instance = hash_instance(num_blocks=9, block_size=4, batching=YoungestFirst())
    for name in "ab":  # one prompt, computed twice at once: what "b" then has of its own it does not need
        dispatch(instance, name, np.arange(16), ANSWER)
    assert sizes(instance) == [("a", 16), ("b", 16)]
    assert sizes(instance) == [("a", 1), ("b", 1)], "it gave 'b' first, took its blocks for 'a', and 'b' had room still"
    instance.check()
    assert instance.scheduler.counts.preemptions == 1
    answers, _ = collect(instance)
    assert answers == {name: hash_answer(range(16), 4) for name in "ab"}


def test_who_runs_on_when_the_others_have_found_no_room_is_asked_for_again():
    instance = hash_instance(num_blocks=8, block_size=4, batching=YoungestAlone())
    dispatch(instance, "a", np.arange(15), ANSWER)
    assert sizes(instance) == [("a", 15)]
    dispatch(instance, "b", np.arange(100, 116), ANSWER)
    assert sizes(instance) == [("a", 1), ("b", 16)]
    assert sizes(instance) == [("a", 1)], "'b' needs a ninth block: it goes, and 'a' is the youngest now"
    instance.check()


def test_what_a_preempted_request_took_of_the_budget_is_there_for_others():
    instance = hash_instance(num_blocks=12, block_size=4, token_budget=10, chunk_size=9, batching=YoungestFirst())
    dispatch(instance, "a", np.arange(5), ANSWER)
    dispatch(instance, "b", np.arange(100, 103), ANSWER)
    assert sizes(instance) == [("a", 5), ("b", 3)]
    dispatch(instance, "c", np.arange(200, 236), ANSWER)
    assert sizes(instance) == [("b", 1), ("a", 1), ("c", 8)]
    assert sizes(instance) == [("b", 1), ("a", 1)], "'c' had 9 tokens of 10 until 'b' needed its blocks"
    instance.check()


class Noting(SwapOut):
    def __init__(self):
        self.preempted = []

    def preempt(self, request, pool):
        self.preempted.append(request.request_id)
        super().preempt(request, pool)


@pytest.mark.parametrize(
    ("block_size", "num_blocks", "prompts", "max_tokens"),
    [(2, 8, [2] * 5, 9), (2, 10, [2] * 6, 9), (4, 7, [2, 3, 4, 5, 6], 14)],
)
@pytest.mark.parametrize("batching", [Mixed, PrefillFirst])
def test_nobody_comes_back_and_is_preempted_in_one_step(batching, block_size, num_blocks, prompts, max_tokens):
    """With PrefillFirst who comes back does so before others have the blocks for the tokens that they have got."""
    noting, params = Noting(), SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    tiers = {"num_blocks": num_blocks, "num_dram_blocks": 40, "block_size": block_size, "preemption": noting}
    instance = hash_instance(**tiers, batching=batching())
    for number, num_tokens in enumerate(prompts):
        dispatch(instance, str(number), np.arange(100 * number, 100 * number + num_tokens), params)
    while instance.num_unfinished or instance.has_inbox:
        ran = {request.request_id for request in instance.scheduler.running}
        noting.preempted.clear()
        sizes(instance)
        assert set(noting.preempted) <= ran
        instance.check()
    assert instance.pool.stats().num_swapped_in > 0
