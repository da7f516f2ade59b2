"""Regions against a brute-force map: arenas whose every element says which block, layer, token and head it is."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memserve.kvcache import AggregatedLayout, CacheGeometry, DiscreteLayout
from memserve.kvcache.regions import Regions, call_starts, regions_of, row_bytes_of

LAYOUTS = {"discrete": DiscreteLayout(), "aggregated": AggregatedLayout()}
GEOMETRY = CacheGeometry(num_layers=3, block_size=2, num_kv_heads=4, head_dim=5, dtype=torch.int64)


def labelled(layout, geometry, blocks):
    """An arena as int64 [elements]; the element of the i-th of `blocks` is numbered as in kv[i, L, 2, B, K, D]."""
    g = geometry
    num_blocks = int(max(blocks)) + 2
    arena = torch.full(layout.shape(g, num_blocks), -1, dtype=g.dtype)
    shape = (len(blocks), g.num_layers, 2, g.block_size, g.num_kv_heads, g.head_dim)
    labels = torch.arange(int(np.prod(shape))).view(shape)
    for i, block in enumerate(blocks):
        layout.view(arena)[:, :, block] = labels[i]
    return arena.flatten().numpy(), labels.numpy(), num_blocks


def read(flat: np.ndarray, regions: Regions) -> np.ndarray:
    return flat.view(np.uint8).reshape(-1, regions.row_bytes)[regions.rows].ravel().view(np.int64)


def divisors(n):
    return [d for d in range(8, n + 1, 8) if n % d == 0]


geometries = st.builds(
    CacheGeometry,
    num_layers=st.integers(1, 3),
    block_size=st.integers(1, 4),
    num_kv_heads=st.sampled_from([1, 2, 3, 4]),
    head_dim=st.integers(1, 3),
    dtype=st.just(torch.int64),
)
block_lists = st.lists(st.integers(0, 12), min_size=1, max_size=6, unique=True)


@given(st.data(), st.sampled_from(sorted(LAYOUTS)), geometries, block_lists)
def test_regions_are_the_blocks_bytes_in_the_order_that_all_layouts_share(data, name, geometry, blocks):
    layout = LAYOUTS[name]
    flat, labels, num_blocks = labelled(layout, geometry, blocks)
    layer = data.draw(st.sampled_from([None, *range(geometry.num_layers)]))
    natural = row_bytes_of(layout, geometry, layer=layer)
    row_bytes = data.draw(st.sampled_from([None, *divisors(natural)]))
    numbers = np.array(blocks, dtype=np.int32)
    found = regions_of(layout, geometry, num_blocks, numbers, layer=layer, row_bytes=row_bytes)
    wanted = labels if layer is None else labels[:, layer : layer + 1]
    assert found.rows.dtype == np.int64 and found.row_bytes == (row_bytes or natural)
    assert found.num_bytes == wanted.nbytes
    np.testing.assert_array_equal(read(flat, found), wanted.ravel())


@pytest.mark.parametrize("layer", [None, 0, 2])
@pytest.mark.parametrize("names", list(itertools.product(LAYOUTS, LAYOUTS)))
def test_two_arenas_of_other_blocks_and_layouts_are_paired_row_by_row(names, layer):
    (source, target), here, there = [LAYOUTS[n] for n in names], [4, 0, 7], [1, 9, 2]
    row_bytes = min(row_bytes_of(layout, GEOMETRY, layer=layer) for layout in (source, target))
    flat, labels, num_source = labelled(source, GEOMETRY, here)
    empty, _, num_target = labelled(target, GEOMETRY, there)
    a = regions_of(source, GEOMETRY, num_source, np.array(here), layer=layer, row_bytes=row_bytes)
    b = regions_of(target, GEOMETRY, num_target, np.array(there), layer=layer, row_bytes=row_bytes)
    copied = np.full_like(empty, -7)
    copied.view(np.uint8).reshape(-1, row_bytes)[b.rows] = flat.view(np.uint8).reshape(-1, row_bytes)[a.rows]
    view = target.view(torch.from_numpy(copied).view(target.shape(GEOMETRY, num_target)))
    layers = slice(None) if layer is None else slice(layer, layer + 1)
    for i, block in enumerate(there):
        np.testing.assert_array_equal(view[layers, :, block].numpy(), labels[i, layers])
    assert (copied == -7).sum() == copied.size - labels[:, layers].size


def test_a_block_is_2l_regions_when_discrete_and_one_when_aggregated():
    blocks = np.array([5, 6], dtype=np.int32)
    discrete = regions_of(DiscreteLayout(), GEOMETRY, 10, blocks)
    aggregated = regions_of(AggregatedLayout(), GEOMETRY, 10, blocks)
    assert (discrete.row_bytes, len(discrete.rows)) == (GEOMETRY.layer_block_bytes, 2 * 6)
    assert discrete.rows[:6].tolist() == [5, 15, 25, 35, 45, 55]
    assert (aggregated.row_bytes, aggregated.rows.tolist()) == (GEOMETRY.block_bytes, [5, 6])
    one_layer = regions_of(AggregatedLayout(), GEOMETRY, 10, blocks, layer=1)
    assert (one_layer.row_bytes, one_layer.rows.tolist()) == (2 * GEOMETRY.layer_block_bytes, [16, 19])


rows = st.lists(st.integers(0, 8), max_size=20).map(lambda r: np.array(r, dtype=np.int64))


@given(rows, st.integers(0, 3))
def test_merging_joins_exactly_the_rows_that_are_neighbours_at_both_ends(source, shift):
    target = np.roll(source, shift)
    starts = call_starts(source, target, merge=True).tolist()
    wanted = [
        i for i in range(len(source)) if i == 0 or source[i] != source[i - 1] + 1 or target[i] != target[i - 1] + 1
    ]
    assert starts == wanted
    assert call_starts(source, target, merge=False).tolist() == list(range(len(source)))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"layer": 3}, "layer=3: expected 0 to 2"),
        ({"layer": -1}, "layer=-1"),
        ({"row_bytes": 7}, "row_bytes=7: expected a divisor of"),
        ({"row_bytes": 0}, "row_bytes=0"),
        ({"num_blocks": 4}, "blocks from 4 to 4: expected 0 to 3"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(arguments, named):
    with pytest.raises(ValueError, match=named):
        regions_of(DiscreteLayout(), GEOMETRY, **{"num_blocks": 8, "blocks": np.array([4]), **arguments})
    with pytest.raises(ValueError, match="1 source rows and 2 target rows"):
        call_starts(np.arange(1), np.arange(2), merge=True)


def test_no_blocks_have_no_regions():
    nothing = np.empty(0, dtype=np.int32)
    assert not len(regions_of(DiscreteLayout(), GEOMETRY, 4, nothing).rows)
    assert not len(call_starts(np.arange(0), np.arange(0), merge=True))
