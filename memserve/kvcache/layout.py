"""Layout: how a block's KV lies in an arena. Knows shapes and strides; never allocates or copies.

Shape legend: L layers, N blocks, B tokens in a block, K kv heads, D head dim. Both layouts give the same strided view
`kv[L, 2, N, B, K, D]` (index 1 chooses keys or values), so one kernel serves both. What differs is how many contiguous
regions make up a block, and that alone is the difference between the paper's transfer modes (section 5.2, Fig. 5).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from memserve.config.sizes import bytes_text


@dataclass(frozen=True)
class CacheGeometry:
    """Everything that two pools must agree on before KV can move between them.

    Sizes in elements; `dtype` is the torch dtype of the cached KV.
    """

    num_layers: int
    block_size: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        for name in ("num_layers", "block_size", "num_kv_heads", "head_dim"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: expected an integer >= 1")
        if not isinstance(self.dtype, torch.dtype):
            raise ValueError(f"dtype={self.dtype!r}: expected a torch.dtype")

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, all layers, keys and values."""
        return self.num_layers * 2 * self.layer_block_bytes

    @property
    def layer_block_bytes(self) -> int:
        """Bytes of one block's keys (or values) in one layer."""
        return self.block_size * self.num_kv_heads * self.head_dim * self.dtype.itemsize


def what_fits(geometry: CacheGeometry, num_hbm_blocks: int, num_dram_blocks: int) -> str:
    """One line: `4096 blocks of 16 tokens = 65,536 tokens, 1.41 GiB in HBM; 0 in DRAM`."""
    parts = []
    for medium, count in (("HBM", num_hbm_blocks), ("DRAM", num_dram_blocks)):
        size = f"{count} blocks of {geometry.block_size} tokens = {count * geometry.block_size:,} tokens"
        parts.append(f"{size}, {bytes_text(count * geometry.block_bytes)} in {medium}" if count else f"0 in {medium}")
    return "; ".join(parts)


class Layout(ABC):
    """One way to lay blocks out in memory."""

    name: str

    @abstractmethod
    def shape(self, geometry: CacheGeometry, num_blocks: int) -> tuple[int, ...]:
        """Shape of the contiguous arena tensor."""

    @abstractmethod
    def view(self, arena: torch.Tensor) -> torch.Tensor:
        """The arena as kv[L, 2, N, B, K, D]: a view that shares its memory."""

    @abstractmethod
    def regions_per_block(self, geometry: CacheGeometry) -> int:
        """Contiguous regions that make up one block (2L or 1)."""

    @abstractmethod
    def regions_per_layer(self) -> int:
        """Contiguous regions that make up one block's keys and values in one layer (2 or 1)."""

    @abstractmethod
    def strides_bytes(self, geometry: CacheGeometry, num_blocks: int) -> tuple[int, int, int]:
        """Bytes from a layer to the next, from keys to values, and from a block to the next, in an arena."""


class DiscreteLayout(Layout):
    """vLLM's layout, "original" in the paper: every layer has its own key and value array; 2L regions a block."""

    name = "discrete"

    def shape(self, geometry: CacheGeometry, num_blocks: int) -> tuple[int, ...]:
        g = geometry
        return (g.num_layers, 2, num_blocks, g.block_size, g.num_kv_heads, g.head_dim)

    def view(self, arena: torch.Tensor) -> torch.Tensor:
        return arena

    def regions_per_block(self, geometry: CacheGeometry) -> int:
        return 2 * geometry.num_layers

    def regions_per_layer(self) -> int:
        return 2

    def strides_bytes(self, geometry: CacheGeometry, num_blocks: int) -> tuple[int, int, int]:
        array_bytes = num_blocks * geometry.layer_block_bytes
        return 2 * array_bytes, array_bytes, geometry.layer_block_bytes


class AggregatedLayout(Layout):
    """The paper's aggregated blocks ("akin to huge pages"): all layers of a block lie together; 1 region a block."""

    name = "aggregated"

    def shape(self, geometry: CacheGeometry, num_blocks: int) -> tuple[int, ...]:
        g = geometry
        return (num_blocks, g.num_layers, 2, g.block_size, g.num_kv_heads, g.head_dim)

    def view(self, arena: torch.Tensor) -> torch.Tensor:
        return arena.permute(1, 2, 0, 3, 4, 5)

    def regions_per_block(self, geometry: CacheGeometry) -> int:
        return 1

    def regions_per_layer(self) -> int:
        return 1

    def strides_bytes(self, geometry: CacheGeometry, num_blocks: int) -> tuple[int, int, int]:
        return 2 * geometry.layer_block_bytes, geometry.layer_block_bytes, geometry.block_bytes
