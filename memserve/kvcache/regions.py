"""Regions: which contiguous bytes of an arena make up a list of blocks. Knows layouts; never touches memory.

An arena's bytes are seen as [num_rows, row_bytes]; a list of blocks is then a list of row numbers. Their order is the
same in every layout (block, layer, keys before values, token), so two arenas with other blocks and another layout are
paired row by row, once both count in rows of the same size:

    row_bytes = min(row_bytes_of(layout, geometry), row_bytes_of(their_layout, geometry))
    here = regions_of(layout, geometry, num_blocks, blocks, row_bytes=row_bytes)
    there = regions_of(their_layout, geometry, their_num_blocks, their_blocks, row_bytes=row_bytes)
    starts = call_starts(here.rows, there.rows, merge=False)  # one network call a region, as in the paper (Fig. 5)
"""

from dataclasses import dataclass

import numpy as np

from memserve.kvcache.layout import CacheGeometry, Layout


@dataclass(frozen=True)
class Regions:
    """rows: int64 [n], numbers of rows of `row_bytes` bytes each, in an arena seen as [num_rows, row_bytes]."""

    row_bytes: int
    rows: np.ndarray

    @property
    def num_bytes(self) -> int:
        return self.row_bytes * len(self.rows)


def row_bytes_of(layout: Layout, geometry: CacheGeometry, *, layer: int | None = None) -> int:
    """Bytes of the longest contiguous region: the natural row of `regions_of` with the same arguments."""
    if layer is not None and not 0 <= layer < geometry.num_layers:
        raise ValueError(f"layer={layer}: expected 0 to {geometry.num_layers - 1}")
    if layer is None:
        return geometry.block_bytes // layout.regions_per_block(geometry)
    return 2 * geometry.layer_block_bytes // layout.regions_per_layer()


def regions_of(
    layout: Layout,
    geometry: CacheGeometry,
    num_blocks: int,
    blocks: np.ndarray,
    *,
    layer: int | None = None,
    row_bytes: int | None = None,
) -> Regions:
    """The regions of `blocks` (int32 [m], each in [0, num_blocks)) in an arena of `num_blocks` blocks.

    layer: that layer's keys and values only.  row_bytes: by default the longest region's; else a divisor of it, such as
    the other side's.
    Of all layers, discrete gives 2L rows a block and aggregated gives one.
    Raises ValueError for a block, layer or row size that does not fit.
    """
    natural = row_bytes_of(layout, geometry, layer=layer)
    size = natural if row_bytes is None else row_bytes
    if size < 1 or natural % size:
        raise ValueError(f"row_bytes={size}: expected a divisor of {natural}, the bytes of a region")
    if len(blocks) and not 0 <= int(blocks.min()) <= int(blocks.max()) < num_blocks:
        raise ValueError(f"blocks from {blocks.min()} to {blocks.max()}: expected 0 to {num_blocks - 1}")
    starts = _array_starts(layout, geometry, num_blocks, blocks, layer)
    rows = starts[:: natural // geometry.layer_block_bytes] // size
    if size != natural:
        rows = (rows[:, None] + np.arange(natural // size)).ravel()
    return Regions(size, rows)


def call_starts(source_rows: np.ndarray, target_rows: np.ndarray, *, merge: bool) -> np.ndarray:
    """Where each network call begins, int64 [num_calls], among paired rows (int64 [n] each).

    merge=False: one call a row.  merge=True: rows that are neighbours at both ends go in one call.
    """
    if len(source_rows) != len(target_rows):
        raise ValueError(f"{len(source_rows)} source rows and {len(target_rows)} target rows: expected as many")
    if not merge or not len(source_rows):
        return np.arange(len(source_rows), dtype=np.int64)
    apart = (np.diff(source_rows) != 1) | (np.diff(target_rows) != 1)
    return np.concatenate([[0], np.flatnonzero(apart) + 1]).astype(np.int64)


def _array_starts(
    layout: Layout, geometry: CacheGeometry, num_blocks: int, blocks: np.ndarray, layer: int | None
) -> np.ndarray:
    """Byte offsets, int64, at which the keys, then the values, of each layer of each block begin."""
    layer_stride, kv_stride, block_stride = layout.strides_bytes(geometry, num_blocks)
    layers = np.arange(geometry.num_layers) if layer is None else np.array([layer])
    in_block = (layers[:, None] * layer_stride + np.array([0, kv_stride])).ravel()
    starts: np.ndarray = (blocks.astype(np.int64)[:, None] * block_stride + in_block).ravel()
    return starts
