"""Every transport between processes copies bit by bit, in order, both ways at once, and outlives its peers."""

import itertools
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch.distributed import TCPStore
from transfer.two_processes import MAKE, ON_GPU, End, Peer, copied, rows_move

from memserve.kvcache import AggregatedLayout, CacheGeometry, DiscreteLayout
from memserve.kvcache.granularity import ByLayer, ByRequest, ByRequestAgg, Packed
from memserve.kvcache.granularity import End as Blocks

GEOMETRY = CacheGeometry(num_layers=2, block_size=4, num_kv_heads=3, head_dim=8, dtype=torch.float16)
HERE, THERE = (12, 7), (9, 16)  # blocks in HBM and in DRAM
WAYS = [(ByLayer, DiscreteLayout), (ByLayer, AggregatedLayout), (ByRequest, DiscreteLayout),
        (ByRequest, AggregatedLayout), (ByRequestAgg, AggregatedLayout), (Packed, DiscreteLayout),
        (Packed, AggregatedLayout)]  # fmt: skip


def sizes(num_blocks: tuple[int, int]) -> list[int]:
    return [n * GEOMETRY.block_bytes for n in num_blocks]


@dataclass
class Two:
    """Endpoint 0 in this process and endpoint 1 in another, for as long as the module's tests run."""

    kind: str
    port: int
    here: End
    there: Peer
    thirds: list[Peer] = field(default_factory=list)

    def third(self, endpoint: int) -> Peer:
        self.thirds.append(Peer(self.kind, self.port, endpoint, sizes(THERE)))
        return self.thirds[-1].ready()


NO_GPU = "no GPU here: run scripts/gpu_check.sh on a machine with one"
KINDS = [pytest.param(kind, marks=pytest.mark.skipif(kind == ON_GPU and not torch.cuda.is_available(), reason=NO_GPU))
         for kind in MAKE]  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def two(request: pytest.FixtureRequest) -> Iterator[Two]:
    torch.set_num_threads(1)
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    there = Peer(request.param, server.port, 1, sizes(THERE))
    here = End(request.param, server.port, 0, sizes(HERE))
    yield Two(request.param, server.port, here, there.ready())
    there.leave()
    here.close()
    there.end()
    del server


@pytest.fixture
def fresh(two: Two) -> Iterator[Two]:
    two.here.fill(0)
    two.there.call("fill", 1)
    yield two
    for third in two.thirds:
        third.kill()
    two.thirds.clear()


@pytest.mark.parametrize(("granularity", "layout"), WAYS)
@pytest.mark.parametrize("merge", [False, True])
def test_every_granularity_copies_bitwise_between_memories_of_different_sizes(fresh, granularity, layout, merge):
    rng, way = np.random.default_rng(3), granularity(layout(), GEOMETRY, merge)
    layers = range(GEOMETRY.num_layers) if granularity is ByLayer else [None]
    moves, expected = [], [fresh.there.call("read", medium) for medium in (0, 1)]
    for source, target in itertools.product((0, 1), (0, 1)):
        first = 4 * source  # of the blocks that no other pair of media writes to
        from_blocks = rng.permutation(HERE[source])[:4].astype(np.int32)
        from_blocks[1:3] = from_blocks[0] // 2 + np.array([0, 1])  # neighbours, for `merge`
        to_blocks = np.array([3, 0, 1, 2], np.int32) + first
        for layer in layers:
            ends = Blocks((0, source), HERE[source], from_blocks), Blocks((1, target), THERE[target], to_blocks)
            moves += way.moves(*ends, layer)
            expected[target] = copied(moves[-1], fresh.here.read(source), expected[target])
    assert fresh.here.carry(moves) == [(0, 0, part) for part in range(len(moves))]
    assert [fresh.there.call("read", medium) for medium in (0, 1)] == expected


