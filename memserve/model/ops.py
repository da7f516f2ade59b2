"""Ops: what a decoder layer does beside attention, as torch has it or as kernels. Know what a norm and a product hold,
and no layer.

Which one runs comes with the attention (`LayerAttention.ops`): a model's weights serve runners with any.

Shape legend: T tokens, E hidden size, F intermediate features, I and O input and output features.
"""

from abc import ABC, abstractmethod
from dataclasses import replace

import torch

from memserve.jit import KernelLaunch, runs_on
from memserve.model.kernels.few_rows import NormOf, few_rows_launch, num_parts, squares_of
from memserve.model.kernels.norm import norm_launch
from memserve.model.kernels.swiglu import swiglu_launch
from memserve.model.layers import Linear, RMSNorm, swiglu

# Hidden states [T, E], and what is still to be added to them (None: nothing): the next norm does it in the same pass.
Stream = tuple[torch.Tensor, torch.Tensor | None]


class Ops(ABC):
    """What a layer computes beside its attention, in the parts that a kernel may take as one."""

    def norm_linear(self, norm: RMSNorm, stream: Stream, linear: Linear) -> tuple[torch.Tensor, torch.Tensor]:
        """(the stream's sum [T, E], `linear` of the `norm` of that, [T, O])."""
        x_TE, normed_TE = self.add_norm(norm, stream)
        return x_TE, linear(normed_TE)

    def norm_swiglu(self, norm: RMSNorm, stream: Stream, gate_up: Linear) -> tuple[torch.Tensor, torch.Tensor]:
        """(the stream's sum [T, E], SwiGLU [T, F] of `gate_up` of the `norm` of that)."""
        x_TE, gate_up_TO = self.norm_linear(norm, stream, gate_up)
        return x_TE, self.swiglu(gate_up_TO)

    def add_linear(self, x_TE: torch.Tensor, y_TI: torch.Tensor, linear: Linear) -> Stream:
        """x and `linear` of y, added or still to be."""
        return x_TE, linear(y_TI)

    @abstractmethod
    def norm(self, norm: RMSNorm, x: torch.Tensor) -> torch.Tensor:
        """`norm` of x, [T, E] or, by heads, [T, W, E]; only the stride of T is free."""

    @abstractmethod
    def add_norm(self, norm: RMSNorm, stream: Stream) -> tuple[torch.Tensor, torch.Tensor]:
        """(the stream's sum, `norm` of that), each [T, E]."""

    @abstractmethod
    def swiglu(self, gate_up_TO: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up of [T, 2 F]: [T, F]."""


class TorchOps(Ops):
    """On any device, in any dtype."""

    def norm(self, norm: RMSNorm, x: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = norm(x)
        return normed

    def add_norm(self, norm: RMSNorm, stream: Stream) -> tuple[torch.Tensor, torch.Tensor]:
        x_TE, delta_TE = stream
        x_TE = x_TE if delta_TE is None else x_TE + delta_TE
        return x_TE, norm(x_TE)

    def swiglu(self, gate_up_TO: torch.Tensor) -> torch.Tensor:
        return swiglu(gate_up_TO)


class TritonOps(Ops):
    """One kernel each, in float32 inside. early: launched while what is before it still runs, see `KernelLaunch`."""

    def __init__(self, early: bool = False) -> None:
        self.early = early

    def run(self, launch: KernelLaunch) -> None:
        (replace(launch, early=True) if self.early else launch).run()

    def norm(self, norm: RMSNorm, x: torch.Tensor) -> torch.Tensor:
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        self.run(norm_launch(in_rows(x), None, None, y, norm.scale, norm.sum_eps))
        return y

    def add_norm(self, norm: RMSNorm, stream: Stream) -> tuple[torch.Tensor, torch.Tensor]:
        x_TE, delta_TE = stream
        if delta_TE is None:
            return x_TE, self.norm(norm, x_TE)
        x_TE = x_TE.contiguous()
        sum_TE, y_TE = torch.empty_like(x_TE), torch.empty_like(x_TE)
        self.run(norm_launch(x_TE, delta_TE.contiguous(), sum_TE, y_TE, norm.scale, norm.sum_eps))
        return sum_TE, y_TE

    def swiglu(self, gate_up_TO: torch.Tensor) -> torch.Tensor:
        num_tokens, num_features = gate_up_TO.shape
        out_TF = torch.empty(num_tokens, num_features // 2, dtype=gate_up_TO.dtype, device=gate_up_TO.device)
        self.run(swiglu_launch(in_rows(gate_up_TO), out_TF))
        return out_TF


class FewRowsOps(TritonOps):
    """A product is one kernel with what comes before and after it: three launches a layer less. For up to
    few_rows.MAX_ROWS rows in bfloat16, of a model on one rank: nobody sums between. Of one step: it knows the last sum.
    """

    def __init__(self, early: bool = False) -> None:
        super().__init__(early)
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None  # a sum [T, E], and its squares [T, P]

    def norm_linear(self, norm: RMSNorm, stream: Stream, linear: Linear) -> tuple[torch.Tensor, torch.Tensor]:
        return self._of_norm(norm, stream, linear, len(linear.weight))

    def norm_swiglu(self, norm: RMSNorm, stream: Stream, gate_up: Linear) -> tuple[torch.Tensor, torch.Tensor]:
        return self._of_norm(norm, stream, gate_up, len(gate_up.weight) // 2)

    def add_linear(self, x_TE: torch.Tensor, y_TI: torch.Tensor, linear: Linear) -> Stream:
        num_rows, num_out = x_TE.shape
        sum_TE = torch.empty_like(x_TE)
        squares_TP = torch.empty(num_rows, num_parts(num_out), dtype=torch.float32, device=x_TE.device)
        self.run(few_rows_launch(y_TI, linear.weight, sum_TE, bias_W=linear.bias, add_TO=x_TE, squares_TP=squares_TP))
        self._last = sum_TE, squares_TP
        return sum_TE, None

    def _of_norm(
        self, norm: RMSNorm, stream: Stream, linear: Linear, num_out: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """num_out: half of the weight's rows where SwiGLU follows."""
        x_TE, delta_TE = stream
        assert delta_TE is None, "every sum before is part of its product"
        y_TO = x_TE.new_empty(len(x_TE), num_out)
        normed = NormOf(norm.scale, norm.sum_eps, self._squares(x_TE))
        self.run(few_rows_launch(x_TE, linear.weight, y_TO, normed, bias_W=linear.bias))
        return x_TE, y_TO

    def _squares(self, x_TE: torch.Tensor) -> torch.Tensor:
        """Those that the product before has left; of embeddings they are taken here."""
        return self._last[1] if self._last is not None and self._last[0] is x_TE else squares_of(x_TE)


def in_rows(x: torch.Tensor) -> torch.Tensor:
    """x, [T, ...], or a copy where what belongs to one token does not lie together; on a GPU it always does."""
    together = x.stride(-1) == 1 and (x.dim() == 2 or x.stride(1) == x.shape[2])
    # contiguous() is content with any stride of a dimension that has one element, or none
    return x if together else x.clone(memory_format=torch.contiguous_format)


def check_runs_kernels(device: torch.device, dtype: torch.dtype) -> None:
    """Raises ValueError, naming the alternative, where the kernels cannot run."""
    if not runs_on(device):
        raise ValueError(
            f"attention='triton' on {device}: expected a CUDA device and the package triton (to try it on a CPU, set "
            "TRITON_INTERPRET=1 before Python starts); or attention='sdpa', which runs anywhere"
        )
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"attention='triton' in {dtype}: expected float16, bfloat16 or float32; or attention='sdpa'")
