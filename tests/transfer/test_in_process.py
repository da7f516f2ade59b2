"""The in-process transport copies what was asked, when the link model says, in order, and nothing of who is gone."""

import numpy as np
import pytest
import torch

from memserve.transfer import Arrived, InProcess, LinkModel, Move
from memserve.transfer.block_copy import copy_rows

LINK = LinkModel(latency_s=1e-6, gb_per_s=1.0)  # 1 us a call, 1 ns a byte


def move(source, target, source_rows, target_rows, row_bytes=16, num_calls=None):
    starts = np.arange(len(source_rows) if num_calls is None else num_calls)
    return Move((source, 0), (target, 0), row_bytes, np.array(source_rows), np.array(target_rows), starts)


def two_endpoints(link=LINK, count=2):
    transport, memories = InProcess(link), []
    for endpoint in range(count):
        memories.append(torch.arange(32, dtype=torch.int32).reshape(8, 4) + 100 * endpoint)
        transport.attach(endpoint, [memories[-1]])
    return transport, memories


def test_rows_arrive_when_the_link_says_and_not_before():
    transport, (here, there) = two_endpoints()
    transport.post((0, 7, 0), move(0, 1, [1, 2], [5, 0]), ready_ns=50)
    assert transport.next_time_ns() == 50 + 2 * 1000 + 32
    assert transport.poll(0, 2081) == [] and there[5].tolist() == [120, 121, 122, 123]
    assert transport.poll(0, 2082) == [Arrived((0, 7, 0), 50, 2082)]
    assert there[5].tolist() == here[1].tolist() and there[0].tolist() == here[2].tolist()
    assert transport.poll(0, 9999) == [] and transport.next_time_ns() is None


def test_moves_between_two_endpoints_follow_each_other():
    transport, _ = two_endpoints()
    for part in range(3):
        transport.post((0, 1, part), move(0, 1, [part], [part]), ready_ns=0)
    arrived = transport.poll(0, 10_000)
    assert [a.move_id[2] for a in arrived] == [0, 1, 2]
    assert [a.ended_ns for a in arrived] == [1016, 2032, 3048]


@pytest.mark.parametrize(("contention", "second_ns"), [(False, 1016), (True, 2032)])
def test_moves_into_one_endpoint_wait_for_each_other_only_with_contention(contention, second_ns):
    transport, _ = two_endpoints(LinkModel(1e-6, 1.0, contention=contention), count=3)
    transport.post((0, 1, 0), move(0, 2, [0], [0]), ready_ns=0)
    transport.post((1, 1, 0), move(1, 2, [0], [1]), ready_ns=0)
    transport.poll(0, 10_000)
    assert transport.poll(1, 10_000)[0].ended_ns == second_ns


def test_what_a_gone_endpoint_had_posted_stops_and_what_others_send_it_reaches_nothing():
    transport, (here, there) = two_endpoints()
    before = there.clone()
    transport.post((0, 1, 0), move(0, 1, [0], [0]), ready_ns=0)
    transport.detach(0)
    assert transport.poll(0, 10_000) == [] and torch.equal(there, before)
    transport.post((1, 1, 0), move(1, 0, [3], [3]), ready_ns=0)
    assert len(transport.poll(1, 10_000)) == 1
    assert here[3].tolist() == [12, 13, 14, 15]


def test_an_endpoint_attaches_once():
    transport, _ = two_endpoints()
    with pytest.raises(ValueError, match="endpoint 1 is attached already"):
        transport.attach(1, [])
    with pytest.raises(ValueError, match="memory 3 of endpoint 1"):
        transport.post((0, 1, 0), Move((0, 0), (1, 3), 16, np.array([0]), np.array([0]), np.array([0])), 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64])
@pytest.mark.parametrize("row_bytes", [2, 8, 24, 48])
def test_rows_are_copied_bit_by_bit_whatever_their_type(dtype, row_bytes):
    rng = np.random.default_rng(0)
    data = torch.from_numpy(rng.integers(0, 255, 960, dtype=np.uint8))
    source, target = data.view(dtype).clone(), torch.zeros(960, dtype=torch.uint8).view(dtype)
    count = 960 // row_bytes
    source_rows, target_rows = rng.permutation(count)[: count // 2], rng.permutation(count)[: count // 2]
    copy_rows(source, source_rows, target, target_rows, row_bytes)
    got = target.view(torch.uint8).view(-1, row_bytes)
    assert torch.equal(got[target_rows], data.view(-1, row_bytes)[source_rows])
    assert int((got != 0).any(1).sum()) <= len(target_rows)


@pytest.mark.parametrize(
    ("values", "named"),
    [((-1.0, 1.0), "latency_s=-1.0"), ((0.0, 0.0), "gb_per_s=0.0"), ((float("nan"), 1.0), "latency_s=nan")],
)
def test_a_link_that_is_none_is_refused(values, named):
    with pytest.raises(ValueError, match=named):
        LinkModel(*values)


def test_who_is_to_be_polled_next_and_at_once_where_another_poll_has_moved_the_bytes():
    transport, _ = two_endpoints(count=4)
    assert transport.due_ns() == {}
    transport.post((0, 1, 0), move(0, 2, [0], [0]), ready_ns=0)
    transport.post((1, 1, 0), move(1, 3, [0], [0]), ready_ns=0)  # ends at the same nanosecond
    assert transport.due_ns() == {0: 1016}
    assert transport.poll(0, 1016) and transport.due_ns() == {1: 0}
    assert transport.poll(1, 1016) and transport.due_ns() == {}


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"latency_s": "x"}, "latency_s='x': expected a finite number >= 0"),
        ({"message_latency_s": -1}, "message_latency_s=-1: expected a finite number >= 0"),
        ({"gb_per_s": None}, "gb_per_s=None: expected a number > 0"),
        ({"gb_per_s": 0}, "gb_per_s=0: expected a number > 0"),
        ({"contention": 1}, "contention=1: expected true or false"),
    ],
)
def test_a_link_of_other_than_numbers_is_refused_by_name(given, named):
    with pytest.raises(ValueError, match=named):
        LinkModel(**({"latency_s": 0.0, "gb_per_s": 1.0} | given))
    assert LinkModel(0.0, float("inf")).duration_ns(3, 10**12) == 0