@pytest.mark.parametrize("row_bytes", [1, 7, 96, 768])
@pytest.mark.parametrize("packed", [False, True])
def test_rows_of_any_size_arrive_where_they_should(fresh, row_bytes, packed):
    """Also those of calls whose rows are no neighbours."""
    rng, count = np.random.default_rng(row_bytes), 3 * 768 // row_bytes
    starts = np.array([0]) if packed else np.array([0, count // 3, count // 2 + 1])
    rows, target_rows = rng.permutation(count), rng.permutation(count)
    move = rows_move((0, 1), (1, 0), row_bytes, rows, target_rows, packed=packed, call_starts=starts)
    expected = copied(move, fresh.here.read(1), fresh.there.call("read", 0))
    assert fresh.here.carry([move]) == [(0, 0, 0)]
    assert fresh.there.call("read", 0) == expected


@pytest.mark.parametrize("packed", [False, True])
def test_rows_that_stand_for_several_arrive_as_if_each_were_named(fresh, packed):
    """Here the second half of three tokens' heads; there all that a token has."""
    alike = {"num_alike": 3, "source_step": 2, "target_step": 1, "call_starts": np.zeros(1, np.int64)}
    move = rows_move((0, 1), (1, 0), 64, [1, 7], [6, 0], packed=packed, **alike)
    each = rows_move((0, 1), (1, 0), 64, [1, 3, 5, 7, 9, 11], [6, 7, 8, 0, 1, 2])
    assert move.num_bytes == each.num_bytes
    expected = copied(each, fresh.here.read(1), fresh.there.call("read", 0))
    assert fresh.here.carry([move]) == [(0, 0, 0)]
    assert fresh.there.call("read", 0) == expected


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        (([139], [0]), "rows 139 to 145 of 64 bytes in memory 0 of endpoint 0: it has 144"),
        (([0], [105]), "rows 105 to 108 of 64 bytes in memory 0 of endpoint 1: it has 108"),
    ],
)
def test_the_last_of_several_rows_must_exist_too(fresh, rows, named):
    with pytest.raises(ValueError, match=named):
        fresh.here.post([rows_move((0, 0), (1, 0), 64, *rows, num_alike=4, source_step=2)])


def test_a_move_of_no_rows_arrives_and_writes_nothing(fresh):
    before = fresh.there.call("read", 0)
    moves = [rows_move((0, 0), (1, 0), 64, [], []), rows_move((0, 0), (1, 0), 64, [], [], packed=True,
             call_starts=np.zeros(1, np.int64))]  # fmt: skip
    assert fresh.here.carry(moves, ticket=5) == [(0, 5, 0), (0, 5, 1)]
    assert fresh.there.call("read", 0) == before


def test_many_moves_in_flight_arrive_in_the_order_in_which_they_were_posted(fresh):
    moves = [rows_move((0, 0), (1, 0), 512, [part % 8], [0], packed=part % 3 == 0) for part in range(500)]
    assert fresh.here.carry(moves, ticket=9) == [(0, 9, part) for part in range(500)]
    assert fresh.there.call("read", 0)[:512] == fresh.here.read(0)[512 * (499 % 8) :][:512]


def test_both_directions_at_once(fresh):
    data = fresh.here.read(0), fresh.there.call("read", 0)
    out = [rows_move((0, 0), (1, 1), 64, [part], [part]) for part in range(70)]
    back = [rows_move((1, 0), (0, 1), 64, [part], [part + 5]) for part in range(70)]
    fresh.there.tell("carry", back)
    assert len(fresh.here.carry(out)) == len(fresh.there.answer()) == 70
    assert fresh.there.call("read", 1)[: 70 * 64] == data[0][: 70 * 64]
    assert fresh.here.read(1)[5 * 64 : 75 * 64] == data[1][: 70 * 64]


def test_times_are_of_the_machines_clock_and_in_order(fresh):
    fresh.here.post([rows_move((0, 0), (1, 0), 768, [0, 3], [1, 2])] * 3)
    arrived = fresh.here.wait(3)
    assert all(a.begun_ns < a.ended_ns for a in arrived) and fresh.here.transport.next_time_ns() is None
    assert [a.ended_ns for a in arrived] == sorted(a.ended_ns for a in arrived)


@pytest.mark.parametrize(
    ("source", "target", "rows", "named"),
    [
        ((0, 0), (7, 0), ([0], [0]), "endpoint 7: expected one that is attached"),
        ((0, 0), (1, 2), ([0], [0]), "memory 2 of endpoint 1: it has 2"),
        ((0, 2), (1, 0), ([0], [0]), "memory 2 of endpoint 0: it has 2"),
        ((0, 0), (0, 1), ([0], [0]), "from endpoint 0 to 0: expected one from 0 to another"),
        ((1, 0), (0, 0), ([0], [0]), "from endpoint 1 to 0: expected one from 0 to another"),
        ((0, 0), (1, 0), ([144], [0]), "rows 144 to 144 of 64 bytes in memory 0 of endpoint 0: it has 144"),
        ((0, 0), (1, 0), ([0], [-1]), "rows -1 to -1 of 64 bytes in memory 0 of endpoint 1: it has 108"),
        ((0, 0), (1, 0), ([0, 1], [0]), "2 source and 1 target rows"),
    ],
)
def test_a_move_that_cannot_be_is_refused_by_name(fresh, source, target, rows, named):
    with pytest.raises(ValueError, match=named):
        fresh.here.post([rows_move(source, target, 64, *rows)])


