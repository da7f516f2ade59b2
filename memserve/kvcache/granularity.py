"""Granularity: in how many network calls a request's KV moves, and when (section 5.2, Fig. 5). Moves nothing itself.

| word             | asked for at     | network calls                                        | layout     |
|------------------|------------------|------------------------------------------------------|------------|
| `by_layer`       | first chunk      | 2 for each block and layer, as layers are computed   | any        |
| `by_request`     | end of prefill   | 2L for each block                                    | any        |
| `by_request_agg` | end of prefill   | 1 for each block                                     | aggregated |
| `packed`         | end of prefill   | 1: gathered before it, scattered after it (not in the paper) | any |

L layers. With `merge`, neighbours at both ends go in one call; the paper's counts are without. Between instances of
several ranks these are the counts of each pair of ranks that has heads in common; where they are a part of the heads, a
call gathers its region's rows, one a token.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from memserve.kvcache.head_parts import HeadPart, endpoint_of, head_parts
from memserve.kvcache.layout import AggregatedLayout, CacheGeometry, Layout
from memserve.kvcache.regions import call_starts, regions_of, row_bytes_of
from memserve.messages import Geometry
from memserve.transfer.transport import Move


@dataclass(frozen=True)
class Stretch:
    """Blocks [start, stop) of a ticket, in one layer or in all (None)."""

    start: int
    stop: int
    layer: int | None


@dataclass(frozen=True)
class End:
    """One side of a transfer. endpoint: (incarnation, medium).  num_blocks: of that arena.  blocks: int32 [n], in it.

    num_ranks: over how many the heads are split; blocks have one number on all of them.
    """

    endpoint: tuple[int, int]
    num_blocks: int
    blocks: np.ndarray
    num_ranks: int = 1


class Granularity(ABC):
    """Both ends have the same layout and geometry: the handshake sees to it.

    geometry: of one rank's arenas.  num_ranks: over which this end's heads are split.
    """

    asks_at_first_chunk = False
    transfers_per_stretch = 1  # in the paper's count, where keys and values of a layer are two

    def __init__(self, layout: Layout, geometry: CacheGeometry, merge: bool = False, num_ranks: int = 1) -> None:
        self._layout, self._geometry, self._merge = layout, geometry, merge
        self.num_ranks = num_ranks

    @property
    def wire_geometry(self) -> Geometry:
        """The shape for which this was made: what both ends of a transfer have, over however many ranks."""
        g, dtype = self._geometry, str(self._geometry.dtype).removeprefix("torch.")
        return Geometry(g.num_layers, g.block_size, self._num_heads, g.head_dim, dtype, self._layout.name)

    def check(self, layout: Layout, geometry: CacheGeometry) -> None:
        """Raises ValueError for blocks of another shape than this was made for."""
        if (layout.name, geometry) != (self._layout.name, self._geometry):
            raise ValueError(
                f"granularity for {self._layout.name} blocks of {self._geometry}: expected {layout.name}, {geometry}"
            )

    @property
    def _num_heads(self) -> int:
        """The whole model's kv heads."""
        return self._geometry.num_kv_heads * self.num_ranks

    def stretches(self, posted: np.ndarray, ready: np.ndarray, num_blocks: int) -> list[Stretch]:
        """What can be posted now. posted, ready: int64 [L], leading blocks of each layer.

        A stretch goes on where its layer, or all of them, were posted to, and ends at what is ready there at most.
        """
        whole = bool((ready == num_blocks).all()) and not posted.any()
        return [Stretch(0, num_blocks, None)] if whole else []

    def moves(self, source: End, target: End, layer: int | None) -> list[Move]:
        """The blocks of one end, in one layer or in all, to those of the other: a move for each pair of ranks."""
        parts = head_parts(self._num_heads, source.num_ranks, target.num_ranks)
        return [self._move(source, target, layer, part) for part in parts]

    def moves_by_layer(self, source: End, target: End, layers: Sequence[int | None]) -> list[list[Move]]:
        """`moves` of each of some layers, whose rows lie equally far apart from one layer to the next."""
        moves = self.moves(source, target, layers[0])
        first, *later = (layer or 0 for layer in layers)  # where it is None, of all, it is alone
        source_bytes, target_bytes = self._layer_bytes(source), self._layer_bytes(target)
        return [
            moves,
            *([_later(m, (i - first) * source_bytes, (i - first) * target_bytes) for m in moves] for i in later),
        ]

    def _layer_bytes(self, end: End) -> int:
        """From a layer to the next, in a rank's arena."""
        return self._layout.strides_bytes(self._of_a_rank(end), end.num_blocks)[0]

    def _move(self, source: End, target: End, layer: int | None, part: HeadPart) -> Move:
        here, there = self._of_a_rank(source), self._of_a_rank(target)
        source_rows, target_rows = self._regions(source, here, layer), self._regions(target, there, layer)
        if self._merge:
            order = np.argsort(source_rows)  # neighbours side by side
            source_rows, target_rows = source_rows[order], target_rows[order]
        starts, packed = self._calls(source_rows, target_rows)
        from_rank = (endpoint_of(source.endpoint[0], part.source_rank), source.endpoint[1])
        to_rank = (endpoint_of(target.endpoint[0], part.target_rank), target.endpoint[1])
        move = Move(from_rank, to_rank, self._row_bytes(here), source_rows, target_rows, starts, packed)
        return move if here == there else self._of_heads(move, part, here, there)

    def _of_heads(self, move: Move, part: HeadPart, here: CacheGeometry, there: CacheGeometry) -> Move:
        """Of a move of whole regions, some heads of each token. A region is [tokens, kv heads, head_dim]."""
        token_bytes = here.layer_block_bytes // here.block_size
        num_tokens = self._row_bytes(here) // token_bytes
        source_step, target_step = here.num_kv_heads // part.num_heads, there.num_kv_heads // part.num_heads
        return replace(
            move,
            row_bytes=token_bytes // source_step,
            source_rows=move.source_rows * (num_tokens * source_step) + part.source_first // part.num_heads,
            target_rows=move.target_rows * (num_tokens * target_step) + part.target_first // part.num_heads,
            num_alike=num_tokens,
            source_step=source_step,
            target_step=target_step,
        )

    def _of_a_rank(self, end: End) -> CacheGeometry:
        if end.num_ranks == self.num_ranks:
            return self._geometry
        return replace(self._geometry, num_kv_heads=self._num_heads // end.num_ranks)

    def _regions(self, end: End, geometry: CacheGeometry, layer: int | None) -> np.ndarray:
        """The rows of an end's regions, whole, in a rank's arena."""
        size = self._row_bytes(geometry)
        return regions_of(self._layout, geometry, end.num_blocks, end.blocks, layer=layer, row_bytes=size).rows

    def _calls(self, source_rows: np.ndarray, target_rows: np.ndarray) -> tuple[np.ndarray, bool]:
        """Where the network calls begin, and whether they are packed."""
        return call_starts(source_rows, target_rows, merge=self._merge), False

    @abstractmethod
    def _row_bytes(self, geometry: CacheGeometry) -> int:
        """Bytes of one region in arenas of that shape."""


def _later(move: Move, source_bytes: int, target_bytes: int) -> Move:
    """The same move of a layer that lies so many bytes behind."""
    source_rows = move.source_rows + source_bytes // move.row_bytes
    target_rows = move.target_rows + target_bytes // move.row_bytes
    return replace(move, source_rows=source_rows, target_rows=target_rows)


class ByLayer(Granularity):
    """Every layer's keys and values leave as soon as they are computed: transfer beside compute."""

    asks_at_first_chunk = True
    transfers_per_stretch = 2

    def stretches(self, posted: np.ndarray, ready: np.ndarray, num_blocks: int) -> list[Stretch]:
        return [Stretch(int(posted[i]), int(ready[i]), int(i)) for i in np.flatnonzero(ready > posted)]

    def _row_bytes(self, geometry: CacheGeometry) -> int:
        return geometry.layer_block_bytes


class ByRequest(Granularity):
    """All layers after the prefill, every layer's keys and values of a block a call of their own."""

    def _row_bytes(self, geometry: CacheGeometry) -> int:
        return geometry.layer_block_bytes


class ByRequestAgg(Granularity):
    """One call a block, which aggregated blocks make possible. Raises ValueError for another layout."""

    def __init__(self, layout: Layout, geometry: CacheGeometry, merge: bool = False, num_ranks: int = 1) -> None:
        if not isinstance(layout, AggregatedLayout):
            raise ValueError(f"granularity=by_request_agg contradicts layout={layout.name}: expected layout=aggregated")
        super().__init__(layout, geometry, merge, num_ranks)

    def _row_bytes(self, geometry: CacheGeometry) -> int:
        return geometry.block_bytes


class Packed(Granularity):
    """One call a ticket, through a buffer; of blocks in both media, one for each."""

    def _row_bytes(self, geometry: CacheGeometry) -> int:
        return row_bytes_of(self._layout, geometry)

    def _calls(self, source_rows: np.ndarray, target_rows: np.ndarray) -> tuple[np.ndarray, bool]:
        return np.zeros(1, dtype=np.int64), True
