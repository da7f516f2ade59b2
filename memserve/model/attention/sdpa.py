"""SdpaAttention: torch's scaled_dot_product_attention, request after request. Fast on any device, needs no compiler.

Shape legend: base.py's, and n new tokens of one request, G query heads a kv head. Blocks that lie next to each other in
the cache are read in place, as one view; others are gathered first.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from memserve.model.attention.base import Attention
from memserve.model.batch import ForwardBatch


@dataclass(frozen=True)
class _Span:
    """Where one request's KV lies and which of it each new token may see.

    blocks: a slice of adjacent blocks, or int64 block numbers.  mask_nS: bool, None where `is_causal` says it all.
    """

    blocks: slice | torch.Tensor
    num_kv: int
    is_causal: bool
    mask_nS: torch.Tensor | None


class SdpaAttention(Attention):
    """One scaled_dot_product_attention a request and layer."""

    def __init__(self, batch: ForwardBatch) -> None:
        super().__init__(batch)
        self._spans = _spans(batch)
        self._splits = batch.query_starts[1:-1].tolist()

    def attend(self, q_THD: torch.Tensor, kv_2NBKD: torch.Tensor) -> torch.Tensor:
        q_of_requests = q_THD.tensor_split(self._splits)
        return torch.cat([_attend_one(q, kv_2NBKD, s) for q, s in zip(q_of_requests, self._spans, strict=True)])


def _attend_one(q_nHD: torch.Tensor, kv_2NBKD: torch.Tensor, span: _Span) -> torch.Tensor:
    kv_2SKD = kv_2NBKD[:, span.blocks].flatten(1, 2)[:, : span.num_kv]
    k_KSD, v_KSD = kv_2SKD.transpose(1, 2)
    q_KGnD = q_nHD.reshape(len(q_nHD), len(k_KSD), -1, q_nHD.shape[2]).permute(1, 2, 0, 3)
    if len(q_nHD) == 1:  # the heads of a group see the same KV: they are the rows of one attention
        return scaled_dot_product_attention(q_KGnD[None, :, :, 0], k_KSD[None], v_KSD[None]).flatten(1, 2)
    num_groups = q_KGnD.shape[1]
    k_KGSD, v_KGSD = (x[:, None].expand(-1, num_groups, -1, -1) for x in (k_KSD, v_KSD))
    o_KGnD = scaled_dot_product_attention(q_KGnD, k_KGSD, v_KGSD, attn_mask=span.mask_nS, is_causal=span.is_causal)
    return o_KGnD.permute(2, 0, 1, 3).flatten(1, 2)


def _spans(batch: ForwardBatch) -> list[_Span]:
    num_blocks = -(-batch.seq_lens // batch.block_size)
    steps_apart = np.diff(batch.block_tables, axis=1) != 1
    steps_apart &= np.arange(1, batch.block_tables.shape[1]) < num_blocks[:, None]
    adjacent = ~steps_apart.any(axis=1)
    num_new = np.diff(batch.query_starts)
    columns = (adjacent, num_blocks, batch.block_tables[:, 0], batch.seq_lens, num_new)
    return [_span(batch, i, *row) for i, row in enumerate(zip(*(c.tolist() for c in columns), strict=True))]


def _span(
    batch: ForwardBatch, row: int, adjacent: bool, num_blocks: int, first: int, num_kv: int, num_new: int
) -> _Span:
    blocks = slice(first, first + num_blocks) if adjacent else batch.block_tables_RM[row, :num_blocks]
    has_prefix = 1 < num_new < num_kv
    return _Span(blocks, num_kv, num_new == num_kv > 1, _mask(num_new, num_kv, batch.device) if has_prefix else None)


def _mask(num_new: int, num_kv: int, device: torch.device) -> torch.Tensor:
    """bool [n, S]: the i-th of the last n tokens sees all up to itself."""
    return torch.ones(num_new, num_kv, dtype=torch.bool, device=device).tril(num_kv - num_new)
