"""HashRunner: a runner that makes data errors visible without a model. Knows block tables; no weights, no attention.

The "KV" of token i is the chained hash of tokens 0..i, h_i = A * h_{i-1} + t_i + 1 (mod 2**64), continued from what the
block table says lies before it and written to every layer's keys and values of a real, tiny cache. The next token is a
hash of all KV *read through the block table*. A stale, lost, misplaced, early or foreign block changes the answer.
"""

from collections.abc import Generator

import numpy as np
import torch

from memserve.kvcache.layout import CacheGeometry
from memserve.mixing import mix64
from memserve.request import Request, ScheduledBatch, StepOutput

_CHAIN = np.uint64(0x9E3779B97F4A7C15)  # A, odd: it has an inverse modulo 2**64
_WEIGHT = np.uint64(0xD1342543DE82EF95)
_LAYER_STEP = np.uint64(0x2545F4914F6CDD1D)


def hash_geometry(block_size: int) -> CacheGeometry:
    """The tiny cache: 2 layers, 1 head of 1 element, int64."""
    return CacheGeometry(num_layers=2, block_size=block_size, num_kv_heads=1, head_dim=1, dtype=torch.int64)


class HashRunner:
    """Runs batches over kv (int64 [L, 2, N, B, 1, 1], any strides). Token ids are in [0, vocab_size)."""

    num_near_ties = 0  # it has no logits

    def __init__(self, kv: torch.Tensor, vocab_size: int) -> None:
        self._kv = kv.numpy().view(np.uint64)[..., 0, 0]  # [L, 2, N, B]
        self._vocab_size = np.uint64(vocab_size)
        num_layers = self._kv.shape[0]
        self._offsets = (np.arange(2 * num_layers, dtype=np.uint64) * _LAYER_STEP).reshape(num_layers, 2, 1)
        self._chain = _Powers(_CHAIN)
        self._unchain = _Powers(np.uint64(pow(int(_CHAIN), -1, 1 << 64)))
        self._weights = _Powers(_WEIGHT)

    def forward(self, batch: ScheduledBatch) -> StepOutput:
        """Writes the batch's KV and returns its next tokens, int32 [num_requests, num_steps], -1 where none."""
        token_ids = np.full((len(batch.requests), batch.num_steps), -1, dtype=np.int32)
        for row, request, num_new, samples in zip(token_ids, batch.requests, batch.num_new, batch.samples, strict=True):
            start = request.num_computed
            new = request.tokens.view[start : start + num_new]
            for step in range(batch.num_steps):
                self._write(request, start, new)
                start += len(new)
                if samples:
                    row[step] = self._next_token(request, start)
                    new = row[step : step + 1]
        return StepOutput(token_ids)

    def forward_by_layer(self, batch: ScheduledBatch) -> Generator[int, None, StepOutput]:
        """The same as a generator that yields each layer's number, all after the last write."""
        output = self.forward(batch)
        yield from range(self._kv.shape[0])
        return output

    def _write(self, request: Request, start: int, tokens: np.ndarray) -> None:
        """Chains `tokens` (int32 [n]) onto the KV before `start` and writes theirs."""
        before = self._read(request, start - 1, start)[0, 0, 0] if start else np.uint64(0)
        n = len(tokens)
        terms = (tokens.astype(np.uint64) + np.uint64(1)) * self._unchain.upto(n)
        chained = self._chain.upto(n) * (np.cumsum(terms, dtype=np.uint64) + self._chain.upto(2)[1:] * before)
        blocks, slots = self._where(request, start, start + n)
        self._kv[:, :, blocks, slots] = chained + self._offsets

    def _next_token(self, request: Request, num_tokens: int) -> np.int32:
        kv = self._read(request, 0, num_tokens)
        total = np.sum(kv * self._weights.upto(num_tokens) * (self._offsets + np.uint64(1)), dtype=np.uint64)
        return np.int32(np.uint64(mix64(int(total))) % self._vocab_size)

    def _read(self, request: Request, start: int, end: int) -> np.ndarray:
        """uint64 [L, 2, end - start]: the KV of tokens [start, end), read through the block table."""
        blocks, slots = self._where(request, start, end)
        kv: np.ndarray = self._kv[:, :, blocks, slots] - self._offsets
        return kv

    def _where(self, request: Request, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        positions = np.arange(start, end)
        block_size = self._kv.shape[3]
        return request.block_table.view[positions // block_size], positions % block_size


class _Powers:
    """base ** [0, n) modulo 2**64, grown as needed."""

    def __init__(self, base: np.uint64) -> None:
        self._base = base
        self._values = np.ones(1, dtype=np.uint64)

    def upto(self, n: int) -> np.ndarray:
        if n > len(self._values):
            size = max(n, 2 * len(self._values))
            steps = np.full(size, self._base, dtype=np.uint64)
            steps[0] = 1
            self._values = np.cumprod(steps, dtype=np.uint64)
        return self._values[:n]
