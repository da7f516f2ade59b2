"""attend_tile: one tile of keys and values, found through a block table, folded into a running softmax. Knows no grid.

The running softmax is that of FlashAttention (arXiv 2205.14135), in powers of two: for each row its largest score so
far, the sum of its weights relative to that, and the weighted sum of values.

Shape legend: M rows (query head, token), N tokens of the tile, D head dim, padded to a power of two.
"""

from __future__ import annotations

from memserve.jit import INTERPRETED, jit, tl


@jit()
def load_rows(pointers: tl.tensor, mask: tl.tensor, MASKED: tl.constexpr) -> tl.tensor:
    """Unmasked where that is known beforehand: such loads are wider and run further ahead."""
    return tl.load(pointers, mask=mask, other=0.0) if MASKED else tl.load(pointers)


@jit()
def factor(x: tl.tensor) -> tl.tensor:
    """As it is multiplied. Triton's interpreter would take bfloat16 for the integers that hold its bits."""
    return x.to(tl.float32) if INTERPRETED else x


@jit()
def attend_tile(
    q: tl.tensor, sums: tl.tensor, total: tl.tensor, peak: tl.tensor, first: tl.tensor, end: tl.tensor,
    last_seen: tl.tensor, scale: tl.tensor, table_ptr: tl.tensor, keys_ptr: tl.tensor, values_ptr: tl.tensor,
    kv_stride_N: tl.tensor, kv_stride_B: tl.tensor, MASKED: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Folds in positions [first, first + N); of them, where MASKED, those below `end` that row m sees: <= last_seen[m].

    q: [M, D].  sums: float32 [M, D].  total, peak: float32 [M], the peak before `scale` (> 0) is applied. Nothing at or
    past `end` is read, not even NaN.
    """
    positions = first + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    inside = positions < end
    if MASKED:
        blocks = tl.load(table_ptr + positions // BLOCK_SIZE, mask=inside, other=0)
        mask = inside[:, None] & (d < D)[None, :]
    else:
        blocks = tl.load(table_ptr + positions // BLOCK_SIZE)
        mask = (d < D)[None, :] & (positions >= 0)[:, None]
    offsets = blocks.to(tl.int64) * kv_stride_N + (positions % BLOCK_SIZE).to(tl.int64) * kv_stride_B
    offsets = offsets[:, None] + d[None, :]
    k = load_rows(keys_ptr + offsets, mask, MASKED or D != BLOCK_D)
    scores = tl.dot(factor(q), tl.trans(factor(k)), input_precision="ieee")
    if MASKED:
        seen = inside[None, :] & (positions[None, :] <= last_seen[:, None])
        scores = tl.where(seen, scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, axis=1))
    weights = tl.exp2(scores * scale - (new_peak * scale)[:, None])  # one operation each, where these may be fused
    shrink = tl.exp2(peak * scale - new_peak * scale)
    total = total * shrink + tl.sum(weights, axis=1)
    v = load_rows(values_ptr + offsets, mask, MASKED or D != BLOCK_D)
    sums = tl.dot(factor(weights.to(v.dtype)), factor(v), sums * shrink[:, None], input_precision="ieee")
    return sums, total, new_peak
