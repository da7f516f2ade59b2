"""A few clusters of words drawn at random; `python -m cluster.fuzz` draws as many as there is time for."""

import pytest
from cluster.fuzz import WORDS, check, drawn

from memserve.compose import config_dir


@pytest.mark.parametrize("seed", range(10))
def test_a_cluster_of_any_words_answers_as_one_instance_does_and_leaves_nothing(seed):
    check(seed)


def test_words_are_of_groups_that_there_are():
    for name, words in WORDS.items():
        group = name.split("@")[0]
        if "." not in group:
            assert {path.stem for path in (config_dir() / group).glob("*.yaml")} >= set(words.split()), name


def test_a_seed_draws_the_same_again():
    assert drawn(3) == drawn(3) != drawn(4)
