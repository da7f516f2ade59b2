"""The in-process transport copies what was asked, when the link model says, in order, and nothing of who is gone."""

from collections import Counter
from random import Random

import numpy as np
import pytest
import torch

from memserve.transfer import Arrived, InProcess, LinkModel, Move
from memserve.transfer.block_copy import copy_rows
from memserve.transfer.ports import Flow, fair_shares

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
    assert transport.next_time_ns() == 50, "then it begins"
    assert transport.poll(0, 50) == [] and transport.next_time_ns() == 50 + 2 * 1000 + 32
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


BIG = 1_000_000  # bytes that take 1 ms alone


def ends_of(posts, contention=True, latency_s=0.0, until_ns=10**9, polled_ns=()):
    """When each of (source, target, bytes, network calls, ready_ns) ends."""
    transport = InProcess(LinkModel(latency_s, 1.0, contention=contention))
    for endpoint in range(8):
        transport.attach(endpoint, [None])
    for number, (source, target, num_bytes, num_calls, ready_ns) in enumerate(posts):
        transport.post((source, number, 0), move(source, target, [0], [0], num_bytes, num_calls), ready_ns)
    arrived = [a for at in (*polled_ns, until_ns) for endpoint in range(8) for a in transport.poll(endpoint, at)]
    ends = {each.move_id[1]: each.ended_ns for each in arrived}
    return [ends[number] for number in range(len(posts))]


@pytest.mark.parametrize(("contention", "ends"), [(False, [BIG] * 3), (True, [3 * BIG] * 3)])
def test_senders_to_one_endpoint_share_its_port_in_only_with_contention(contention, ends):
    assert ends_of([(source, 3, BIG, 1, 0) for source in range(3)], contention) == ends


def test_a_sender_shares_its_port_out_and_what_comes_in_meanwhile_takes_nothing_of_it():
    assert ends_of([(0, 1, BIG, 1, 0), (0, 2, BIG, 1, 0), (3, 0, BIG, 1, 0)]) == [2 * BIG, 2 * BIG, BIG]


def test_who_comes_later_shares_from_then_on_and_who_stays_has_the_rest():
    assert ends_of([(0, 2, BIG, 1, 0), (1, 2, BIG // 4, 1, BIG // 2)]) == [BIG // 2 + 3 * BIG // 4, BIG]


def test_a_sender_to_a_busy_receiver_sends_to_others_with_all_that_is_left_of_its_port():
    """0, 1 and 2 send to 3, a third of its port each; what 0 sends to 4 has the other two thirds of 0's."""
    posts = [*((source, 3, BIG, 1, 0) for source in range(3)), (0, 4, BIG, 1, 0)]
    assert ends_of(posts) == [3 * BIG] * 3 + [1_500_000]


def test_the_latency_of_one_s_calls_leaves_the_port_to_others():
    """Ten calls of 1,000 bytes, 100 us apart, use a hundredth of the port: the big one beside them hardly notices."""
    small, big = ends_of([(0, 2, 10_000, 10, 0), (1, 2, BIG, 0, 0)], latency_s=1e-4)
    assert small == 1_010_000 and BIG < big < 1.011 * BIG


def test_what_calls_and_latencies_there_are_a_port_passes_no_more_than_its_bandwidth():
    rng = np.random.default_rng(0)
    for _ in range(20):
        posts = [
            (int(rng.integers(3)), int(rng.integers(3, 5)), int(rng.integers(1, BIG)), int(rng.integers(1, 40)),
             int(rng.integers(BIG)))
            for _ in range(30)
        ]  # fmt: skip
        ends = ends_of(posts, latency_s=1e-5)
        for place in (0, 1):
            for port in {post[place] for post in posts}:
                through = [(post, end) for post, end in zip(posts, ends, strict=True) if post[place] == port]
                span_ns = max(end for _, end in through) - min(post[4] for post, _ in through)
                assert sum(post[2] for post, _ in through) <= span_ns + len(posts)
        assert all(end - post[4] >= post[2] + 10_000 * post[3] - 1 for post, end in zip(posts, ends, strict=True))


def shares_by_rounds(flows):
    """The rule as it is written down: the port with least for each who waits gives that to all; who wants less has it
    first. Looks at every flow in every round.
    """
    shares, free = [0.0] * len(flows), {port: 1.0 for flow in flows for port in flow.ports}
    waiting = list(range(len(flows)))
    while waiting:
        counts = Counter(port for i in waiting for port in flows[i].ports)
        levels = {port: free[port] / count for port, count in counts.items()}
        level = min(levels.values())
        modest = [i for i in waiting if flows[i].demand <= level]
        for i in modest or [i for i in waiting if any(levels[port] == level for port in flows[i].ports)]:
            shares[i] = min(level, flows[i].demand)
            waiting.remove(i)
            for port in flows[i].ports:
                free[port] -= shares[i]
    return shares


@pytest.mark.parametrize("demands", [(1.0,), (0.0, 0.1, 0.5, 1.0), (0.2, 0.25, 1 / 3, 0.3)])
def test_shares_are_to_the_last_bit_those_of_the_rule_as_it_is_written_down(demands):
    rng = Random(1)
    for _ in range(300):
        ends = [(rng.randrange(8), rng.randrange(8)) for _ in range(rng.randrange(1, 30))]
        flows = [Flow(None, end, [("out of", end[0]), ("into", end[1])], 1, rng.choice(demands)) for end in ends]
        assert fair_shares(flows) == shares_by_rounds(flows)


def test_ends_do_not_depend_on_who_looks_when():
    posts = [(i % 3, 3 + i % 2, 100_000 + 7_919 * i, 1 + i % 5, 31_337 * i) for i in range(20)]
    assert ends_of(posts, latency_s=1e-5, polled_ns=range(0, 3 * BIG, 9_973)) == ends_of(posts, latency_s=1e-5)


def test_what_a_gone_endpoint_was_sending_leaves_the_port_to_the_others():
    transport = InProcess(LinkModel(0.0, 1.0))
    for endpoint in range(3):
        transport.attach(endpoint, [None])
    for source in (0, 1):
        transport.post((source, 0, 0), move(source, 2, [0], [0], BIG), 0)
    transport.poll(0, BIG)
    transport.detach(0)
    transport.poll(1, BIG)
    assert transport.next_time_ns() == BIG + BIG // 2


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


def test_who_is_to_be_polled_where_another_poll_has_moved_the_bytes():
    transport, _ = two_endpoints(count=4)
    assert transport.next_time_ns() is None and transport.drain_over() == []
    transport.post((0, 1, 0), move(0, 2, [0], [0]), ready_ns=0)
    transport.post((1, 1, 0), move(1, 3, [0], [0]), ready_ns=0)  # ends at the same nanosecond
    transport.run(0)
    assert transport.next_time_ns() == 1016 and not transport.has_arrived(0)
    assert transport.poll(0, 1016) and not transport.has_arrived(0) and transport.has_arrived(1)
    assert [over.move_id for over in transport.drain_over()] == [(0, 1, 0), (1, 1, 0)]
    assert transport.poll(1, 1016) and transport.next_time_ns() is None


def test_moves_that_were_polled_are_not_kept_where_nobody_asks_what_is_over():
    transport, _ = two_endpoints()
    for part in range(3):
        transport.post((0, 1, part), move(0, 1, [0], [0]), ready_ns=0)
    assert len(transport.poll(0, 10**9)) == 3 and transport.drain_over() == []


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
