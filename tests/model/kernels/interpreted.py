"""What tests of interpreted kernels share: bounds, and batches over a poisoned cache.

Triton decides at its import whether it interprets, so these tests run in a process of their own (test_interpreter.py
starts it).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from memserve.kvcache.layout import AggregatedLayout, CacheGeometry, DiscreteLayout

LAYOUTS = {"discrete": DiscreteLayout(), "aggregated": AggregatedLayout()}
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Paged:
    """Requests over one layer of a cache, scattered; whatever they do not hold is NaN."""

    q_THD: torch.Tensor
    kv_2NBKD: torch.Tensor
    tables_RM: torch.Tensor
    starts_R1: torch.Tensor
    num_new: np.ndarray
    num_kv: np.ndarray

    @property
    def lens_R(self) -> torch.Tensor:
        return torch.from_numpy(self.num_kv)


def paged(
    lengths: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    num_kv_heads: int = 2,
    num_groups: int = 2,
    head_dim: int = 16,
    block_size: int = 4,
    layout: str = "discrete",
) -> Paged:
    """lengths: (tokens in the cache before the step, new tokens) of each request. The second of two layers."""
    rng = np.random.default_rng(0)
    num_new = np.array([new for _, new in lengths])
    num_kv = np.array([old + new for old, new in lengths])
    num_blocks = -(-num_kv // block_size)
    numbers = rng.permutation(int(num_blocks.sum()) + 3)
    geometry = CacheGeometry(2, block_size, num_kv_heads, head_dim, dtype)
    arena = torch.full(LAYOUTS[layout].shape(geometry, len(numbers)), torch.nan, dtype=dtype)
    kv_2NBKD = LAYOUTS[layout].view(arena)[1]
    tables_RM = torch.zeros(len(lengths), int(num_blocks.max()), dtype=torch.int64)
    for row, blocks, n in zip(tables_RM, np.split(numbers, np.cumsum(num_blocks)), num_kv, strict=False):
        row[: len(blocks)] = torch.from_numpy(blocks)
        positions = torch.arange(n)
        written = torch.randn(2, n, num_kv_heads, head_dim).to(dtype)
        kv_2NBKD[:, row[positions // block_size], positions % block_size] = written
    starts_R1 = torch.from_numpy(np.concatenate(([0], np.cumsum(num_new))))
    q_THD = torch.randn(int(num_new.sum()), num_kv_heads * num_groups, head_dim).to(dtype)
    return Paged(q_THD, kv_2NBKD, tables_RM, starts_R1, num_new, num_kv)
