"""Granularity: in how many network calls a request's KV moves, and when (section 5.2, Fig. 5). Moves nothing itself.

| word             | asked for at     | network calls                                        | layout     |
|------------------|------------------|------------------------------------------------------|------------|
| `by_layer`       | admission        | 2 for each block and layer, as layers are computed   | any        |
| `by_request`     | end of prefill   | 2L for each block                                    | any        |
| `by_request_agg` | end of prefill   | 1 for each block                                     | aggregated |
| `packed`         | end of prefill   | 1: gathered before it, scattered after it (not in the paper) | any |

L layers. With `merge`, neighbours at both ends go in one call; the paper's counts are without.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

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
    """One side of a move. endpoint: (incarnation, medium).  num_blocks: of that arena.  blocks: int32 [n], in it."""

    endpoint: tuple[int, int]
    num_blocks: int
    blocks: np.ndarray


class Granularity(ABC):
    """Both ends have the same layout and geometry: the handshake sees to it."""

    asks_at_admission = False
    transfers_per_stretch = 1  # in the paper's count, where keys and values of a layer are two

    def __init__(self, layout: Layout, geometry: CacheGeometry, merge: bool = False) -> None:
        self._layout, self._geometry, self._merge = layout, geometry, merge

    @property
    def wire_geometry(self) -> Geometry:
        """The shape for which this was made: what both ends of a transfer have."""
        g, dtype = self._geometry, str(self._geometry.dtype).removeprefix("torch.")
        return Geometry(g.num_layers, g.block_size, g.num_kv_heads, g.head_dim, dtype, self._layout.name)

    def stretches(self, posted: np.ndarray, ready: np.ndarray, num_blocks: int) -> list[Stretch]:
        """What can be posted now. posted, ready: int64 [L], leading blocks of each layer."""
        whole = bool((ready == num_blocks).all()) and not posted.any()
        return [Stretch(0, num_blocks, None)] if whole else []

    def move(self, source: End, target: End, layer: int | None) -> Move:
        """The blocks of one end, in one layer or in all, to those of the other."""
        row_bytes = self._row_bytes(layer)
        here, there = (
            regions_of(self._layout, self._geometry, e.num_blocks, e.blocks, layer=layer, row_bytes=row_bytes)
            for e in (source, target)
        )
        return Move(
            source.endpoint, target.endpoint, row_bytes, here.rows, there.rows, *self._calls(here.rows, there.rows)
        )

    def _calls(self, source_rows: np.ndarray, target_rows: np.ndarray) -> tuple[np.ndarray, bool]:
        """Where the network calls begin, and whether they are packed."""
        return call_starts(source_rows, target_rows, merge=self._merge), False

    @abstractmethod
    def _row_bytes(self, layer: int | None) -> int:
        """Bytes of one region."""


class ByLayer(Granularity):
    """Every layer's keys and values leave as soon as they are computed: transfer beside compute."""

    asks_at_admission = True
    transfers_per_stretch = 2

    def stretches(self, posted: np.ndarray, ready: np.ndarray, num_blocks: int) -> list[Stretch]:
        return [Stretch(int(posted[i]), int(ready[i]), int(i)) for i in np.flatnonzero(ready > posted)]

    def _row_bytes(self, layer: int | None) -> int:
        return self._geometry.layer_block_bytes


class ByRequest(Granularity):
    """All layers after the prefill, every layer's keys and values of a block a call of their own."""

    def _row_bytes(self, layer: int | None) -> int:
        return self._geometry.layer_block_bytes


class ByRequestAgg(Granularity):
    """One call a block, which aggregated blocks make possible. Raises ValueError for another layout."""

    def __init__(self, layout: Layout, geometry: CacheGeometry, merge: bool = False) -> None:
        if not isinstance(layout, AggregatedLayout):
            raise ValueError(f"granularity=by_request_agg contradicts layout={layout.name}: expected layout=aggregated")
        super().__init__(layout, geometry, merge)

    def _row_bytes(self, layer: int | None) -> int:
        return self._geometry.block_bytes


class Packed(Granularity):
    """One call a ticket, through a buffer."""

    def _row_bytes(self, layer: int | None) -> int:
        return row_bytes_of(self._layout, self._geometry)

    def _calls(self, source_rows: np.ndarray, target_rows: np.ndarray) -> tuple[np.ndarray, bool]:
        return np.zeros(1, dtype=np.int64), True
