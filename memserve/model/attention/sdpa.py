"""SdpaAttention: torch's scaled_dot_product_attention, request after request. Runs on any device and in any dtype.

Shape legend: base.py's, and n new tokens of one request, G query heads a kv head. Blocks that lie next to each other in
the cache are read in place, as one view; others are gathered first.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from memserve.model.attention.base import Attention
from memserve.model.batch import ForwardBatch


@dataclass(frozen=True)
class Span:
    """One request's part in a step: its rows, where its KV lies, and which of that each new token may see.

    blocks: a slice of adjacent blocks, or int64 block numbers.  mask_nS: bool, None where `is_causal` says it all.
    """

    rows: slice
    blocks: slice | torch.Tensor
    num_kv: int
    is_causal: bool
    mask_nS: torch.Tensor | None


class SdpaAttention(Attention):
    """One scaled_dot_product_attention a request and layer."""

    def __init__(self, batch: ForwardBatch, kv_layers: Sequence[torch.Tensor], num_heads: int) -> None:
        super().__init__(batch, kv_layers, num_heads)
        self._spans = spans(batch, range(batch.num_requests))

    def attend(self, layer: int, q_THD: torch.Tensor) -> torch.Tensor:
        return torch.cat([attend_span(q_THD[span.rows], self.kv_layers[layer], span) for span in self._spans])


def attend_span(q_nHD: torch.Tensor, kv_2NBKD: torch.Tensor, span: Span) -> torch.Tensor:
    """[n, H, D]: attention of one request's new tokens."""
    k_KSD, v_KSD = kv_2NBKD[:, span.blocks].flatten(1, 2)[:, : span.num_kv].transpose(1, 2)
    q_KGnD = torch.unflatten(q_nHD, 1, (len(k_KSD), -1)).permute(1, 2, 0, 3)
    if len(q_nHD) == 1:  # the heads of a group see the same KV: they are the rows of one attention
        return scaled_dot_product_attention(q_KGnD[None, :, :, 0], k_KSD[None], v_KSD[None]).flatten(1, 2)
    num_groups = q_KGnD.shape[1]
    k_KGSD, v_KGSD = (x[:, None].expand(-1, num_groups, -1, -1) for x in (k_KSD, v_KSD))
    o_KGnD = scaled_dot_product_attention(q_KGnD, k_KGSD, v_KGSD, attn_mask=span.mask_nS, is_causal=span.is_causal)
    return o_KGnD.permute(2, 0, 1, 3).flatten(1, 2)


def spans(batch: ForwardBatch, requests: Sequence[int]) -> list[Span]:
    """The spans of these requests (their numbers in the batch)."""
    num_blocks = -(-batch.seq_lens // batch.block_size)
    steps_apart = np.diff(batch.block_tables, axis=1) != 1
    steps_apart &= np.arange(1, batch.block_tables.shape[1]) < num_blocks[:, None]
    adjacent = ~steps_apart.any(axis=1)
    return [_span(batch, i, int(num_blocks[i]), bool(adjacent[i])) for i in requests]


def _span(batch: ForwardBatch, request: int, num_blocks: int, adjacent: bool) -> Span:
    start, stop = batch.query_starts[request : request + 2].tolist()
    num_new, num_kv = stop - start, int(batch.seq_lens[request])
    first = int(batch.block_tables[request, 0])
    blocks = slice(first, first + num_blocks) if adjacent else batch.block_tables_RM[request, :num_blocks]
    has_prefix = 1 < num_new < num_kv
    mask_nS = _mask(num_new, num_kv, batch.device) if has_prefix else None
    return Span(slice(start, stop), blocks, num_kv, num_new == num_kv > 1, mask_nS)


def _mask(num_new: int, num_kv: int, device: torch.device) -> torch.Tensor:
    """bool [n, S]: the i-th of the last n tokens sees all up to itself."""
    return torch.ones(num_new, num_kv, dtype=torch.bool, device=device).tril(num_kv - num_new)
