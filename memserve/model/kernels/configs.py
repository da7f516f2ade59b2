"""The launch configurations of all kernels, by kernel, head dim, element size and compute capability: looked up, never
searched, so that the first request waits for no tuning. `make compile-all` compiles every one of them.

A capability without rows of its own takes those of 90 where it has as much shared memory (100 and 103: 227 KiB), and
those of 80, which fit into 99 KiB, where it has not (86, 89, 120).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

from memserve.jit import RowConfig

HEAD_DIMS = (64, 128, 256)  # head dims are padded to the next of these
_Config = TypeVar("_Config", bound="TileConfig")
_INTERPRETED = 80  # the interpreter takes the tiles of the smallest GPU


@dataclass(frozen=True)
class TileConfig:
    """block_m: rows of queries, block_n: tokens of KV that a program holds at once.

    max_registers: how many of a thread the compiler may take. With a bound it takes them before it spills; without one
    it spills a few, before and after the loops, where that lets more programs run at once.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


@dataclass(frozen=True)
class DecodeConfig(TileConfig):
    """split_tokens: a shorter split of a request's KV spends more on its partial result than on its KV.

    programs: for each multiprocessor, most of them in turn; two or three run at once.
    """

    split_tokens: int = 256
    programs: int = 16


@dataclass(frozen=True)
class ProductConfig:
    """block_w: rows of the weight, block_i: features of them that a program holds at once, at most; its warps share the
    features.
    """

    block_w: int
    block_i: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


_Kind = tuple[int, int, int]  # capability, head dim, bytes of an element
# Five stages are two tiles of KV under way beside the one in use: the block table takes a stage before each.
_PREFILL: dict[_Kind, TileConfig] = {
    (80, 64, 2): TileConfig(128, 64, 8, 5, 255),
    (80, 128, 2): TileConfig(128, 32, 8, 5, 255),
    (80, 256, 2): TileConfig(32, 32, 4, 5, 255),
    (80, 64, 4): TileConfig(32, 16, 4, 3, 255),
    (80, 128, 4): TileConfig(16, 16, 8, 3, 128),
    (80, 256, 4): TileConfig(16, 16, 8, 3, 255),
    (90, 64, 2): TileConfig(128, 64, 8, 5, 128),
    (90, 128, 2): TileConfig(128, 64, 8, 5, 255),
    (90, 256, 2): TileConfig(128, 32, 8, 5, 255),
    (90, 64, 4): TileConfig(32, 16, 4, 3, 255),
    (90, 128, 4): TileConfig(16, 16, 8, 3, 128),
    (90, 256, 4): TileConfig(16, 16, 8, 3, 255),
}
_DECODE: dict[_Kind, DecodeConfig] = {
    (80, 64, 2): DecodeConfig(16, 64, 4, 5, 128),
    (80, 128, 2): DecodeConfig(16, 64, 4, 5, 168),
    (80, 256, 2): DecodeConfig(16, 32, 4, 5, 255),
    (80, 64, 4): DecodeConfig(16, 32, 4, 3, 128),
    (80, 128, 4): DecodeConfig(16, 32, 8, 2, 128),
    (80, 256, 4): DecodeConfig(16, 16, 8, 3, 128),
    (90, 64, 2): DecodeConfig(16, 64, 4, 5, 128),
    (90, 128, 2): DecodeConfig(16, 64, 8, 5),
    (90, 256, 2): DecodeConfig(16, 32, 4, 5, 255),
    (90, 64, 4): DecodeConfig(16, 32, 4, 3, 255),
    (90, 128, 4): DecodeConfig(16, 16, 8, 3, 128),
    (90, 256, 4): DecodeConfig(16, 16, 8, 3, 128),
}
ELEMENTWISE = RowConfig(1024, 4)  # swiglu, whatever it runs on
KV_WRITE = RowConfig(1024, 2)
# Of few_rows, whatever it runs on: 48 KiB of weight under way beside the tile in use.
_PRODUCT, _TWO_PRODUCTS = ProductConfig(32, 256, 4, 4), ProductConfig(32, 256, 4, 4)


def capability_of(device: torch.device) -> int:
    """90 for compute capability 9.0. What is not on a GPU is interpreted, or compiled for a capability by name."""
    if device.type != "cuda":
        return _INTERPRETED
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def multiprocessors_of(device: torch.device) -> int:
    """Of the GPU; one for what is interpreted or compiled without it."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def paged_prefill_config(head_dim: int, dtype: torch.dtype, capability: int) -> TileConfig:
    """Raises ValueError for a head dim, dtype or capability that there is no row for."""
    return _tiles(_PREFILL, head_dim, dtype, capability)


def paged_decode_config(head_dim: int, dtype: torch.dtype, capability: int) -> DecodeConfig:
    """Raises ValueError for a head dim, dtype or capability that there is no row for."""
    return _tiles(_DECODE, head_dim, dtype, capability)


def norm_config(num_features: int) -> RowConfig:
    """A row is held whole, so the widest take the most warps."""
    return RowConfig(1024, min(16, max(4, power_of_two(num_features) // 1024)))


def few_rows_config(gated: bool) -> ProductConfig:
    """gated: of gate and up, two tiles of weight at a time."""
    return _TWO_PRODUCTS if gated else _PRODUCT


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below `number` >= 1."""
    return 1 << (number - 1).bit_length()


def _tiles(table: Mapping[_Kind, _Config], head_dim: int, dtype: torch.dtype, capability: int) -> _Config:
    if capability < 80:
        raise ValueError(f"attention='triton' on compute capability {capability}: expected 80 or more")
    rows = 90 if 90 <= capability < 120 else 80
    padded = next((d for d in HEAD_DIMS if head_dim <= d), None)
    if padded is None or (rows, padded, dtype.itemsize) not in table:
        raise ValueError(
            f"attention='triton' with head_dim={head_dim} in {dtype}: expected at most {HEAD_DIMS[-1]}, "
            "in float16, bfloat16 or float32"
        )
    return table[rows, padded, dtype.itemsize]