@pytest.mark.parametrize("starts", [[], [1], [0, 0], [0, 2]])
def test_calls_that_do_not_cover_the_rows_are_refused_by_name(fresh, starts):
    with pytest.raises(ValueError, match=r"call_starts=.*: expected increasing rows, from 0 to below 2"):
        fresh.here.post([rows_move((0, 0), (1, 0), 64, [0, 1], [0, 1], call_starts=np.array(starts, np.int64))])


def test_a_process_attaches_one_endpoint_under_a_number_of_its_own(fresh):
    with pytest.raises(ValueError, match="endpoint 3: this process is endpoint 0 already"):
        fresh.here.transport.attach(3, [])
    with pytest.raises(ValueError, match="endpoint 1 is attached already"):
        End(fresh.kind, fresh.port, 1, [64])


def test_a_killed_receiver_stops_nobody_and_its_moves_are_over_once_it_is_detached(fresh):
    if fresh.kind == ON_GPU:
        pytest.skip("CUDA does not say what becomes of such writes: see test_device.py for what is shown")
    third = fresh.third(10)
    one, many = (rows_move((0, 0), (10, 0), 768, rows, rows) for rows in ([0], range(8)))
    fresh.here.carry([one])
    third.tell("wait", 1000)  # so that it is busy with the transport
    fresh.here.post([many] * 100, ticket=1)
    third.kill()
    fresh.here.post([many] * 100 + [rows_move((0, 0), (1, 0), 64, [4], [5])], ticket=2)
    fresh.here.detach(10)
    fresh.here.post([one], ticket=3)
    arrived = [a.move_id for a in fresh.here.wait(202)]
    assert sorted(arrived) == sorted([(0, 1, p) for p in range(100)] + [(0, 2, p) for p in range(101)] + [(0, 3, 0)])
    assert fresh.there.call("read", 0)[5 * 64 : 6 * 64] == fresh.here.read(0)[4 * 64 : 5 * 64]


def test_a_killed_sender_writes_nothing_once_it_is_detached(fresh):
    third = fresh.third(11)
    many = rows_move((11, 0), (0, 0), 768, range(8), range(8))
    third.call("carry", [many])
    third.call("post", [many] * 1000)
    third.kill()
    fresh.here.detach(11)
    fresh.here.fill(7)
    before = fresh.here.read(0)
    move = rows_move((1, 0), (0, 1), 64, [1], [2])
    fresh.there.call("carry", [move])
    assert fresh.here.read(0) == before
    assert fresh.here.read(1)[128:192] == fresh.there.call("read", 0)[64:128]


@pytest.mark.parametrize("outward", [True, False])
def test_a_stopped_peer_that_goes_on_completes_what_was_posted(fresh, outward):
    third = fresh.third(12 + outward)
    ends = ((0, 0), (12 + outward, 0)) if outward else ((12 + outward, 0), (0, 0))
    moves = [rows_move(*ends, 768, rows, range(8)) for rows in (range(8), range(7, -1, -1))] * 50
    third.call("post", [] if outward else moves)
    third.signal(signal.SIGSTOP)
    fresh.here.post(moves if outward else [])
    fresh.here.post([rows_move((0, 0), (1, 0), 64, [4], [5])], ticket=3)
    third.signal(signal.SIGCONT)
    fresh.here.wait(len(moves) * outward + 1)
    if outward:
        assert third.call("read", 0)[: 8 * 768] == reversed_rows(fresh.here.read(0))
    else:
        third.call("wait", 100)
        assert fresh.here.read(0)[: 8 * 768] == reversed_rows(third.call("read", 0))
    fresh.here.detach(12 + outward)
    third.end()


def reversed_rows(data: bytes) -> bytes:
    return b"".join(data[row * 768 : (row + 1) * 768] for row in range(7, -1, -1))
