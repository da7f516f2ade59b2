"""SwiGLU's product as one kernel. Knows no layer.

Shape legend: T tokens, F features; gate_up is [T, 2 F], F gate features and then F up features.
"""

from __future__ import annotations

import torch

from memserve.jit import KernelLaunch, RowConfig, await_kernel_before, jit, tl
from memserve.model.kernels.configs import ELEMENTWISE, power_of_two


@jit()
def _swiglu_kernel(
    gate_up_ptr: tl.tensor, out_ptr: tl.tensor, gate_up_stride_T: tl.tensor, F: tl.constexpr, BLOCK_F: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:  # fmt: skip
    NUM_PARTS: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F  # those of a row in turn: memory is read fastest in order
    token, part = (tl.program_id(0) // NUM_PARTS).to(tl.int64), tl.program_id(0) % NUM_PARTS
    columns = part * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = columns < F
    await_kernel_before(EARLY)
    gate = tl.load(gate_up_ptr + token * gate_up_stride_T + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + token * gate_up_stride_T + F + columns, mask=mask, other=0.0).to(tl.float32)
    product = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + token * F + columns, product.to(out_ptr.dtype.element_ty), mask=mask)


def swiglu_launch(gate_up_TO: torch.Tensor, out_TF: torch.Tensor, config: RowConfig = ELEMENTWISE) -> KernelLaunch:
    """out = silu(gate) * up, in float32. gate_up_TO: [T, 2 F], rows contiguous.  out_TF: [T, F], contiguous."""
    num_tokens, num_features = out_TF.shape
    assert gate_up_TO.stride(1) == 1 and gate_up_TO.shape[1] == 2 * num_features and out_TF.is_contiguous()
    block = min(config.block_elements, power_of_two(num_features))
    args = {"gate_up_ptr": gate_up_TO, "out_ptr": out_TF, "gate_up_stride_T": gate_up_TO.stride(0)}
    constants = {"F": num_features, "BLOCK_F": block}
    grid = (num_tokens * -(-num_features // block),)
    return KernelLaunch(_swiglu_kernel, grid, args, constants, config.num_warps, 1, fp_fusion=False)


def swiglu_reference(gate_up_TO: torch.Tensor) -> torch.Tensor:
    """The same in the dtype of gate_up_TO."""
    gate_TF, up_TF = gate_up_TO.chunk(2, dim=-1)
    return gate_TF / (1 + torch.exp(-gate_TF)) * up_TF
