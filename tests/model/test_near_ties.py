"""Near ties: which tokens of a run rounding alone might have chosen, counted as they are sampled."""

import numpy as np
import pytest
import torch

from memserve import LocalCluster, load_config
from memserve.config.errors import ConfigError
from memserve.model import near_ties
from memserve.model.near_ties import NEAR_TIE, NearTieCounter
from memserve.model.penalties import History
from memserve.model.sampler import Sampler, SamplingRow
from memserve.sampling_params import SamplingParams

GREEDY, DRAWN = SamplingParams(), SamplingParams(temperature=1.0)
NEAR, APART = [0.0, 2.0, 2.0 + NEAR_TIE / 2, -1.0], [0.0, 2.0, 2.0 + NEAR_TIE * 2, -1.0]


def count(logits, params, histories=()):
    counter, logits_RV = NearTieCounter(), torch.tensor(logits)
    rows = [SamplingRow(p, seed=3, position=i) for i, p in enumerate(params)]
    for i, history in enumerate(histories):
        rows[i] = SamplingRow(params[i], seed=3, position=i, history=history)
    tokens, _ = counter.sample(logits_RV, rows)
    assert np.array_equal(tokens, Sampler().sample(logits_RV, rows)[0])
    return counter.num_near_ties


def test_greedy_rows_whose_best_two_logits_almost_coincide_count():
    assert count([NEAR, APART, NEAR], [GREEDY] * 3) == 2
    assert count([[5.0, 5.0, 1.0]], [GREEDY]) == 1


def test_drawn_rows_are_no_near_ties():
    assert count([NEAR, NEAR, APART], [DRAWN, GREEDY, GREEDY]) == 1
    assert count([NEAR, NEAR], [DRAWN, DRAWN]) == 0


def test_logits_are_compared_as_they_are_chosen_from_after_penalties():
    penalised = SamplingParams(presence_penalty=1.0)
    history = History(np.array([0], dtype=np.int32), np.array([2], dtype=np.int32))
    assert count([NEAR], [penalised], [history]) == 0
    assert count([[0.0, 2.0, 3.0, -1.0]], [penalised], [history]) == 1


def test_counts_add_up_over_steps_and_a_plain_sampler_has_none():
    counter = NearTieCounter()
    for _ in range(3):
        counter.sample(torch.tensor([NEAR]), [SamplingRow(GREEDY, 0, 0)])
    assert counter.num_near_ties == 3 and Sampler().num_near_ties is None


RUN = ["model=tiny", "step_time=model", "workload.num_sessions=2", "workload.max_turns=2",
       "workload.max_output_tokens=6"]  # fmt: skip


@pytest.mark.parametrize("system", [["cluster=colocated_2"], ["cluster=1p1d", "mode=pd_caching_3"]])
def test_a_report_has_the_near_ties_of_all_tokens_that_instances_generated(system, monkeypatch):
    monkeypatch.setattr(near_ties, "NEAR_TIE", float("inf"))
    report = LocalCluster(load_config([*RUN, *system])).run()
    tokens = report["tokens"]
    assert report["near_ties"] == tokens["generated"] + tokens["generated_in_vain"] > 0


@pytest.mark.parametrize(
    ("word", "near_ties"),
    [("seed=0", 0), ("model.near_ties=false", None), ("model.dtype=bfloat16", None), ("exec=simulated", 0)],
)
def test_a_report_has_no_number_of_near_ties_where_nobody_counts(word, near_ties):
    assert LocalCluster(load_config([*RUN, "cluster=colocated_1", word])).run()["near_ties"] == near_ties


@pytest.mark.parametrize("word", ["exec=simulated", "model.dtype=bfloat16"])
def test_near_ties_are_of_a_model_in_float32(word):
    with pytest.raises(ConfigError, match=r"model\.near_ties=true contradicts"):
        load_config([word, "model.near_ties=true"])
