"""Workers: a leader and its followers, real processes, are one instance; and whoever is left alone is told by name."""

import json

import numpy as np
import pytest
import torch
from cluster import worker_ranks
from cluster.worker_ranks import ENGINE_CASES, instance_over, parts_of_an_instance, served
from parallel_models import answers, engine_for, model_of
from ranks import launch

from memserve.cluster.worker import Followers, ParallelRunner, _batch, _compute
from memserve.model.batch import build_forward_batch
from memserve.model.parallel import WHOLE, GroupBroken
from memserve.request import Request, ScheduledBatch
from memserve.sampling_params import SamplingParams

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def led(tmp_path_factory) -> dict:
    """What a leader and its followers answered, all in one launch."""
    directory = tmp_path_factory.mktemp("answer")
    ended = launch(worker_ranks.main, 2, directory, "answer")
    assert {e.returncode for e in ended} == {0}, "\n".join(e.output for e in ended)
    return json.loads((directory / "tokens.json").read_text())


@pytest.mark.parametrize("case", ENGINE_CASES)
def test_a_leader_with_followers_gives_the_tokens_of_one_rank(led, case) -> None:
    assert led[case] == answers(engine_for(model_of("qwen", None), case), case)


def test_an_instance_that_swaps_and_preempts_gives_the_answers_of_one_rank(led) -> None:
    alone = served(instance_over(*parts_of_an_instance(model_of("qwen", None))))
    assert min(alone["swapped"]) > 10, "no pressure"
    assert led["served"] == alone


def test_layers_are_yielded_by_a_leader_too(led) -> None:
    assert led["layers"] == [0, 1, 2]


@pytest.mark.parametrize(
    ("story", "told"), [("lose_the_leader", [1]), ("lose_the_follower", [0]), ("fail_half_way", [0, 1])]
)
def test_a_rank_that_is_left_alone_is_told_by_name(tmp_path, story, told) -> None:
    ended = launch(worker_ranks.main, 2, tmp_path, story)
    assert {e.returncode for e in ended} == {0}, "\n".join(e.output for e in ended)
    assert [rank for rank, e in enumerate(ended) if "GroupBroken" in e.output] == told
    if story == "fail_half_way":
        assert "left Compute half-way" in ended[0].output


def request_of(num_tokens: int, num_computed: int) -> Request:
    request = Request(f"r{num_tokens}", np.arange(100, 100 + num_tokens, dtype=np.int32), SamplingParams())
    request.num_computed = num_computed
    request.block_table.extend(np.arange(num_tokens, 2 * num_tokens, dtype=np.int32))
    return request


@pytest.mark.parametrize(
    ("requests", "num_new", "num_steps"),
    [
        ([request_of(9, 0)], [9], 1),
        ([request_of(9, 0)], [5], 1),
        ([request_of(9, 8), request_of(30, 7), request_of(17, 16)], [1, 20, 1], 1),
        ([request_of(9, 8), request_of(17, 16)], [1, 1], 7),
        ([request_of(20_000, 0)], [20_000], 1),
    ],
)
def test_a_batch_that_was_told_is_the_batch(requests, num_new, num_steps) -> None:
    batch = ScheduledBatch(requests, num_new, num_steps)
    told = _batch(_compute(batch, 4))
    assert (told.num_new, told.num_steps, told.samples) == (num_new, num_steps, batch.samples)
    expected, got = (vars(build_forward_batch(b, 4, CPU)) for b in (batch, told))
    for name, value in expected.items():
        assert np.array_equal(got[name], value) if isinstance(value, np.ndarray | torch.Tensor) else got[name] == value


def test_leading_without_followers_is_running_alone() -> None:
    model = model_of("qwen", None)
    engine = engine_for(model, "chunks")
    engine.runner = ParallelRunner(engine.runner, Followers(WHOLE, model.device))
    assert answers(engine, "chunks") == answers(engine_for(model, "chunks"), "chunks")


def test_a_batch_that_is_left_half_way_is_the_last() -> None:
    model = model_of("qwen", None)
    engine = engine_for(model, "chunks")
    leader = ParallelRunner(engine.runner, Followers(WHOLE, model.device))
    layers = leader.forward_by_layer(ScheduledBatch([request_of(3, 0)], [3]))
    next(layers)
    layers.close()
    with pytest.raises(GroupBroken, match="left Compute half-way"):
        leader.forward(ScheduledBatch([request_of(3, 0)], [3]))


def test_followers_that_were_stopped_are_told_nothing_more() -> None:
    model = model_of("qwen", None)
    followers = Followers(WHOLE, model.device)
    leader = ParallelRunner(engine_for(model, "chunks").runner, followers)
    followers.stop()
    with pytest.raises(GroupBroken, match="were stopped"):
        leader.forward(ScheduledBatch([request_of(3, 0)], [3]))
