"""SparseAttention: decode as products of sparse matrices, whose pattern is the block tables. For CPUs; copies no KV.

All keys of a layer are the rows of one table, all values of another. A decoding request's head meets the rows that its
block table names: q k^T is a product sampled at those entries (torch.sparse.sampled_addmm), and the weighted sum of
values is an embedding bag over the same rows. Both read the cache in place, whatever the layout and however scattered
the blocks, all requests in one call. Requests with more than one new token go through SDPA.

Shape legend: base.py's, and P entries of the pattern: request after request, [H, S] each; C rows of a table of keys.
"""

import math
import warnings
from collections.abc import Sequence

import numpy as np
import torch

from memserve.model.attention.base import Attention
from memserve.model.attention.sdpa import attend_span, spans
from memserve.model.batch import ForwardBatch


class SparseAttention(Attention):
    """Two sparse products and a softmax a layer for all decoding requests; SDPA for each of the others.

    `check` refuses all but float32 and float64 on a CPU, which is what torch's operators take.
    """

    def __init__(self, batch: ForwardBatch, kv_layers: Sequence[torch.Tensor], num_heads: int) -> None:
        super().__init__(batch, kv_layers, num_heads)
        num_new = np.diff(batch.query_starts)
        self._spans = spans(batch, np.flatnonzero(num_new > 1).tolist())
        decoding = np.flatnonzero(num_new == 1)
        self._decode_rows = torch.from_numpy(batch.query_starts[decoding])
        self._pattern = _Pattern(batch, decoding, kv_layers[0], num_heads) if len(decoding) else None

    @classmethod
    def check(cls, device: torch.device, dtype: torch.dtype) -> None:
        if device.type != "cpu" or dtype not in (torch.float32, torch.float64):
            raise ValueError(f"attention='sparse': {dtype} on {device}: expected float32 or float64 on a cpu")

    def attend(self, layer: int, q_THD: torch.Tensor) -> torch.Tensor:
        kv_2NBKD = self.kv_layers[layer]
        if self._pattern is not None and not self._spans:
            return self._pattern.attend(q_THD, kv_2NBKD)
        out_THD = torch.empty_like(q_THD)
        for span in self._spans:
            out_THD[span.rows] = attend_span(q_THD[span.rows], kv_2NBKD, span)
        if self._pattern is not None:
            out_THD[self._decode_rows] = self._pattern.attend(q_THD[self._decode_rows], kv_2NBKD)
        return out_THD


class _Pattern:
    """Which rows of a layer's tables each head of each decoding request meets; the same in every layer.

    The scores live in the values of one CSR matrix [R * H, C], written anew by every layer.
    """

    def __init__(self, batch: ForwardBatch, decoding: np.ndarray, kv_2NBKD: torch.Tensor, num_heads: int) -> None:
        seq_lens = batch.seq_lens[decoding].tolist()
        columns_P = _columns(batch.block_tables[decoding], seq_lens, kv_2NBKD, num_heads)
        lens_of_rows = np.repeat(np.array(seq_lens), num_heads)
        self._row_starts = torch.from_numpy(np.concatenate(([0], np.cumsum(lens_of_rows))))
        values_P = torch.zeros(len(columns_P), dtype=kv_2NBKD.dtype)  # not empty: a NaN would survive beta = 0
        self._weights_P = torch.empty_like(values_P)
        size = (len(seq_lens) * num_heads, len(_table(kv_2NBKD[0])))
        with warnings.catch_warnings():  # once a process: sparse CSR is in beta; and torch 2.11, that it checks nothing
            warnings.filterwarnings("ignore", "Sparse (CSR|invariant)", UserWarning)
            self._scores = torch.sparse_csr_tensor(self._row_starts, columns_P, values_P, size, check_invariants=False)
        sizes = [num_heads * n for n in seq_lens]
        self._of_requests = [
            (scores.view(num_heads, -1), weights.view(num_heads, -1))
            for scores, weights in zip(
                torch.split(self._scores.values(), sizes), torch.split(self._weights_P, sizes), strict=True
            )
        ]
        self._columns_P = columns_P

    def attend(self, q_RHD: torch.Tensor, kv_2NBKD: torch.Tensor) -> torch.Tensor:
        """[R, H, D]: attention of the decoding requests, one row each."""
        head_dim = q_RHD.shape[-1]
        keys_CD, values_CD = _table(kv_2NBKD[0]), _table(kv_2NBKD[1])
        q_D = q_RHD.reshape(-1, head_dim)
        scale = 1 / math.sqrt(head_dim)
        torch.sparse.sampled_addmm(self._scores, q_D, keys_CD.t(), beta=0.0, alpha=scale, out=self._scores)
        for scores_HS, weights_HS in self._of_requests:
            torch.softmax(scores_HS, -1, out=weights_HS)
        bags = torch.embedding_bag(
            values_CD, self._columns_P, self._row_starts[:-1], False, 0, False, self._weights_P
        )  # mode 0 is the sum
        return bags[0].view_as(q_RHD)


def _table(kv_NBKD: torch.Tensor) -> torch.Tensor:
    """[C, D]: one layer's keys or values, with all that lies between its blocks, as rows of one head of one token."""
    num_blocks, block_size, num_kv_heads, head_dim = kv_NBKD.shape
    stride_N, stride_B, stride_K, _ = kv_NBKD.stride()
    num_elements = (num_blocks - 1) * stride_N + (block_size - 1) * stride_B + num_kv_heads * stride_K
    return kv_NBKD.as_strided((num_elements // head_dim, head_dim), (head_dim, 1))


def _columns(
    block_tables_RM: np.ndarray, seq_lens: Sequence[int], kv_2NBKD: torch.Tensor, num_heads: int
) -> torch.Tensor:
    """int64 [P]: the row of `_table` at every entry of the pattern."""
    block_size, num_kv_heads, head_dim = kv_2NBKD.shape[2:]
    stride_N, stride_B, stride_K, stride_D = kv_2NBKD.stride()[1:]
    assert stride_D == 1 and stride_K == head_dim and stride_N % head_dim == 0 and stride_B % head_dim == 0
    offsets_B = np.arange(block_size) * (stride_B // head_dim)
    rows_RS = (block_tables_RM[:, :, None] * (stride_N // head_dim) + offsets_B).reshape(len(seq_lens), -1)
    kv_head_H = np.arange(num_heads) // (num_heads // num_kv_heads)
    columns = [(kv_head_H[:, None] + rows_S[:n]).reshape(-1) for rows_S, n in zip(rows_RS, seq_lens, strict=True)]
    return torch.from_numpy(np.concatenate(columns))
