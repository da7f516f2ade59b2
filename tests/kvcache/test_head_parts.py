"""Between instances of differing tensor parallelism every rank gets its heads, bit for bit, in the paper's calls."""

import itertools

import numpy as np
import pytest
import torch

from memserve.kvcache.granularity import ByLayer, ByRequest, ByRequestAgg, End, Packed
from memserve.kvcache.head_parts import endpoint_of, head_parts, rank_of_endpoint
from memserve.kvcache.layout import AggregatedLayout, CacheGeometry, DiscreteLayout
from memserve.transfer.block_copy import copy_rows

L, B, K, D = 3, 4, 4, 6
HERE, THERE = 7, 5  # blocks of the two pools
RANKS = [(1, 2), (2, 1), (2, 4), (4, 2), (1, 4), (2, 2), (1, 1)]
WAYS = [
    *itertools.product((ByLayer, ByRequest, Packed), (DiscreteLayout, AggregatedLayout)),
    (ByRequestAgg, AggregatedLayout),
]
CALLS_A_BLOCK = {ByLayer: 2 * L, ByRequest: 2 * L, ByRequestAgg: 1}


def arenas(layout, num_blocks, num_ranks, whole=None):
    """Each rank's arena; with the heads of `whole`, kv [L, 2, N, B, K, D], that are its own."""
    g = CacheGeometry(L, B, K // num_ranks, D, torch.float32)
    made = []
    for rank in range(num_ranks):
        arena = torch.zeros(layout.shape(g, num_blocks))
        if whole is not None:
            layout.view(arena).copy_(whole[..., rank * g.num_kv_heads : (rank + 1) * g.num_kv_heads, :])
        made.append(arena)
    return made


@pytest.mark.parametrize(("way", "layout"), WAYS)
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("merge", [False, True])
def test_every_rank_receives_its_heads_bitwise_and_nothing_else(way, layout, ranks, merge) -> None:
    (num_from, num_to), rng = ranks, np.random.default_rng(1)
    whole = torch.from_numpy(rng.random((L, 2, HERE, B, K, D), dtype=np.float32))
    source, target = arenas(layout(), HERE, num_from, whole), arenas(layout(), THERE, num_to)
    blocks, to = np.array([5, 1, 2], np.int32), np.array([0, 3, 4], np.int32)
    granularity = way(layout(), CacheGeometry(L, B, K // num_from, D, torch.float32), merge, num_ranks=num_from)
    ends = End((3, 0), HERE, blocks, num_from), End((8, 0), THERE, to, num_to)
    moves = [m for layer in (range(L) if way is ByLayer else [None]) for m in granularity.moves(*ends, layer)]
    for move in (m.expanded() for m in moves):
        from_rank, to_rank = rank_of_endpoint(move.source[0]), rank_of_endpoint(move.target[0])
        assert (move.source[0], move.target[0]) == (endpoint_of(3, from_rank), endpoint_of(8, to_rank))
        here, there = source[from_rank], target[to_rank]
        copy_rows(here, move.source_rows, there, move.target_rows, move.row_bytes)
    expected = torch.zeros((L, 2, THERE, B, K, D))
    expected[:, :, to] = whole[:, :, blocks]
    received = torch.cat([layout().view(arena) for arena in target], dim=4)
    assert torch.equal(received, expected)
    assert sum(move.num_bytes for move in moves) == len(blocks) * whole[:, :, 0].numel() * 4
    if not merge and way is not Packed:
        assert sum(move.num_calls for move in moves) == max(ranks) * CALLS_A_BLOCK[way] * len(blocks)


@pytest.mark.parametrize("ranks", RANKS)
def test_packed_is_one_call_for_each_pair_of_ranks(ranks) -> None:
    granularity = Packed(DiscreteLayout(), CacheGeometry(L, B, K // ranks[0], D, torch.float32), num_ranks=ranks[0])
    blocks = np.arange(3, dtype=np.int32)
    moves = granularity.moves(End((0, 0), HERE, blocks, ranks[0]), End((1, 0), THERE, blocks, ranks[1]), None)
    assert [move.num_calls for move in moves] == [1] * max(ranks)


def test_a_rank_talks_only_to_those_that_share_its_heads() -> None:
    assert [(p.source_rank, p.target_rank) for p in head_parts(8, 2, 4)] == [(0, 0), (0, 1), (1, 2), (1, 3)]
    assert [(p.source_rank, p.target_rank) for p in head_parts(8, 2, 2)] == [(0, 0), (1, 1)]
    assert [(p.source_first, p.target_first, p.num_heads) for p in head_parts(8, 2, 1)] == [(0, 0, 4), (0, 4, 4)]


@pytest.mark.parametrize(("heads", "ranks"), [(6, (2, 3)), (4, (1, 3)), (4, (0, 1))])
def test_ranks_that_do_not_divide_are_refused_by_name(heads, ranks) -> None:
    with pytest.raises(ValueError, match=f"{heads} kv heads from {ranks[0]} to {ranks[1]} ranks"):
        head_parts(heads, *ranks)


def test_the_leader_s_endpoint_is_its_instance() -> None:
    assert endpoint_of(9, 0) == 9
    assert rank_of_endpoint(endpoint_of(9, 3)) == 3 and endpoint_of(9, 3) != endpoint_of(9, 2) != endpoint_of(8, 2)


@pytest.mark.parametrize("layout", [DiscreteLayout, AggregatedLayout])
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("merge", [False, True])
def test_moves_of_several_layers_are_those_of_each(layout, ranks, merge) -> None:
    blocks, to = np.array([5, 1, 2], np.int32), np.array([0, 3, 4], np.int32)
    granularity = ByLayer(layout(), CacheGeometry(L, B, K // ranks[0], D, torch.float32), merge, num_ranks=ranks[0])
    ends = End((3, 0), HERE, blocks, ranks[0]), End((8, 0), THERE, to, ranks[1])
    for layers in ([0, 1, 2], [1, 2], [2]):
        for layer, moves in zip(layers, granularity.moves_by_layer(*ends, layers), strict=True):
            for move, expected in zip(moves, granularity.moves(*ends, layer), strict=True):
                alike = [(m.source, m.target, m.row_bytes, m.num_alike, m.source_step, m.target_step)
                         for m in (move, expected)]  # fmt: skip
                assert alike[0] == alike[1]
                for rows in ("source_rows", "target_rows", "call_starts"):
                    assert np.array_equal(getattr(move, rows), getattr(expected, rows))
