"""The decoder's building blocks: RMSNorm, Linear, SwiGLU. Know neither the model's shape nor where weights come from.

Shape legend: T tokens, I input features, O output features, G groups of rows of a weight.
"""

import math

import torch
from torch.nn import functional

# Up to MAX_GROUPED_ROWS rows a float32 product on a CPU is bound by reading the weight, and `Linear` works in groups
# of about GROUP_SIZE of its rows, MIN_GROUPS at least. Up to MAX_COLUMNS, x goes in as columns of the product.
MAX_GROUPED_ROWS = 128
MAX_COLUMNS = 4
MIN_GROUPS = 4
GROUP_SIZE = 768


class RMSNorm(torch.nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32 at least.

    Written with the vector norm: |x| / sqrt(n) is the root mean square and hypot adds eps under the root, so that all
    of it is four small operators instead of seven. `scale` is weight * sqrt(n), `sum_eps` n * eps.
    """

    scale: torch.Tensor
    root_eps: torch.Tensor

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        super().__init__()
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        num_features = weight.shape[-1]
        self.sum_eps = num_features * eps
        self.register_buffer("scale", wide * math.sqrt(num_features))
        self.register_buffer("root_eps", wide.new_tensor(math.sqrt(self.sum_eps)))

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
        groups = _num_groups(weight.shape[0])
        self._grouped_GOI = weight.view(groups, -1, weight.shape[1])
        self._can_group = groups > 1 and weight.device.type == "cpu" and weight.dtype == torch.float32

    def forward(self, x_TI: torch.Tensor) -> torch.Tensor:
        """[T, I] -> [T, O]."""
        if not self._can_group or torch.compiler.is_compiling() or len(x_TI) > MAX_GROUPED_ROWS:
            return functional.linear(x_TI, self.weight, self.bias)
        x_GTI = x_TI.expand(len(self._grouped_GOI), *x_TI.shape)
        if len(x_TI) <= MAX_COLUMNS:
            y_TGO = torch.bmm(self._grouped_GOI, x_GTI.transpose(1, 2)).permute(2, 0, 1)
        else:
            y_TGO = torch.bmm(x_GTI, self._grouped_GOI.transpose(1, 2)).transpose(0, 1)
        # A chunk that samples nothing has no rows, so the width is named.
        y_TO = y_TGO.reshape(len(x_TI), self.weight.shape[0])
        return y_TO if self.bias is None else y_TO.add_(self.bias)


def _num_groups(num_rows: int) -> int:
    """How many equal groups: near as many as GROUP_SIZE asks for, MIN_GROUPS at least; 1 where none is near."""
    wanted = max(MIN_GROUPS, -(-num_rows // GROUP_SIZE))
    near = (n for n in range(max(MIN_GROUPS, wanted // 4), 4 * wanted + 1) if num_rows % n == 0)
    return min(near, key=lambda n: abs(n - wanted), default=1)


def swiglu(gate_up_TO: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, where gate_up is [T, 2 F]: F gate features, then F up features. Returns [T, F]."""
    gate_TF, up_TF = gate_up_TO.chunk(2, dim=-1)
    return functional.silu(gate_TF).mul_(up_TF)
