"""RMSNorm as one kernel, with or without the residual sum before it. Knows no layer.

Shape legend: T tokens, W heads normed apart (1 for hidden states), E features; rows are (token, head), W of each token.
"""

from __future__ import annotations

import torch

from memserve.jit import KernelLaunch, RowConfig, await_kernel_before, jit, tl
from memserve.model.kernels.configs import norm_config, power_of_two


@jit("num_rows")
def _norm_kernel(
    x_ptr: tl.tensor, delta_ptr: tl.tensor, sum_ptr: tl.tensor, y_ptr: tl.tensor, scale_ptr: tl.tensor,
    x_stride_T: tl.tensor, num_rows: tl.tensor, sum_eps: tl.tensor, W: tl.constexpr, E: tl.constexpr, ADD: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_E: tl.constexpr, EARLY: tl.constexpr,
) -> None:  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_E)[None, :]
    mask = (rows < num_rows)[:, None] & (columns < E)
    offsets = rows.to(tl.int64)[:, None] * E + columns
    x_offsets = (rows // W).to(tl.int64)[:, None] * x_stride_T + (rows % W)[:, None] * E + columns
    await_kernel_before(EARLY)
    x = tl.load(x_ptr + x_offsets, mask=mask, other=0.0)
    # asked for before the sum is waited for: in a decode step it comes from memory, as x does, and all of it at once
    scale = tl.load(scale_ptr + (rows % W)[:, None] * E + columns, mask=mask, other=0.0)
    if ADD:
        delta = tl.load(delta_ptr + offsets, mask=mask, other=0.0)
        x = (x.to(tl.float32) + delta.to(tl.float32)).to(x.dtype)
        tl.store(sum_ptr + offsets, x, mask=mask)
    wide = x.to(tl.float32)
    squares = tl.sum(wide * wide, axis=1)[:, None]
    y = wide / tl.sqrt(squares + sum_eps) * scale
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


def norm_launch(
    x: torch.Tensor,
    delta_TE: torch.Tensor | None,
    sum_TE: torch.Tensor | None,
    y: torch.Tensor,
    scale: torch.Tensor,
    sum_eps: float,
    config: RowConfig | None = None,
) -> KernelLaunch:
    """y = x / sqrt(sum(x^2) + sum_eps) * scale in float32; with delta_TE, of x + delta_TE, which goes to sum_TE.

    x, y: [T, E], or [T, W, E] with scale [W, E]; only the stride of T is free, and only in x.  scale: float32.
    sum_eps: E times the eps of the usual formula; `scale` has the sqrt(E) that goes with it (see layers.RMSNorm).
    config: by default that of `norm_config`.
    """
    num_features = x.shape[-1]
    num_heads = x.shape[1] if x.dim() == 3 else 1
    assert x.stride()[1:] == y.stride()[1:] and y.is_contiguous() and scale.shape[-1] == num_features
    config = config or norm_config(num_features)
    block = power_of_two(num_features)
    rows = max(1, config.block_elements // block)
    num_rows = x.numel() // num_features
    adds = delta_TE is not None and sum_TE is not None
    args = {
        "x_ptr": x, "delta_ptr": x if delta_TE is None else delta_TE, "sum_ptr": y if sum_TE is None else sum_TE,
        "y_ptr": y, "scale_ptr": scale, "x_stride_T": x.stride(0), "num_rows": num_rows, "sum_eps": sum_eps,
    }  # fmt: skip
    constants = {"W": num_heads, "E": num_features, "ADD": adds, "ROWS": rows, "BLOCK_E": block}
    grid = (-(-num_rows // rows),)
    return KernelLaunch(_norm_kernel, grid, args, constants, config.num_warps, 1, fp_fusion=False)


def norm_reference(x: torch.Tensor, scale: torch.Tensor, sum_eps: float) -> torch.Tensor:
    """The same in the dtype of x."""
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) + sum_eps) * scale
