"""Gloo's pairs end with their peers, never by a clock; what a stopped peer does later reaches nothing."""

import signal
from datetime import timedelta

import numpy as np
import pytest
import torch
from torch.distributed import HashStore, TCPStore
from transfer.two_processes import MAKE, End, Peer, rows_move

from memserve.clock import monotonic_ns
from memserve.transfer import Gloo
from memserve.transfer.directory import Directory, Endpoint, Memory
from memserve.transfer.wire import PIECE_BYTES, Announcement, call_offsets

MIB = 1 << 20
SIZE = 8 * MIB  # a move of it fits into no socket's buffer


@pytest.fixture
def port():
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    yield server.port
    del server


@pytest.fixture
def two(port):
    """(this process's end, the peer), of `SIZE` bytes each."""
    peer = Peer("gloo", port, 1, [SIZE])
    end = End("gloo", port, 0, [SIZE])
    yield end, peer.ready()
    peer.kill()
    end.close()


def everything(source, target, packed=False):
    rows = np.arange(SIZE // 4096)
    starts = np.zeros(1, np.int64) if packed else rows[::64]
    return rows_move((source, 0), (target, 0), 4096, rows, rows[::-1] if packed else rows, packed=packed,
                     call_starts=starts)  # fmt: skip


@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL])
@pytest.mark.parametrize("packed", [False, True])
def test_a_receiver_that_stops_in_the_middle_is_detached_without_a_wait(two, how, packed):
    here, peer = two
    here.carry([everything(0, 1, packed)])
    peer.signal(how)
    here.post([everything(0, 1, packed)] * 3, ticket=1)
    here.detach(1)
    assert [a.move_id for a in here.wait(3)] == [(0, 1, part) for part in range(3)]
    assert here.carry([everything(0, 1, packed)], ticket=2) == [(0, 2, 0)]


@pytest.mark.parametrize("packed", [False, True])
def test_a_stopped_sender_that_was_detached_writes_nothing_when_it_goes_on(two, packed):
    here, peer = two
    peer.call("carry", [everything(1, 0, packed)])
    peer.call("post", [everything(1, 0, packed)] * 20)
    peer.signal(signal.SIGSTOP)
    here.detach(1)
    here.fill(5)
    before = here.read(0)
    peer.signal(signal.SIGCONT)
    with pytest.raises(TimeoutError, match="of 20 moves"):  # poll does not raise: the peer's owner has to detach
        peer.call("wait", 20, 1.0)
    peer.call("detach", 0)
    assert len(peer.call("wait", 1)) >= 1
    assert here.read(0) == before


def test_a_long_move_is_bitwise_however_its_calls_go(two):
    here, peer = two
    for packed in (False, True):
        here.carry([everything(0, 1, packed)])
        got, sent = (np.frombuffer(data, np.uint8).reshape(-1, 4096) for data in (peer.call("read", 0), here.read(0)))
        assert np.array_equal(got, sent[::-1] if packed else sent)


def test_a_peer_that_never_comes_costs_its_own_moves_only(port):
    """Published, but nobody listens there."""
    store = TCPStore("127.0.0.1", port, is_master=False)
    gloo = Gloo(store, patience_s=0.2)
    gloo.attach(0, [torch.zeros(64, dtype=torch.uint8)])
    Directory(store, "gloo").publish(1, Endpoint("", 0, [Memory(64)]))
    move = rows_move((0, 0), (1, 0), 64, [0], [0])
    gloo.post((0, 0, 0), move, monotonic_ns())
    outlet = gloo._outlets[1]
    assert outlet._closed.wait(1) is False and gloo.poll(0, monotonic_ns()) == []  # it has been asked a few times
    gloo.detach(1)
    assert [a.move_id for a in gloo.poll(0, monotonic_ns())] == [(0, 0, 0)]
    outlet.join(60)
    gloo.close()


