"""Attention of one new token a request over a paged cache: KV in splits, then a pass that combines them.

Flash-decoding: the KV of a request is cut into splits that different programs take, so that few requests fill a GPU.
How it is cut is a function of the request's length alone, so its answer does not depend on who else is in the batch.
Where requests are many, programs are fewer than the splits of the longest, and take several in turn: one that finds
none takes time too, and a CUDA graph has one grid for all lengths. The query heads of one kv head go together. A
request of length 0 is a padding row: its output is 0.

Shape legend: R requests, H query heads, K kv heads, G = H / K, D head dim, S splits, M blocks of the widest table;
kv[2, N, B, K, D] is one layer of a cache.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from memserve.jit import KernelLaunch, await_kernel_before, jit, tl
from memserve.model.kernels.configs import DecodeConfig, multiprocessors_of, power_of_two
from memserve.model.kernels.paged_tile import attend_tile

MAX_SPLITS = 32
_COMBINE_WARPS, _COMBINE_REGISTERS = 8, 64  # so that partial results are asked for at once, not in turns


@jit()
def _split_tokens(num_kv: tl.tensor, MAX_SPLITS: tl.constexpr, SPLIT_TOKENS: tl.constexpr) -> tl.tensor:
    """Tokens of each split of a request but the last; `num_splits` says the same on the host."""
    return tl.maximum(tl.cdiv(tl.cdiv(num_kv, MAX_SPLITS), SPLIT_TOKENS), 1) * SPLIT_TOKENS


@jit("table_stride_R", "num_splits", "requests_ptr", "rows_ptr")
def _paged_decode_kernel(
    q_ptr: tl.tensor, sums_ptr: tl.tensor, log_ptr: tl.tensor, kv_ptr: tl.tensor, tables_ptr: tl.tensor,
    lens_ptr: tl.tensor, requests_ptr: tl.tensor, rows_ptr: tl.tensor, table_stride_R: tl.tensor, num_splits: tl.tensor,
    scale: tl.tensor, kv_stride_2: tl.tensor, kv_stride_N: tl.tensor, kv_stride_B: tl.tensor, kv_stride_K: tl.tensor,
    K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, MAX_SPLITS: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:  # fmt: skip
    await_kernel_before(EARLY)
    kv_head, i = tl.program_id(0), tl.program_id(2)
    request, row = tl.load(requests_ptr + i), tl.load(rows_ptr + i)
    g, d = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    mask = (g < G)[:, None] & (d < D)[None, :]
    # asked for before the length has arrived: a program is short, and waits for one after the other are a part of it
    q = tl.load(q_ptr + (row * (K * G) + kv_head * G + g)[:, None] * D + d[None, :], mask=mask, other=0.0)
    num_kv = tl.load(lens_ptr + request).to(tl.int32)
    tokens = _split_tokens(num_kv, MAX_SPLITS, SPLIT_TOKENS)
    # invariants stay in the loop: hoisted, they take registers from the loop within
    for split in tl.range(tl.program_id(1), tl.cdiv(num_kv, tokens), tl.num_programs(1), disable_licm=True):
        begin = split * tokens
        end = tl.minimum(begin + tokens, num_kv)
        last_seen = tl.zeros((BLOCK_G,), tl.int32) + num_kv
        table_ptr = tables_ptr + request * table_stride_R
        keys_ptr = kv_ptr + kv_head.to(tl.int64) * kv_stride_K
        sums = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
        total = tl.zeros((BLOCK_G,), tl.float32)
        peak = tl.full((BLOCK_G,), float("-inf"), tl.float32)
        whole_end = begin + (end - begin) // BLOCK_N * BLOCK_N
        for first in range(begin, whole_end, BLOCK_N):
            sums, total, peak = attend_tile(
                q, sums, total, peak, first, end, last_seen, scale, table_ptr, keys_ptr, keys_ptr + kv_stride_2,
                kv_stride_N, kv_stride_B, False, D, BLOCK_SIZE, BLOCK_N, BLOCK_D,
            )  # fmt: skip
        for first in range(whole_end, end, BLOCK_N):  # once at most; as a loop it takes the same few registers
            sums, total, peak = attend_tile(
                q, sums, total, peak, first, end, last_seen, scale, table_ptr, keys_ptr, keys_ptr + kv_stride_2,
                kv_stride_N, kv_stride_B, True, D, BLOCK_SIZE, BLOCK_N, BLOCK_D,
            )  # fmt: skip
        part = (i.to(tl.int64) * (K * G) + kv_head * G + g) * num_splits + split
        tl.store(sums_ptr + part[:, None] * D + d[None, :], sums / total[:, None], mask=mask)
        tl.store(log_ptr + part, peak * scale + tl.log2(total), mask=g < G)


@jit("num_splits", "requests_ptr", "rows_ptr")
def _combine_kernel(
    sums_ptr: tl.tensor, log_ptr: tl.tensor, out_ptr: tl.tensor, lens_ptr: tl.tensor, requests_ptr: tl.tensor,
    rows_ptr: tl.tensor, num_splits: tl.tensor, H: tl.constexpr, D: tl.constexpr, MAX_SPLITS: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr, BLOCK_D: tl.constexpr, EARLY: tl.constexpr,
) -> None:  # fmt: skip
    await_kernel_before(EARLY)
    head, i = tl.program_id(0), tl.program_id(1)
    request, row = tl.load(requests_ptr + i), tl.load(rows_ptr + i)
    num_kv = tl.load(lens_ptr + request).to(tl.int32)
    used = tl.cdiv(num_kv, _split_tokens(num_kv, MAX_SPLITS, SPLIT_TOKENS))
    s, d = tl.arange(0, MAX_SPLITS), tl.arange(0, BLOCK_D)
    part = (i.to(tl.int64) * H + head) * num_splits + s
    mask = (s < used)[:, None] & (d < D)[None, :]
    logs = tl.load(log_ptr + part, mask=s < used, other=float("-inf"))
    sums = tl.load(sums_ptr + part[:, None] * D + d[None, :], mask=mask, other=0.0)
    peak = tl.where(used > 0, tl.max(logs, axis=0), 0.0)
    weights = tl.exp2(logs - peak)
    total = tl.where(used > 0, tl.sum(weights, axis=0), 1.0)
    out = tl.sum(sums * weights[:, None], axis=0) / total
    tl.store(out_ptr + (row * H + head) * D + d, out.to(out_ptr.dtype.element_ty), mask=d < D)


def num_splits(num_kv: np.ndarray, config: DecodeConfig) -> np.ndarray:
    """int64: into how many splits each length (int64, >= 0) is cut, at most MAX_SPLITS."""
    share = -(-num_kv // MAX_SPLITS)
    tokens = np.maximum(-(-share // config.split_tokens), 1) * config.split_tokens
    splits: np.ndarray = -(-num_kv // tokens)
    return splits


def num_programs(max_splits: int, num_pairs: int, wanted_programs: int) -> int:
    """How many programs share the splits of each of num_pairs rows and kv heads."""
    wanted = wanted_programs // max(1, num_pairs)
    return max(1, min(max_splits, wanted))


def paged_decode_launches(
    q_THD: torch.Tensor,
    kv_2NBKD: torch.Tensor,
    out_THD: torch.Tensor,
    block_tables_RM: torch.Tensor,
    seq_lens_R: torch.Tensor,
    requests_R: torch.Tensor,
    rows_R: torch.Tensor,
    max_splits: int,
    config: DecodeConfig,
) -> tuple[KernelLaunch, KernelLaunch]:
    """Attention of the one new token of each of `requests_R`, and the pass that combines its splits; run both in order.

    q_THD, out_THD: [T, H, D], contiguous; only the rows `rows_R` (int64, of each of the requests) are read and written.
    kv_2NBKD: any strides but that of D, past 2^31 elements too.  block_tables_RM (rows of any stride), seq_lens_R:
    int64, of the whole batch.  requests_R: int64, numbers in the batch.
    max_splits: those of the longest request at least, see `num_splits`.
    config: see `paged_decode_config`.
    """
    block_size, num_kv_heads, head_dim = kv_2NBKD.shape[2:]
    assert q_THD.is_contiguous() and out_THD.is_contiguous() and kv_2NBKD.stride(4) == 1
    assert block_tables_RM.stride(1) == 1 or block_tables_RM.shape[1] <= 1, "a request's blocks lie together"
    assert all(numbers.is_contiguous() for numbers in (seq_lens_R, requests_R, rows_R))
    num_rows, num_heads = len(requests_R), q_THD.shape[1]
    sums = torch.empty(num_rows, num_heads, max_splits, head_dim, dtype=torch.float32, device=q_THD.device)
    logs = torch.empty(num_rows, num_heads, max_splits, dtype=torch.float32, device=q_THD.device)
    shared = {
        "sums_ptr": sums, "log_ptr": logs, "lens_ptr": seq_lens_R, "requests_ptr": requests_R, "rows_ptr": rows_R,
        "num_splits": max_splits,
    }  # fmt: skip
    args = {
        **shared, "q_ptr": q_THD, "kv_ptr": kv_2NBKD, "tables_ptr": block_tables_RM,
        "table_stride_R": block_tables_RM.stride(0), "scale": math.log2(math.e) / math.sqrt(head_dim),
        **dict(zip(("kv_stride_2", "kv_stride_N", "kv_stride_B", "kv_stride_K"), kv_2NBKD.stride()[:4], strict=True)),
    }  # fmt: skip
    group = num_heads // num_kv_heads
    limits = {"D": head_dim, "MAX_SPLITS": MAX_SPLITS, "SPLIT_TOKENS": config.split_tokens}
    limits["BLOCK_D"] = max(16, power_of_two(head_dim))
    constants = {**limits, "K": num_kv_heads, "G": group, "BLOCK_SIZE": block_size}
    constants |= {"BLOCK_G": max(16, power_of_two(group)), "BLOCK_N": config.block_n}
    wanted = config.programs * multiprocessors_of(q_THD.device)
    programs = num_programs(max_splits, num_rows * num_kv_heads, wanted)
    grid = (num_kv_heads, programs, num_rows)
    options = (config.num_warps, config.num_stages, True, config.max_registers)
    attend = KernelLaunch(_paged_decode_kernel, grid, args, constants, *options)
    combined, of_head = {**shared, "out_ptr": out_THD}, {**limits, "H": num_heads}
    options = (_COMBINE_WARPS, 1, True, _COMBINE_REGISTERS)
    return attend, KernelLaunch(_combine_kernel, (num_heads, num_rows), combined, of_head, *options)
