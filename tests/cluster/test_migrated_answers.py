"""Answers that migrate go on as they would have: draws, penalties, log-probabilities, stop strings; real models too."""

import dataclasses
import functools
from typing import ClassVar

import msgspec
import numpy as np
import pytest
from cluster.playing import nothing_is_left
from cluster.test_migration import MIGRATE, THREE, drained, migrations_of
from weights_once import weights_loaded_once

from memserve import LocalCluster, load_config
from memserve.cluster import local as cluster_local
from memserve.workload.synthetic import SyntheticWorkload

SYNTHETIC = [
    "workload.num_sessions=4", "workload.num_turns=2", "workload.prompt_tokens=40", "workload.turn_tokens=15",
    "workload.max_output_tokens=16", "workload.rate=100", "workload.think_time_s=0.05",
]  # fmt: skip
TINY = ["exec=emulated", "step_time=model", "model=tiny", "model.num_threads=1", "workload=synthetic", *SYNTHETIC]
HASH = ["exec=simulated", "workload=synthetic", *SYNTHETIC, "workload.max_output_tokens=200"]


@pytest.fixture(scope="module", autouse=True)
def one_llama():
    with weights_loaded_once(cluster_local):
        yield


class Changed(SyntheticWorkload):
    """The same prompts, asked for with `changes`."""

    changes: ClassVar[dict] = {}

    def sessions(self, tokenizer, seed):
        for session in super().sessions(tokenizer, seed):
            turns = [
                dataclasses.replace(turn, params=msgspec.structs.replace(turn.params, **self.changes))
                for turn in session.turns
            ]
            yield dataclasses.replace(session, turns=tuple(turns))


class Stops(Changed):
    changes: ClassVar[dict] = {"stop": ("e", "Q ", "7")}


class Tells(Changed):
    changes: ClassVar[dict] = {
        "logprobs": 2, "temperature": 0.8, "top_k": 40, "min_p": 0.01, "repetition_penalty": 1.2,
        "frequency_penalty": 0.4,
    }  # fmt: skip


def play(words, act=lambda cluster, number: None):
    cluster, number = LocalCluster(load_config(words)).cluster(), 0
    while cluster.advance():
        number += 1
        act(cluster, number)
    nothing_is_left(cluster)
    timelines = cluster.scheduler.timelines
    assert all(timeline.succeeded and timeline.attempt == 0 for timeline in timelines.values())
    return timelines


@functools.cache
def expected(words):
    return play([*words, "cluster=colocated_1", "index=none"])


def same_when_it_migrates(words, name, moments, more=()):
    """The answers of who is drained at these moments, and how many migrated."""
    num_done = 0
    for moment in moments:
        timelines = play([*words, *THREE[name], *MIGRATE, *more], drained(moment))
        for request_id, timeline in timelines.items():
            alone = expected(tuple(words))[request_id]
            assert timeline.token_ids.tolist() == alone.token_ids.tolist() and timeline.reason == alone.reason
            for mine, its in zip(timeline.logprobs, alone.logprobs, strict=True):
                assert mine.token_id == its.token_id and list(mine.top) == list(its.top)
                assert np.isclose(mine.logprob, its.logprob, atol=1e-4)
        num_done += sum(migration.done for migration in migrations_of(timelines.values()))
    assert num_done > 0


@pytest.mark.parametrize("name", THREE)
def test_a_random_model_gives_the_same_tokens(name):
    same_when_it_migrates(TINY, name, (1, 6))


@pytest.mark.parametrize("name", ["caching 3", "colocated"])
def test_what_is_drawn_and_log_probabilities_are_the_same(name):
    words = [*TINY, f"workload._target_={__name__}.Tells"]
    assert any(timeline.logprobs for timeline in expected(tuple(words)).values())
    same_when_it_migrates(words, name, (2, 7), more=["granularity=by_layer"])


@pytest.mark.parametrize("name", THREE)
def test_a_stop_string_is_found_that_began_before_its_answer_migrated(name):
    words = [*HASH, f"workload._target_={__name__}.Stops"]
    assert {str(timeline.reason) for timeline in expected(tuple(words)).values()} == {"stop"}
    same_when_it_migrates(words, name, (1, 4, 9))
