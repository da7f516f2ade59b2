"""A product of few rows with a weight, and what a decoder has around it: the norm before, SwiGLU or the sum after.

At few rows a product is bound by reading its weight, and a launch of its own for a norm or a sum takes as long as a
part of that. A program reads all features of some rows of the weight once, in order. A norm divides the sums at the
end, by the squares of x, which whoever wrote x has left in parts: x is scaled here and looked at for nothing else.

Each warp multiplies its own features by all rows of x and of the weight, and the warps' sums are added at the end:
split by rows of the weight instead, every warp would scale all of x for itself.

bfloat16 alone: x * scale, not yet divided, may lie outside of what float16 holds.

Shape legend: T tokens, I input features, O output features, P parts of their squares; W weight rows, [W, I]: O, or gate
and then up, 2 O.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from memserve.jit import INTERPRETED, KernelLaunch, await_kernel_before, jit, tl
from memserve.model.kernels.configs import ProductConfig, few_rows_config, power_of_two
from memserve.model.kernels.norm import norm_reference
from memserve.model.kernels.paged_tile import factor, load_rows
from memserve.model.kernels.swiglu import swiglu_reference

MAX_ROWS = 16  # of two tiles of a tensor core
_TILE_ROWS, _TILE_FEATURES = 8, 16  # of one
_SECTOR = 16  # elements: 32 bytes, what a cache takes in at once


@jit()
def _bring_into_l2(pointers: tl.tensor, mask: tl.tensor) -> None:
    """Asks for what lies there, and waits for nothing."""
    text: tl.constexpr = "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.u32 $0, 0; }"
    tl.inline_asm_elementwise(text, "=r,l,r", [pointers, mask.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1)


@jit("num_rows")
def _few_rows_kernel(
    x_ptr: tl.tensor, scale_ptr: tl.tensor, squares_ptr: tl.tensor, weight_ptr: tl.tensor, bias_ptr: tl.tensor,
    add_ptr: tl.tensor, y_ptr: tl.tensor, y_squares_ptr: tl.tensor, num_rows: tl.tensor, sum_eps: tl.tensor,
    IN: tl.constexpr, OUT: tl.constexpr, NORM: tl.constexpr, NUM_SQUARES: tl.constexpr, GLU: tl.constexpr,
    BIAS: tl.constexpr, ADD: tl.constexpr, SQUARES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_P: tl.constexpr, WARPS: tl.constexpr, AHEAD: tl.constexpr, SECTOR: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:  # fmt: skip
    PARTS: tl.constexpr = 2 if GLU else 1  # rows of the weight for an output: of gate and up, one after the other
    BLOCK_O: tl.constexpr = BLOCK_W // PARTS
    OF_WARP: tl.constexpr = BLOCK_I // WARPS
    row, w = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_W)
    column = tl.program_id(0) * BLOCK_O + w // PARTS
    weight_row = column + w % PARTS * OUT
    in_rows, in_columns = row < num_rows, column < OUT
    ends: tl.constexpr = IN % BLOCK_I != 0
    cut: tl.constexpr = ends or OUT % BLOCK_O != 0
    if EARLY and not INTERPRETED:  # the first weights, which no kernel writes
        ahead = tl.arange(0, AHEAD)[None, :] * SECTOR
        sectors = weight_ptr + weight_row.to(tl.int64)[:, None] * IN + ahead
        _bring_into_l2(sectors, in_columns[:, None] & (ahead < IN))
    await_kernel_before(EARLY)
    if NORM:  # asked for now, waited for at the end
        part = tl.arange(0, BLOCK_P)[None, :]
        mask = in_rows[:, None] & (part < NUM_SQUARES)
        squares = tl.load(squares_ptr + row[:, None] * NUM_SQUARES + part, mask=mask, other=0.0)
    x_ptrs = x_ptr + row[None, :, None] * IN
    weight_ptrs = weight_ptr + weight_row.to(tl.int64)[None, :, None] * IN
    of_warps = (tl.arange(0, WARPS)[:, None] * OF_WARP + tl.arange(0, OF_WARP)[None, :])[:, None, :]
    sums = tl.zeros((WARPS, BLOCK_W, BLOCK_T), tl.float32)
    for first in tl.range(0, IN, BLOCK_I):
        i = first + of_warps
        x = tl.load(x_ptrs + i, mask=in_rows[None, :, None] & (i < IN), other=0.0)
        if NORM:
            x = (x.to(tl.float32) * load_rows(scale_ptr + i, i < IN, ends)).to(x.dtype)
        weight = load_rows(weight_ptrs + i, in_columns[None, :, None] & (i < IN), cut)
        sums = tl.dot(factor(weight), tl.permute(factor(x), (0, 2, 1)), sums)
    y = tl.sum(sums, axis=0)
    if NORM:
        y = y / tl.sqrt(tl.sum(squares, axis=1) + sum_eps)[None, :]
    if BIAS:
        y += tl.load(bias_ptr + weight_row, mask=in_columns, other=0.0).to(tl.float32)[:, None]
    if GLU:
        gate, up = tl.split(tl.permute(tl.reshape(y, (BLOCK_O, PARTS, BLOCK_T)), (0, 2, 1)))
        y = gate / (1.0 + tl.exp(-gate)) * up
    column = (tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O))[:, None]
    offsets = row[None, :] * OUT + column
    mask = in_rows[None, :] & (column < OUT)
    if ADD:
        y += tl.load(add_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    rounded = y.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + offsets, rounded, mask=mask)
    if SQUARES:
        wide = rounded.to(tl.float32)
        to = y_squares_ptr + row * tl.num_programs(0) + tl.program_id(0)
        tl.store(to, tl.sum(wide * wide, axis=0), mask=in_rows)


@dataclass(frozen=True)
class NormOf:
    """A norm of x [T, I]: float32 scale [I] and sum_eps as of `norm_launch`; squares [T, P] float32, whose sums over P
    are those of x, contiguous.
    """

    scale_I: torch.Tensor
    sum_eps: float
    squares_TP: torch.Tensor


def few_rows_launch(
    x_TI: torch.Tensor,
    weight_WI: torch.Tensor,
    y_TO: torch.Tensor,
    norm: NormOf | None = None,
    bias_W: torch.Tensor | None = None,
    add_TO: torch.Tensor | None = None,
    squares_TP: torch.Tensor | None = None,
    config: ProductConfig | None = None,
) -> KernelLaunch:
    """y = x W^T + bias + add, summed in float32; where W is 2 O instead, y = silu(gate) * up of its two halves.

    All contiguous bfloat16, T <= MAX_ROWS.  norm: x is normed first.  squares_TP: float32, takes the squares of y in
    `num_parts` parts.  config: by default that of `few_rows_config`.
    """
    num_rows, num_in = x_TI.shape
    num_out, gated = y_TO.shape[1], len(weight_WI) == 2 * y_TO.shape[1]
    assert num_rows <= MAX_ROWS and (gated or len(weight_WI) == num_out)
    assert all(t.is_contiguous() and t.dtype == torch.bfloat16 for t in (x_TI, weight_WI, y_TO))
    config = config or few_rows_config(gated)
    scale_I, sum_eps, parts_TP = (norm.scale_I, norm.sum_eps, norm.squares_TP) if norm else (x_TI, 0.0, x_TI)
    assert parts_TP.is_contiguous() and (squares_TP is None or squares_TP.is_contiguous())
    args = {
        "x_ptr": x_TI, "scale_ptr": scale_I, "squares_ptr": parts_TP, "weight_ptr": weight_WI,
        "bias_ptr": y_TO if bias_W is None else bias_W, "add_ptr": y_TO if add_TO is None else add_TO, "y_ptr": y_TO,
        "y_squares_ptr": y_TO if squares_TP is None else squares_TP, "num_rows": num_rows, "sum_eps": sum_eps,
    }  # fmt: skip
    num_squares = 0 if norm is None else parts_TP.shape[1]
    constants = {
        "IN": num_in, "OUT": num_out, "NORM": norm is not None, "NUM_SQUARES": num_squares, "GLU": gated,
        "BIAS": bias_W is not None, "ADD": add_TO is not None, "SQUARES": squares_TP is not None,
        "BLOCK_T": _TILE_ROWS if num_rows <= _TILE_ROWS else MAX_ROWS, "BLOCK_W": config.block_w,
        "BLOCK_I": max(_TILE_FEATURES * config.num_warps, min(config.block_i, power_of_two(num_in))),
        "BLOCK_P": power_of_two(max(1, num_squares)), "WARPS": config.num_warps,
        "AHEAD": power_of_two(config.block_i * (config.num_stages - 1)) // _SECTOR, "SECTOR": _SECTOR,
    }  # fmt: skip
    grid = (num_parts(num_out, gated, config),)
    options = (config.num_warps, config.num_stages, True, config.max_registers)
    return KernelLaunch(_few_rows_kernel, grid, args, constants, *options)


def num_parts(num_out: int, gated: bool = False, config: ProductConfig | None = None) -> int:
    """Programs of a product of so many outputs, each of which leaves a part of their squares."""
    config = config or few_rows_config(gated)
    return -(-num_out // (config.block_w // 2 if gated else config.block_w))


def squares_of(x_TI: torch.Tensor) -> torch.Tensor:
    """float32 [T, 1]: the squares of what no product here wrote."""
    return x_TI.float().square().sum(1, keepdim=True)


def few_rows_reference(
    x_TI: torch.Tensor,
    weight_WI: torch.Tensor,
    num_out: int,
    norm: tuple[torch.Tensor, float] | None = None,
    bias_W: torch.Tensor | None = None,
    add_TO: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same in the dtype of its arguments: [T, O]."""
    x_TI = x_TI if norm is None else norm_reference(x_TI, *norm)
    y_TW = x_TI @ weight_WI.T
    y_TW = y_TW if bias_W is None else y_TW + bias_W
    y_TO = y_TW if len(weight_WI) == num_out else swiglu_reference(y_TW)
    return y_TO if add_TO is None else y_TO + add_TO
