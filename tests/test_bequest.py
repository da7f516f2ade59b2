"""What one pool leaves to others, played by hand: who is asked for what, in which order, and what is counted."""

import numpy as np
import pytest
from kvcache.transfer_pair import B, Wires

from memserve.bequest import Bequest

LEAVER, FIRST, SECOND = 1, 2, 3
BUSY = ("request", "busy", 0)


def tokens_of(number, num_blocks=2):
    return np.arange(num_blocks * B, dtype=np.int32) + 1000 * number


class Legacy:
    """A pool that leaves, in whose cache the prefix of the highest number was used last, and two that stay."""

    def __init__(self, num_prefixes=4, **heirs):
        self.wires = Wires()
        self.leaver = self.wires.pool(LEAVER)
        self.heirs = {number: self.wires.pool(number, **heirs) for number in (FIRST, SECOND)}
        self.bequest = Bequest(self.leaver.transfers, self.leaver.blocks)
        for number in range(num_prefixes):
            self.cache(number)

    def cache(self, number):
        blocks = self.leaver.fill(2 * B)
        self.leaver.blocks.publish(tokens_of(number), blocks)
        self.leaver.blocks.release(blocks, ("request", "r", 0))

    def begin(self, heir, share=1.0):
        self.bequest.begin(heir, share, self.wires.now_ns)

    def go_on(self):
        """Until nothing is under way."""
        self.deliver()
        while self.leaver.transfers.num_open:
            self.wires.let_time_pass()
            self.deliver()

    def deliver(self):
        """What is said, and has arrived, by now."""
        self.wires.deliver()
        for pool in self.heirs.values():
            for arrival in pool.transfers.drain_arrivals():
                pool.transfers.settle(arrival)
        ended, self.wires.ended = self.wires.ended, []
        for ticket in ended:
            self.bequest.ended(ticket, self.wires.now_ns)
        self.wires.check()

    def at(self, heir, num_prefixes=4):
        """The prefixes that an heir has."""
        index = self.heirs[heir].blocks.index
        return {n for n in range(num_prefixes) if index.peek(tokens_of(n)).num_tokens == len(tokens_of(n))}


def test_what_was_used_last_is_given_as_far_as_the_share_goes():
    legacy = Legacy()
    legacy.begin(FIRST, share=4 / 32)
    legacy.go_on()
    assert legacy.at(FIRST) == {2, 3} and legacy.bequest.num_tokens == 4 * B and legacy.bequest.num_declined == 0


def test_a_second_heir_is_asked_though_the_first_one_fails_meanwhile():
    legacy = Legacy()
    legacy.begin(FIRST)
    legacy.begin(SECOND)
    legacy.leaver.transfers.peer_gone(FIRST, legacy.wires.now_ns)
    legacy.go_on()
    assert legacy.at(SECOND) == {0, 1, 2, 3} and legacy.bequest.num_declined == 0


def test_what_a_first_heir_takes_is_not_of_the_seconds_share():
    legacy = Legacy()
    legacy.begin(FIRST)
    legacy.begin(SECOND, share=4 / 32)
    legacy.go_on()
    assert legacy.at(FIRST) == {0} and legacy.at(SECOND) == {0, 3}, "what was sent was used"


def test_what_was_declined_is_offered_again_and_counts_as_declined_only_if_it_is_once_more():
    legacy = Legacy(num_blocks=8)
    heir = legacy.heirs[FIRST].blocks
    heir.alloc(8, BUSY)
    legacy.begin(FIRST)
    legacy.go_on()
    assert (legacy.bequest.num_tokens, legacy.bequest.num_declined) == (0, 4)
    legacy.begin(FIRST)
    legacy.go_on()
    assert (legacy.bequest.num_tokens, legacy.bequest.num_declined) == (0, 4)
    heir.release_all(BUSY)
    legacy.begin(FIRST, share=1)
    legacy.go_on()
    assert legacy.at(FIRST) == {0, 1, 2, 3} and legacy.bequest.num_declined == 0


@pytest.mark.parametrize(("room", "kept"), [(2, {3}), (4, {2, 3}), (6, {1, 2, 3}), (8, {0, 1, 2, 3})])
def test_an_heir_short_of_room_keeps_what_was_used_last(room, kept):
    legacy = Legacy(num_blocks=8)
    legacy.heirs[FIRST].blocks.alloc(8 - room, BUSY)
    legacy.begin(FIRST)
    legacy.go_on()
    assert legacy.at(FIRST) == kept and legacy.bequest.num_declined == 0


def test_what_is_too_long_for_an_heir_is_declined_and_the_rest_is_given():
    legacy = Legacy(num_blocks=8)
    legacy.heirs[FIRST].blocks.alloc(6, BUSY)
    blocks = legacy.leaver.fill(3 * B)
    legacy.leaver.blocks.publish(tokens_of(9, 3), blocks)
    legacy.leaver.blocks.release(blocks, ("request", "r", 0))
    legacy.begin(FIRST)
    legacy.go_on()
    assert legacy.at(FIRST) == {3} and legacy.bequest.num_declined == 1


def test_nothing_more_is_offered_to_an_heir_that_is_gone():
    legacy = Legacy()
    legacy.begin(FIRST)
    legacy.leaver.transfers.peer_gone(FIRST, legacy.wires.now_ns)
    legacy.go_on()
    assert legacy.leaver.transfers.num_open == 0 and legacy.bequest.num_declined == 4
