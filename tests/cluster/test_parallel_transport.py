"""What a leader and a follower's transfer thread say to each other, over a wire of this process."""

import queue
import time

import numpy as np
import pytest
import torch

from memserve.cluster.parallel_transport import FollowerFailed, ParallelTransport, TransferHand
from memserve.cluster.worker import Followers
from memserve.kvcache.head_parts import endpoint_of
from memserve.model.parallel import WHOLE
from memserve.transfer import Arrived, Move, Transport

OWN, THEIRS, PEER = endpoint_of(0, 0), endpoint_of(0, 1), endpoint_of(1, 0)


class Wire:
    """One end of a team's mailbox."""

    def __init__(self, rank, ends):
        self._rank, self._ends = rank, ends
        ends[rank] = queue.SimpleQueue()

    def send(self, rank, message):
        self._ends[rank].put((self._rank, message))

    def receive(self, timeout_ms):
        try:
            first = self._ends[self._rank].get(timeout=timeout_ms / 1000)
        except queue.Empty:
            return []
        return [first, *(self._ends[self._rank].get() for _ in range(self._ends[self._rank].qsize()))]


class Recording(Transport):
    """Whatever is posted has arrived at once. Raises `error` instead, if there is one."""

    def __init__(self, error=None):
        self.posted, self.detached, self._arrived, self._error = [], [], [], error

    def attach(self, endpoint, memories):
        self.memories = memories

    def knows(self, endpoint):
        return True

    def detach(self, endpoint):
        self.detached.append(endpoint)

    def post(self, move_id, move, ready_ns):
        if self._error is not None:
            raise self._error
        self.posted.append((move_id, move))
        self._arrived.append(Arrived(move_id, 5, 9))

    def poll(self, endpoint, now_ns):
        arrived, self._arrived = self._arrived, []
        return arrived

    def next_time_ns(self):
        return None

    def close(self):
        self.detached.append("all")


def move_from(endpoint):
    rows = np.array([4, 2, 9])
    return Move((endpoint, 1), (PEER, 0), 24, rows, rows[::-1].copy(), np.array([0, 2]), packed=False)


@pytest.fixture
def team():
    """(leader's transport, its followers, its own moves, a follower's hand, the follower's moves)"""
    ends, own, theirs = {}, Recording(), Recording()
    followers = Followers(WHOLE, torch.device("cpu"))
    leader = ParallelTransport(own, Wire(0, ends), followers)
    hand = TransferHand(theirs, THEIRS, Wire(1, ends))
    hand.start()
    yield leader, followers, own, hand, theirs
    hand.close()
    assert theirs.detached[-1] == "all"


def polled(leader, count, limit_s=10.0):
    arrived, until = [], time.monotonic() + limit_s
    while len(arrived) < count and time.monotonic() < until:
        arrived += leader.poll(OWN, 0)
    return arrived


def test_each_rank_posts_what_lies_in_its_memory_and_the_leader_hears_of_all(team):
    leader, _, own, _, theirs = team
    leader.post((0, 1, 0), move_from(OWN), 0)
    leader.post((0, 1, 1), move_from(THEIRS), 0)
    assert {arrived.move_id for arrived in polled(leader, 2)} == {(0, 1, 0), (0, 1, 1)}
    (here,), (there,) = own.posted, theirs.posted
    assert (here[0], there[0]) == ((0, 1, 0), (0, 1, 1))
    for name, value in vars(move_from(THEIRS)).items():
        assert np.array_equal(getattr(there[1], name), value), name


def test_a_follower_sends_no_layer_before_it_has_written_it(team):
    leader, followers, _, hand, theirs = team
    followers.num_layers = 2  # the leader is ahead
    leader.post((0, 1, 0), move_from(THEIRS), 0)
    hand.layer_written()
    assert not polled(leader, 1, limit_s=0.3) and not theirs.posted
    hand.layer_written()
    assert [arrived.move_id for arrived in polled(leader, 1)] == [(0, 1, 0)]


def test_an_error_of_a_follower_s_transfers_is_the_leader_s_by_name():
    ends = {}
    leader = ParallelTransport(Recording(), Wire(0, ends), Followers(WHOLE, torch.device("cpu")))
    hand = TransferHand(Recording(ValueError("rows outside")), THEIRS, Wire(1, ends))
    hand.start()
    leader.post((0, 1, 0), move_from(THEIRS), 0)
    with pytest.raises(FollowerFailed, match="rank 1 of this instance: ValueError: rows outside"):
        polled(leader, 1)
    hand.close()


def test_a_peer_that_is_gone_is_detached_on_every_rank(team):
    leader, _, own, hand, theirs = team
    leader.detach(PEER)
    hand.detach(PEER)  # what `follow` does when it is told
    assert own.detached == theirs.detached == [PEER]
