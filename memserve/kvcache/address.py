"""Addresses: one int64 names a block in the whole cluster, and says whether it is still the same block.

    bit  63      62..49        48..47     46..25          24..0
         0       incarnation   medium     generation      block

An instance's incarnation is never reused; a block's generation grows each time it is freed, so a stale address is
refused instead of reading another request's KV. Inside an instance blocks are plain int32 numbers; addresses are made
and checked at the API's edge (mempool.py). The paper says only that an address encodes the instance (section 4.1).
"""

import enum

import numpy as np

BLOCK_BITS = 25
GENERATION_BITS = 22
MEDIUM_BITS = 2
INCARNATION_BITS = 14

MAX_BLOCKS = 1 << BLOCK_BITS
MAX_INCARNATION = (1 << INCARNATION_BITS) - 1
GENERATION_MASK = (1 << GENERATION_BITS) - 1

_MEDIUM_SHIFT = BLOCK_BITS + GENERATION_BITS
_INCARNATION_SHIFT = _MEDIUM_SHIFT + MEDIUM_BITS


class Medium(enum.IntEnum):
    """Where a block's bytes are. HBM is the compute device's memory (the host's, when that device is a CPU)."""

    HBM = 0
    DRAM = 1


class Placement(enum.StrEnum):
    """Where `alloc_mem` may take blocks, where one medium is not enough of an answer.

    MIXED: HBM's free blocks first, then DRAM, and only then what is cached in HBM makes room.
    """

    MIXED = "mixed"


def head(incarnation: int, medium: Medium) -> int:
    """The bits that all addresses of an instance in one medium have in common."""
    return (incarnation << _INCARNATION_SHIFT) | (int(medium) << _MEDIUM_SHIFT)


def encode(heads: int | np.ndarray, generations: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """Addresses, int64 [n], of `blocks` (int64 [n]) at their `generations` (int64 [n], taken modulo 2**22).

    heads: of all of them, or of each (int64 [n]). In place, after the first operation: alloc_mem is mostly this.
    """
    addrs = generations & GENERATION_MASK
    addrs <<= BLOCK_BITS
    addrs |= blocks
    addrs |= heads
    return addrs


def block_of(addrs: np.ndarray) -> np.ndarray:
    """Block numbers, int32 [n]."""
    return (addrs & (MAX_BLOCKS - 1)).astype(np.int32)


def generation_of(addrs: np.ndarray) -> np.ndarray:
    """Generations modulo 2**22, int64 [n]."""
    return (addrs >> BLOCK_BITS) & GENERATION_MASK


def medium_of(addrs: np.ndarray) -> np.ndarray:
    """Media as integers, int64 [n]."""
    return (addrs >> _MEDIUM_SHIFT) & ((1 << MEDIUM_BITS) - 1)


def incarnation_of(addrs: np.ndarray) -> np.ndarray:
    """Incarnations, int64 [n]."""
    return addrs >> _INCARNATION_SHIFT


def describe(addr: int) -> str:
    """An address for people: `instance 3, medium 0, block 17, generation 2`."""
    one = np.array([addr], dtype=np.int64)
    return (
        f"instance {incarnation_of(one)[0]}, medium {medium_of(one)[0]}, "
        f"block {block_of(one)[0]}, generation {generation_of(one)[0]}"
    )