def test_a_peer_that_is_stopped_for_longer_than_its_pair_has_patience_is_reached_when_it_goes_on(port, monkeypatch):
    monkeypatch.setitem(MAKE, "impatient gloo", lambda store: Gloo(store, patience_s=1.0))
    peer = Peer("gloo", port, 1, [64]).ready()
    here = End("impatient gloo", port, 0, [64])
    peer.signal(signal.SIGSTOP)
    here.post([rows_move((0, 0), (1, 0), 64, [0], [0])])
    with pytest.raises(TimeoutError):
        here.wait(1, 2.0)
    peer.signal(signal.SIGCONT)
    assert [arrived.move_id for arrived in here.wait(1)] == [(0, 0, 0)]
    assert peer.call("read", 0) == here.read(0)
    peer.kill()
    here.close()


def test_a_host_that_nobody_knows_is_told_and_not_looked_for_again(port):
    gloo = Gloo(TCPStore("127.0.0.1", port, is_master=False), host="no.such.host.invalid")
    gloo.attach(0, [torch.zeros(64, dtype=torch.uint8)])
    Directory(TCPStore("127.0.0.1", port, is_master=False), "gloo").publish(1, Endpoint("", 0, [Memory(64)]))
    gloo.post((0, 0, 0), rows_move((0, 0), (1, 0), 64, [0], [0]), monotonic_ns())
    gloo._outlets[1].join(60)
    with pytest.raises(RuntimeError):
        gloo.poll(0, monotonic_ns())
    gloo.close()


def test_rows_with_nothing_behind_them_arrive(port):
    ends = [Gloo(TCPStore("127.0.0.1", port, is_master=False)) for _ in range(2)]
    memory = torch.zeros(64, dtype=torch.uint8)
    ends[0].attach(0, [memory, None])
    ends[1].attach(1, [memory.clone(), None])
    for part, (source, target) in enumerate(((0, 1), (1, 0), (1, 1))):
        rows = [0] if part < 2 else [999]
        ends[0].post((0, 0, part), rows_move((0, source), (1, target), 64, rows, rows), monotonic_ns())
    arrived = []
    while len(arrived) < 3:
        arrived += ends[0].poll(0, monotonic_ns())
    assert [a.move_id[2] for a in arrived] == [0, 1, 2]
    for end in ends:
        end.close()


@pytest.mark.parametrize(("option", "value"), [("channels", 0), ("patience_s", 0.0)])
def test_options_out_of_range_are_refused_by_name(option, value):
    with pytest.raises(ValueError, match=f"{option}={value}: expected at least"):
        Gloo(HashStore(), **{option: value})


def test_nothing_is_posted_before_attaching_nor_after_the_end_nor_in_a_world_of_one():
    move, gloo = rows_move((0, 0), (1, 0), 64, [0], [0]), Gloo(HashStore())
    with pytest.raises(ValueError, match="a move from endpoint 0: expected this process to be attached"):
        gloo.post((0, 0, 0), move, 0)
    gloo.attach(0, [torch.zeros(64)])
    with pytest.raises(ValueError, match="endpoint 1: expected one that is attached"):
        gloo.post((0, 0, 0), move, 0)
    gloo.close()
    with pytest.raises(ValueError, match="expected this process to be attached"):
        gloo.post((0, 0, 0), move, 0)


def test_a_packed_call_travels_in_pieces_and_others_as_they_are_asked_for():
    rows, starts = np.arange(700), np.array([0, 5, 600])
    packed = Announcement(0, 0, 4096, rows, np.array([0]), True)
    step = PIECE_BYTES // 4096
    assert packed.bounds().tolist() == [*range(0, 700, step), 700]
    assert Announcement(0, 0, 4096, rows, starts, False).bounds().tolist() == [0, 5, 600, 700]
    assert Announcement(0, 0, 4096, rows[:0], starts[:1], False).bounds().tolist() == [0]


def test_only_calls_whose_rows_are_neighbours_have_a_place_of_their_own():
    rows = np.array([7, 8, 9, 3, 5, 6, 1])
    assert call_offsets(rows, np.array([0, 3, 4, 6, 7]), 10) == [70, 30, 50, 10]
    assert call_offsets(rows, np.array([0, 2, 5, 7]), 10) == [70, -1, -1]
    assert call_offsets(rows[:0], np.array([0]), 10) == []
