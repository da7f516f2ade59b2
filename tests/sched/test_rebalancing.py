"""Which answers go where though their instance stays: pure functions of what the instances said."""

import numpy as np
import pytest
from mini_cluster import snapshot

from memserve.sched.departures import Answer
from memserve.sched.rebalancing import ByAnswers, ByRoom, NoRebalancing


def rooms(free, num_blocks):
    columns = {"free_blocks": np.array(free, dtype=float), "num_blocks": np.array(num_blocks, dtype=float)}
    return snapshot([1] * len(free), **columns)


@pytest.mark.parametrize(
    ("free", "target"),
    [
        ([9, 31, 50], 2),
        ([9, 30, 30], None),  # nobody has more than `high`
        ([10, 90, 90], None),  # it is not short
        ([0, 100, 50], 1),
        ([100, 0, 50], None),
    ],
)
def test_room_goes_by_the_share_that_is_free(free, target):
    assert ByRoom(low=0.1, high=0.3).target(0, rooms(free, [100] * 3)) == target


def test_shares_count_not_blocks_where_pools_differ():
    assert ByRoom().target(0, rooms([5, 400, 60], [100, 1000, 100])) == 2


def test_an_instance_that_has_said_nothing_yet_is_taken_for_empty():
    assert ByRoom().target(0, rooms([5, np.inf, 99], [100, np.inf, 100])) == 1


@pytest.mark.parametrize(("decoding", "target"), [([5, 3, 2], 2), ([4, 2, 2], None), ([2, 9, 0], None), ([3, 0, 0], 1)])
def test_load_goes_by_answers(decoding, target):
    assert ByAnswers(gap=2).target(0, snapshot([9, 9, 9], num_decoding=np.array(decoding))) == target


def test_for_room_the_oldest_of_the_least_urgent_goes_and_for_load_the_newest():
    answers = [Answer(9, 9, 1.0, -1), Answer(9, 9, 3.0), Answer(5, 5, 2.0), Answer(1, 1, 4.0, -5)]
    assert min(answers, key=ByRoom().key).arrival_s == 2 and min(answers, key=ByAnswers().key).arrival_s == 4


def test_the_baseline_asks_for_nothing():
    assert not NoRebalancing().looks_at_loads and NoRebalancing().target(0, rooms([0, 9], [9, 9])) is None
