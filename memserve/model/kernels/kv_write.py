"""RoPE and the write into the paged cache as one kernel. Knows no layer and no request.

A thread has 16 bytes of each half of a head: x and y of as many pairs, which turn together.

Shape legend: T tokens, H query heads, K kv heads, D head dim, F = D / 2; kv[2, N, B, K, D] is one layer of a cache.
"""

from __future__ import annotations

import torch

from memserve.jit import KernelLaunch, RowConfig, await_kernel_before, jit, tl
from memserve.model.kernels.configs import KV_WRITE, power_of_two


@jit()
def _cell(
    kv_ptr: tl.tensor, slot_ptr: tl.tensor, kv_stride_N: tl.tensor, kv_stride_B: tl.tensor, BLOCK_SIZE: tl.constexpr
) -> tl.tensor:
    """Where the first key head of a slot lies, and whether there is such a slot: as a block, since Triton 3.9's
    interpreter takes no scalar for a mask.
    """
    slot = tl.load(slot_ptr)  # int64; negative: a padding row, which writes nowhere
    cell_ptr = kv_ptr + (slot // BLOCK_SIZE) * kv_stride_N + (slot % BLOCK_SIZE) * kv_stride_B
    return cell_ptr, tl.zeros([1, 1], tl.int64) + slot >= 0


@jit()
def _kv_write_kernel(
    qk_ptr: tl.tensor, v_ptr: tl.tensor, cos_ptr: tl.tensor, sin_ptr: tl.tensor, q_out_ptr: tl.tensor,
    kv_ptr: tl.tensor, slots_ptr: tl.tensor, qk_stride_T: tl.tensor, v_stride_T: tl.tensor, kv_stride_2: tl.tensor,
    kv_stride_N: tl.tensor, kv_stride_B: tl.tensor, kv_stride_K: tl.tensor, H: tl.constexpr, K: tl.constexpr,
    D: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_F: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:  # fmt: skip
    NUM_QK_PARTS: tl.constexpr = (H + K + BLOCK_H - 1) // BLOCK_H
    NUM_PARTS: tl.constexpr = NUM_QK_PARTS + (K + BLOCK_H - 1) // BLOCK_H  # of a token in turn, as they lie in memory
    token, part = (tl.program_id(0) // NUM_PARTS).to(tl.int64), tl.program_id(0) % NUM_PARTS
    F: tl.constexpr = D // 2
    await_kernel_before(EARLY)
    h, f = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_F)[None, :]
    if part < NUM_QK_PARTS:
        head = part * BLOCK_H + h
        mask = (head < H + K) & (f < F)
        row_ptr = qk_ptr + token * qk_stride_T + head * D
        x = tl.load(row_ptr + f, mask=mask, other=0.0)
        y = tl.load(row_ptr + F + f, mask=mask, other=0.0)
        # for each head again, from the L1 cache: one row for all would have another layout, and x would change its own
        angle = token * D + tl.broadcast_to(f, (BLOCK_H, BLOCK_F))
        cos = tl.load(cos_ptr + angle, mask=mask, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + F + angle, mask=mask, other=0.0).to(tl.float32)
        wide_x, wide_y = x.to(tl.float32), y.to(tl.float32)
        turned_x = (wide_x * cos - wide_y * sin).to(qk_ptr.dtype.element_ty)
        turned_y = (wide_y * cos + wide_x * sin).to(qk_ptr.dtype.element_ty)
        q_ptr = q_out_ptr + token * H * D + head * D + f
        tl.store(q_ptr, turned_x, mask=mask & (head < H))
        tl.store(q_ptr + F, turned_y, mask=mask & (head < H))
        if (part + 1) * BLOCK_H > H:  # most programs have no key, and wait for no slot
            cell_ptr, is_real = _cell(kv_ptr, slots_ptr + token, kv_stride_N, kv_stride_B, BLOCK_SIZE)
            k_ptr = cell_ptr + (head - H).to(tl.int64) * kv_stride_K + f
            tl.store(k_ptr, turned_x, mask=mask & (head >= H) & is_real)
            tl.store(k_ptr + F, turned_y, mask=mask & (head >= H) & is_real)
    else:
        head = (part - NUM_QK_PARTS) * BLOCK_H + h
        mask = (head < K) & (f < F)
        row_ptr = v_ptr + token * v_stride_T + head * D
        x = tl.load(row_ptr + f, mask=mask, other=0.0)
        y = tl.load(row_ptr + F + f, mask=mask, other=0.0)
        cell_ptr, is_real = _cell(kv_ptr, slots_ptr + token, kv_stride_N, kv_stride_B, BLOCK_SIZE)
        value_ptr = cell_ptr + kv_stride_2 + head.to(tl.int64) * kv_stride_K + f
        tl.store(value_ptr, x, mask=mask & is_real)
        tl.store(value_ptr + F, y, mask=mask & is_real)


def kv_write_launch(
    qk_THD: torch.Tensor,
    v_TKD: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_out_THD: torch.Tensor,
    kv_2NBKD: torch.Tensor,
    slots_T: torch.Tensor,
    config: RowConfig = KV_WRITE,
) -> KernelLaunch:
    """Rotates queries and keys; queries go to q_out_THD, keys and values to the slots of their tokens.

    qk_THD: [T, H + K, D], the key heads behind the query heads; the stride of T is free here and in v_TKD.
    cos, sin: [T, 1, 2, F] of `RotaryEmbedding.rotation`, whose halves differ in the sign of sin.
    slots_T: int64 [T]; a negative one is written nowhere.
    kv_2NBKD: any strides but that of D, past 2^31 elements too.
    """
    num_tokens, num_heads, head_dim = q_out_THD.shape
    block_size, num_kv_heads = kv_2NBKD.shape[2:4]
    assert qk_THD.shape[1] == num_heads + num_kv_heads and q_out_THD.is_contiguous() and kv_2NBKD.stride(4) == 1
    assert qk_THD.stride()[1:] == v_TKD.stride()[1:] == (head_dim, 1) and cos.is_contiguous() and sin.is_contiguous()
    block_f = power_of_two(head_dim // 2)
    block_h = max(1, config.block_elements // (2 * block_f))
    args = {
        "qk_ptr": qk_THD, "v_ptr": v_TKD, "cos_ptr": cos, "sin_ptr": sin, "q_out_ptr": q_out_THD, "kv_ptr": kv_2NBKD,
        "slots_ptr": slots_T, "qk_stride_T": qk_THD.stride(0), "v_stride_T": v_TKD.stride(0),
        **dict(zip(("kv_stride_2", "kv_stride_N", "kv_stride_B", "kv_stride_K"), kv_2NBKD.stride()[:4], strict=True)),
    }  # fmt: skip
    constants = {"H": num_heads, "K": num_kv_heads, "D": head_dim, "BLOCK_SIZE": block_size}
    constants |= {"BLOCK_H": block_h, "BLOCK_F": block_f}
    num_parts = -(-(num_heads + num_kv_heads) // block_h) + -(-num_kv_heads // block_h)
    grid = (num_tokens * num_parts,)
    return KernelLaunch(_kv_write_kernel, grid, args, constants, config.num_warps, 1, fp_fusion=False)


def kv_write_reference(
    qk_THD: torch.Tensor,
    v_TKD: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    kv_2NBKD: torch.Tensor,
    slots_T: torch.Tensor,
) -> torch.Tensor:
    """The same with torch's indexing, in the dtype of qk_THD; returns the queries [T, H, D]."""
    x_TH2F = torch.unflatten(qk_THD, -1, (2, -1))
    turned_THD: torch.Tensor = (x_TH2F * cos + x_TH2F.flip(-2) * sin).flatten(-2)
    num_heads = qk_THD.shape[1] - v_TKD.shape[1]
    real_T = slots_T >= 0
    block, offset = slots_T[real_T] // kv_2NBKD.shape[2], slots_T[real_T] % kv_2NBKD.shape[2]
    kv_2NBKD[0, block, offset] = turned_THD[real_T, num_heads:]
    kv_2NBKD[1, block, offset] = v_TKD[real_T]
    return turned_THD[:, :num_heads]
