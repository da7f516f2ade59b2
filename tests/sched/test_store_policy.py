"""Which of several stores a prefix goes to."""

import numpy as np
import pytest

from memserve.sched.store_policy import WriteThrough

STORES = np.array([3, 4, 9, 200], dtype=np.int64)
PLACE = WriteThrough().place


def prefix(number, num_tokens=64):
    return np.random.default_rng(number).integers(0, 50_000, num_tokens, dtype=np.int32)


def nobody(num_blocks=4):
    return np.full(num_blocks, -1, dtype=np.int64)


@pytest.mark.parametrize("row", range(4))
def test_what_continues_a_prefix_follows_it_if_that_is_half_of_it_at_least(row):
    alone = PLACE(prefix(1), nobody(), STORES)
    for num_known in range(5):
        offered_to = np.array([row] * num_known + [-1] * (4 - num_known))
        assert PLACE(prefix(1), offered_to, STORES) == (row if num_known >= 2 else alone)


def test_of_a_prefix_that_went_to_two_the_last_is_followed():
    """It has what comes before, too; what all prompts begin with may have gone elsewhere, for another one."""
    assert PLACE(prefix(1), np.array([0, 2, 2, -1]), STORES) == 2
    assert PLACE(prefix(1), np.array([0, 0, 1, -1]), STORES) == 1


def test_new_prefixes_are_spread_evenly_whatever_they_begin_with():
    beginning = prefix(0, 512)
    rows = [PLACE(np.concatenate([beginning, prefix(n)]), nobody(), STORES) for n in range(1, 2001)]
    counts = np.bincount(rows, minlength=4)
    assert abs(counts - 500).max() < 80  # four standard deviations


def test_instances_agree_and_a_store_that_is_lost_takes_no_place_from_others():
    before = [PLACE(prefix(n), nobody(), STORES) for n in range(500)]
    left = np.delete(STORES, 1)
    after = [left[PLACE(prefix(n), nobody(), left)] for n in range(500)]
    moved = [n for n in range(500) if STORES[before[n]] != after[n]]
    assert {int(before[n]) for n in moved} == {1} and len(moved) == before.count(1)
    assert {int(after[n]) for n in moved} == {3, 9, 200}


def test_the_same_tokens_lead_to_the_same_store_in_every_process():
    """Not by Python's `hash`; these were found once."""
    assert [PLACE(prefix(n), nobody(), STORES) for n in range(8)] == [2, 0, 0, 2, 3, 2, 2, 2]
