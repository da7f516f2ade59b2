"""Causal attention of new tokens over a paged cache that already holds them and whatever came before. Knows no layer.

A program takes a tile of one request's new tokens with all G query heads of one kv head, so that each key and value is
read once for all of them. Tiles of all requests are one grid, ragged or not; PrefillTiles lists them.

Shape legend: T tokens, H query heads, K kv heads, G = H / K, D head dim, R requests, M blocks of the widest table, P
tiles; kv[2, N, B, K, D] is one layer of a cache.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from memserve.jit import KernelLaunch, jit, tl
from memserve.model.kernels.configs import TileConfig, power_of_two
from memserve.model.kernels.paged_tile import attend_tile
from memserve.transfer.block_copy import to_device


@jit("table_stride_R", "tile_requests_ptr", "tile_tokens_ptr")
def _paged_prefill_kernel(
    q_ptr: tl.tensor, out_ptr: tl.tensor, kv_ptr: tl.tensor, tables_ptr: tl.tensor, starts_ptr: tl.tensor,
    lens_ptr: tl.tensor, tile_requests_ptr: tl.tensor, tile_tokens_ptr: tl.tensor, table_stride_R: tl.tensor,
    scale: tl.tensor, kv_stride_2: tl.tensor, kv_stride_N: tl.tensor, kv_stride_B: tl.tensor, kv_stride_K: tl.tensor,
    K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
) -> None:  # fmt: skip
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    request, first = tl.load(tile_requests_ptr + tile), tl.load(tile_tokens_ptr + tile).to(tl.int32)
    start = tl.load(starts_ptr + request)
    num_new = (tl.load(starts_ptr + request + 1) - start).to(tl.int32)
    num_kv = tl.load(lens_ptr + request).to(tl.int32)
    TOKENS: tl.constexpr = BLOCK_M // G
    m, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    token, head = first + m // G, kv_head * G + m % G
    mask = ((m < TOKENS * G) & (token < num_new))[:, None] & (d < D)[None, :]
    offsets = ((start + token) * (K * G) + head)[:, None] * D + d[None, :]
    q = tl.load(q_ptr + offsets, mask=mask, other=0.0)
    position = num_kv - num_new + token
    end = num_kv - num_new + tl.minimum(first + TOKENS, num_new)  # past what the last row sees
    seen_by_all = (num_kv - num_new + first + 1) // BLOCK_N * BLOCK_N
    table_ptr = tables_ptr + request * table_stride_R
    keys_ptr = kv_ptr + kv_head.to(tl.int64) * kv_stride_K
    sums = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    for first_n in range(0, seen_by_all, BLOCK_N):
        sums, total, peak = attend_tile(
            q, sums, total, peak, first_n, end, position, scale, table_ptr, keys_ptr, keys_ptr + kv_stride_2,
            kv_stride_N, kv_stride_B, False, D, BLOCK_SIZE, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    for first_n in range(seen_by_all, end, BLOCK_N):
        sums, total, peak = attend_tile(
            q, sums, total, peak, first_n, end, position, scale, table_ptr, keys_ptr, keys_ptr + kv_stride_2,
            kv_stride_N, kv_stride_B, True, D, BLOCK_SIZE, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    tl.store(out_ptr + offsets, (sums / total[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class PrefillTiles:
    """The grid of a step: int32 [P], the request of each tile and the first of its new tokens, longest work first."""

    requests_P: torch.Tensor
    tokens_P: torch.Tensor

    @staticmethod
    def of(
        num_new: np.ndarray, num_kv: np.ndarray, requests: np.ndarray, tokens_a_tile: int, device: torch.device
    ) -> PrefillTiles:
        """Of the `requests` (numbers in the batch, int64) of a batch. num_new, num_kv: int64, of every request."""
        num_tiles = -(-num_new[requests] // tokens_a_tile)
        tile_requests = np.repeat(requests, num_tiles)
        tile_numbers = np.arange(num_tiles.sum()) - np.repeat(np.cumsum(num_tiles) - num_tiles, num_tiles)
        tokens = tile_numbers * tokens_a_tile
        order = np.argsort(-(num_kv - num_new)[tile_requests] - tokens, kind="stable")
        columns = np.stack((tile_requests[order], tokens[order])).astype(np.int32)
        requests_P, tokens_P = to_device(columns, device)
        return PrefillTiles(requests_P, tokens_P)


def tokens_a_tile(num_groups: int, config: TileConfig) -> int:
    """New tokens that one tile takes with all heads of a group. Raises ValueError for groups larger than a tile."""
    if num_groups > config.block_m:
        raise ValueError(f"attention='triton': {num_groups} query heads a kv head: expected at most {config.block_m}")
    return config.block_m // num_groups


def paged_prefill_launch(
    q_THD: torch.Tensor,
    kv_2NBKD: torch.Tensor,
    out_THD: torch.Tensor,
    block_tables_RM: torch.Tensor,
    query_starts_R1: torch.Tensor,
    seq_lens_R: torch.Tensor,
    tiles: PrefillTiles,
    config: TileConfig,
) -> KernelLaunch:
    """Attention of the tokens in `tiles`, whose KV is written; other rows of out_THD are left as they are.

    q_THD, out_THD: [T, H, D], contiguous.  kv_2NBKD: any strides but that of D, past 2^31 elements too.
    block_tables_RM (rows of any stride), query_starts_R1, seq_lens_R: int64, of the whole batch, as in ForwardBatch.
    config: see `paged_prefill_config`; the tiles are made for it.
    """
    block_size, num_kv_heads, head_dim = kv_2NBKD.shape[2:]
    assert q_THD.is_contiguous() and out_THD.is_contiguous() and kv_2NBKD.stride(4) == 1
    assert block_tables_RM.stride(1) == 1 or block_tables_RM.shape[1] <= 1, "a request's blocks lie together"
    assert all(numbers.is_contiguous() for numbers in (query_starts_R1, seq_lens_R))
    args = {
        "q_ptr": q_THD, "out_ptr": out_THD, "kv_ptr": kv_2NBKD, "tables_ptr": block_tables_RM,
        "starts_ptr": query_starts_R1, "lens_ptr": seq_lens_R, "tile_requests_ptr": tiles.requests_P,
        "tile_tokens_ptr": tiles.tokens_P, "table_stride_R": block_tables_RM.stride(0),
        "scale": math.log2(math.e) / math.sqrt(head_dim),
        **dict(zip(("kv_stride_2", "kv_stride_N", "kv_stride_B", "kv_stride_K"), kv_2NBKD.stride()[:4], strict=True)),
    }  # fmt: skip
    constants = {"K": num_kv_heads, "G": q_THD.shape[1] // num_kv_heads, "D": head_dim, "BLOCK_SIZE": block_size}
    constants |= {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_D": max(16, power_of_two(head_dim))}
    grid = (len(tiles.requests_P), num_kv_heads)
    options = (config.num_warps, config.num_stages, True, config.max_registers)
    return KernelLaunch(_paged_prefill_kernel, grid, args, constants, *options)


def attention_reference(
    q_THD: torch.Tensor,
    kv_2NBKD: torch.Tensor,
    block_tables_RM: torch.Tensor,
    query_starts_R1: torch.Tensor,
    seq_lens_R: torch.Tensor,
) -> torch.Tensor:
    """What prefill and decode compute, request after request, in the dtype of q_THD. Returns [T, H, D]."""
    outputs = []
    for request, (start, stop) in enumerate(
        zip(query_starts_R1[:-1].tolist(), query_starts_R1[1:].tolist(), strict=True)
    ):
        num_kv, num_new = int(seq_lens_R[request]), stop - start
        blocks = block_tables_RM[request, : -(-num_kv // kv_2NBKD.shape[2])]
        k_SKD, v_SKD = kv_2NBKD[:, blocks].flatten(1, 2)[:, :num_kv]
        q_nKGD = torch.unflatten(q_THD[start:stop], 1, (k_SKD.shape[1], -1))
        scores_KGnS = torch.einsum("nkgd,skd->kgns", q_nKGD, k_SKD) / math.sqrt(q_THD.shape[-1])
        future_nS = torch.ones(num_new, num_kv, dtype=torch.bool, device=q_THD.device).triu(num_kv - num_new + 1)
        weights_KGnS = scores_KGnS.masked_fill(future_nS, -math.inf).softmax(-1)
        outputs.append(torch.einsum("kgns,skd->nkgd", weights_KGnS, v_SKD).flatten(1, 2))
    return torch.cat(outputs)
