"""A product of few rows with a weight, and what a decoder has around it: the norm before, SwiGLU or the sum after.

At few rows a product is bound by reading its weight, and a launch of its own for a norm or a sum takes as long as a
part of that. A program reads all features of some rows of the weight once, in order. The norm's divisor is known when
the last feature has been read: it divides the sums, so that x is read once too.

bfloat16 alone: x * scale, not yet divided, may lie outside of what float16 holds.

Shape legend: T tokens, I input features, O output features; W weight rows, [W, I]: O, or gate and then up, 2 O.
"""

from __future__ import annotations

import torch

from memserve.jit import KernelLaunch, jit, tl
from memserve.model.kernels.configs import ProductConfig, few_rows_config, power_of_two
from memserve.model.kernels.norm import norm_reference
from memserve.model.kernels.paged_tile import factor, load_rows
from memserve.model.kernels.swiglu import swiglu_reference

MAX_ROWS = 16  # the height of a tensor core's tile: as many rows as one takes


@jit("num_rows")
def _few_rows_kernel(
    x_ptr: tl.tensor, scale_ptr: tl.tensor, weight_ptr: tl.tensor, bias_ptr: tl.tensor, add_ptr: tl.tensor,
    y_ptr: tl.tensor, num_rows: tl.tensor, sum_eps: tl.tensor, IN: tl.constexpr, OUT: tl.constexpr, NORM: tl.constexpr,
    GLU: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.arange(0, BLOCK_T)
    column = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    in_rows, in_columns = row < num_rows, column < OUT
    ends: tl.constexpr = IN % BLOCK_I != 0
    cut: tl.constexpr = ends or OUT % BLOCK_O != 0
    x_ptrs = x_ptr + row[:, None] * IN
    weight_ptrs = weight_ptr + column.to(tl.int64)[:, None] * IN
    sums = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
    ups = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
    squares = tl.zeros((BLOCK_T, BLOCK_I), tl.float32)
    for first in tl.range(0, IN, BLOCK_I):
        i = first + tl.arange(0, BLOCK_I)
        inside = (i < IN)[None, :]
        x = tl.load(x_ptrs + i[None, :], mask=in_rows[:, None] & inside, other=0.0)
        mask = in_columns[:, None] & inside
        if NORM:
            wide = x.to(tl.float32)
            squares += wide * wide
            x = (wide * load_rows(scale_ptr + i[None, :], inside, ends)).to(x.dtype)
        w = load_rows(weight_ptrs + i[None, :], mask, cut)
        sums = tl.dot(factor(x), tl.trans(factor(w)), sums)
        if GLU:
            w = load_rows(weight_ptrs + OUT * IN + i[None, :], mask, cut)
            ups = tl.dot(factor(x), tl.trans(factor(w)), ups)
    if NORM:
        root = tl.sqrt(tl.sum(squares, axis=1) + sum_eps)[:, None]
        sums = sums / root
        ups = ups / root
    if BIAS:
        sums += tl.load(bias_ptr + column, mask=in_columns, other=0.0).to(tl.float32)[None, :]
        if GLU:
            ups += tl.load(bias_ptr + OUT + column, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    if GLU:
        sums = sums / (1.0 + tl.exp(-sums)) * ups
    offsets = row[:, None] * OUT + column[None, :]
    mask = in_rows[:, None] & in_columns[None, :]
    if ADD:
        sums += tl.load(add_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offsets, sums.to(y_ptr.dtype.element_ty), mask=mask)


def few_rows_launch(
    x_TI: torch.Tensor,
    weight_WI: torch.Tensor,
    y_TO: torch.Tensor,
    norm: tuple[torch.Tensor, float] | None = None,
    bias_W: torch.Tensor | None = None,
    add_TO: torch.Tensor | None = None,
    config: ProductConfig | None = None,
) -> KernelLaunch:
    """y = x W^T + bias + add, summed in float32; where W is 2 O instead, y = silu(gate) * up of its two halves.

    All contiguous bfloat16, T <= MAX_ROWS.  norm: (scale_I, sum_eps), as of `norm_launch`: x is normed first.
    config: by default that of `few_rows_config`.
    """
    num_rows, num_in = x_TI.shape
    num_out, gated = y_TO.shape[1], len(weight_WI) == 2 * y_TO.shape[1]
    assert num_rows <= MAX_ROWS and (gated or len(weight_WI) == num_out)
    assert all(t.is_contiguous() and t.dtype == torch.bfloat16 for t in (x_TI, weight_WI, y_TO))
    config = config or few_rows_config(gated)
    scale_I, sum_eps = norm or (x_TI, 0.0)
    args = {
        "x_ptr": x_TI, "scale_ptr": scale_I, "weight_ptr": weight_WI, "bias_ptr": y_TO if bias_W is None else bias_W,
        "add_ptr": y_TO if add_TO is None else add_TO, "y_ptr": y_TO, "num_rows": num_rows, "sum_eps": sum_eps,
    }  # fmt: skip
    constants = {
        "IN": num_in, "OUT": num_out, "NORM": norm is not None, "GLU": gated, "BIAS": bias_W is not None,
        "ADD": add_TO is not None, "BLOCK_T": MAX_ROWS, "BLOCK_O": config.block_o,
        "BLOCK_I": min(config.block_i, max(16, power_of_two(num_in))),
    }  # fmt: skip
    grid = (-(-num_out // config.block_o),)
    options = (config.num_warps, config.num_stages, True, config.max_registers)
    return KernelLaunch(_few_rows_kernel, grid, args, constants, *options)


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
