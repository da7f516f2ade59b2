"""KernelLaunch: one launch of a Triton kernel, to be run, interpreted on a CPU, or compiled for an absent GPU.

Everything that names Triton goes through here, so that modules with kernels import where Triton is not installed. What
is compiled for inspection is what would run: the signature is read off the launch's own arguments, which may then be
tensors on the device "meta".

Kernels are written under `from __future__ import annotations`, so that `tl.constexpr` is read by Triton alone.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
except ModuleNotFoundError:
    triton = tl = GPUTarget = ASTSource = None

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret) if triton is not None else False  # what Triton decides, too

__all__ = ["INTERPRETED", "KernelLaunch", "KernelResources", "RowConfig", "await_kernel_before", "jit", "runs_on", "tl"]

EARLY_CAPABILITY = 90  # from here on a kernel can be launched before the one ahead of it has ended

_LAUNCHING = threading.Lock()  # of two threads that are first with a kernel, Triton lets one launch what is not loaded
_ALIGNMENT = 16  # Triton tells apart whether a pointer or an integer is a multiple of this
_TYPES = {
    "torch.float16": "fp16", "torch.bfloat16": "bf16", "torch.float32": "fp32",
    "torch.uint8": "u8", "torch.int16": "i16", "torch.int32": "i32", "torch.int64": "i64",
}  # fmt: skip


def jit(*varying: str) -> Callable[[Callable[..., Any]], Any]:
    """A decorator for kernels. varying: numbers, and pointers into larger tensors, that change from step to step: no
    variant is compiled for their values or alignment.

    Where Triton is not installed the function stays as it is and is never called.
    """
    if triton is None:
        return lambda function: function
    decorator: Callable[[Callable[..., Any]], Any] = triton.jit(do_not_specialize=list(varying))
    return decorator


@jit()
def await_kernel_before(EARLY: tl.constexpr) -> None:
    """The first of a kernel that is launched early: what the kernel before it writes may be read from here on, and what
    it reads written. It lets the next one be launched, whose own wait is for all of this one.

    Every program of such a kernel has to wait: the next one's wait ends with this kernel, and is to mean all before.
    """
    if EARLY and not INTERPRETED:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def runs_on(device: torch.device) -> bool:
    """Whether kernels run there: on a GPU, and under Triton's interpreter (TRITON_INTERPRET=1 at start) anywhere."""
    return triton is not None and (device.type == "cuda" or triton.knobs.runtime.interpret)


@dataclass(frozen=True)
class KernelResources:
    """What one compiled kernel takes. registers: of a thread.  spill_bytes: of a thread, in slow memory.  cubin: it.
    layouts: it in Triton's last words of its own, which say how tiles lie.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    cubin: bytes = field(default=b"", repr=False)
    layouts: str = field(default="", repr=False)

    def tiles(self) -> dict[str, str]:
        """Of those of a kernel in shared memory: how each lies there, by its shape and type."""
        names = dict(re.findall(r"^(#shared\d*) = (.*)$", self.layouts, re.MULTILINE))
        return {shape: names[name] for shape, name in re.findall(r"memdesc<([\dx]+x\w+), (#shared\d*)", self.layouts)}

    def instructions(self) -> list[str]:
        """The names of those in its machine code, in its order, such as LDG.E.128."""
        code = _cuobjdump(self.cubin, "-sass")
        names: list[str] = re.findall(r"/\*[0-9a-f]{4,5}\*/ +(?:@!?U?P\w+ )?([A-Z][\w.]*)", code)
        return names


@dataclass(frozen=True)
class RowConfig:
    """block_elements: elements that one program of an element-wise kernel holds at once."""

    block_elements: int
    num_warps: int


@dataclass(frozen=True)
class KernelLaunch:
    """A kernel with its grid and arguments.

    args: tensors and numbers by their names.  constants: the kernel's constexpr parameters.
    fp_fusion: whether a product and a sum may become one operation that rounds once.
    max_registers: of a thread; None: the compiler's choice.
    early: it is launched while the kernel before it still runs, and waits for that itself (programmatic dependent
    launch, compute capability 90 and up); of kernels that have the parameter EARLY.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: Mapping[str, Any]
    constants: Mapping[str, int | bool]
    num_warps: int
    num_stages: int
    fp_fusion: bool
    max_registers: int | None = None
    early: bool = False

    def run(self) -> None:
        """Starts it on the current stream of its tensors' device; an empty grid starts nothing."""
        if 0 in self.grid:
            return
        device = next(x.device for x in self.args.values() if isinstance(x, torch.Tensor))
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext(), _LAUNCHING:
            self.kernel[self.grid](**self.args, **self._constants, **self._options)

    def compile(self, capability: int) -> KernelResources:
        """Compiles it for a compute capability (80 or 90, say), without a GPU; launches nothing."""
        arguments = {name: self.args.get(name, self._constants.get(name)) for name in self.kernel.arg_names}
        types = {name: self._type_of(name) for name in arguments}
        aligned = [name for name, type_ in types.items() if type_ != "constexpr" and self._is_aligned(name)]
        source = ASTSource(
            self.kernel,
            types,
            {name: arguments[name] for name, type_ in types.items() if type_ == "constexpr"},
            {(self.kernel.arg_names.index(name),): [["tt.divisibility", _ALIGNMENT]] for name in aligned},
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=self._options)
        cubin: bytes = compiled.asm["cubin"]
        found = re.search(r"REG:(\d+) STACK:(\d+)", _cuobjdump(cubin, "-res-usage"))
        assert found, "cuobjdump says what a kernel takes"
        return KernelResources(int(found[1]), int(found[2]), compiled.metadata.shared, cubin, compiled.asm["ttgir"])

    def _type_of(self, name: str) -> str:
        """Triton's name for the type of an argument; an integer of one is a constant to it, unless it varies."""
        if name in self._constants:
            return "constexpr"
        value = self.args[name]
        if isinstance(value, torch.Tensor):
            return "*" + _TYPES[str(value.dtype)]
        if isinstance(value, float):
            return "fp32"
        if value == 1 and name not in self._varying:
            return "constexpr"
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    def _is_aligned(self, name: str) -> bool:
        value = self.args[name]
        if isinstance(value, torch.Tensor):
            return name not in self._varying  # as allocators align what is not a part of another tensor
        return isinstance(value, int) and value % _ALIGNMENT == 0 and name not in self._varying

    @property
    def _options(self) -> dict[str, int | bool | None]:
        """In Triton's words; of one of them its interpreter knows nothing."""
        options: dict[str, int | bool | None] = {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": self.fp_fusion,
            "maxnreg": self.max_registers,
        }
        return {**options, "launch_pdl": True} if self.early and not triton.knobs.runtime.interpret else options

    @property
    def _constants(self) -> Mapping[str, int | bool]:
        return {**self.constants, "EARLY": self.early} if "EARLY" in self.kernel.arg_names else self.constants

    @property
    def _varying(self) -> Sequence[str]:
        names: Sequence[str] = self.kernel.do_not_specialize
        return names


def _cuobjdump(cubin: bytes, option: str) -> str:
    """What it reads off the machine code. Raises CalledProcessError."""
    tool: str = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        done = subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr
