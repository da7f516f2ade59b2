"""The decoder's building blocks: RMSNorm, Linear, SwiGLU. Know neither the model's shape nor where weights come from.

Shape legend: T tokens, I input features, O output features, G groups of rows of a weight.
"""

import math

import torch
from torch.nn import functional

# Up to this many rows a float32 product on a CPU is bound by reading the weight, and `Linear` works in groups.
MAX_GROUPED_ROWS = 48
NUM_GROUPS = 4


class RMSNorm(torch.nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32 at least.

    Written with the vector norm: |x| / sqrt(n) is the root mean square and hypot adds eps under the root, so that all
    of it is four small operators instead of seven. `scale` is weight * sqrt(n).
    """

    scale: torch.Tensor
    root_eps: torch.Tensor

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        super().__init__()
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        num_features = weight.shape[-1]
        self.register_buffer("scale", wide * math.sqrt(num_features))
        self.register_buffer("root_eps", wide.new_tensor(math.sqrt(num_features * eps)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(self.scale.dtype)
        norm: torch.Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).hypot_(self.root_eps)
        return (wide / norm).mul_(self.scale).to(x.dtype)


class Linear(torch.nn.Module):
    """y = x W^T + b for W [O, I], and the one place that knows how a product with few rows is best done on a CPU."""

    weight: torch.nn.Parameter
    bias: torch.Tensor | None

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.register_buffer("bias", bias)
        groups = NUM_GROUPS if weight.shape[0] % NUM_GROUPS == 0 else 1
        self._grouped_GIO = weight.view(groups, -1, weight.shape[1]).transpose(1, 2)
        self._can_group = groups > 1 and weight.device.type == "cpu" and weight.dtype == torch.float32

    def forward(self, x_TI: torch.Tensor) -> torch.Tensor:
        """[T, I] -> [T, O]."""
        if not self._can_group or torch.compiler.is_compiling() or len(x_TI) > MAX_GROUPED_ROWS:
            return functional.linear(x_TI, self.weight, self.bias)
        # A chunk that samples nothing has no rows, so the width is named.
        y_GTO = torch.bmm(x_TI.expand(len(self._grouped_GIO), *x_TI.shape), self._grouped_GIO)
        y_TO = y_GTO.transpose(0, 1).reshape(len(x_TI), self.weight.shape[0])
        return y_TO if self.bias is None else y_TO.add_(self.bias)


def swiglu(gate_up_TO: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, where gate_up is [T, 2 F]: F gate features, then F up features. Returns [T, F]."""
    gate_TF, up_TF = gate_up_TO.chunk(2, dim=-1)
    return functional.silu(gate_TF).mul_(up_TF)
