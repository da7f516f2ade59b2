"""Who shares a step: answers with prompts, or nobody with prompts."""

import numpy as np
import pytest
from mini_cluster import dispatch, hash_instance, sizes

from memserve import LocalCluster, load_config
from memserve.request import SamplingParams
from memserve.sched.batching import PrefillFirst

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
