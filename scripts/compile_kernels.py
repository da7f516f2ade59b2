"""Compiles every Triton kernel's default configuration for GPUs that need not be there, and says what each takes.

    python scripts/compile_kernels.py                                  # all of them: make compile-all
    python scripts/compile_kernels.py --capabilities 90 --kernels paged_decode --markdown table.md
    python scripts/compile_kernels.py --capabilities 86 120 --groups 1 3 8 --block-sizes 1 48

Every line is one kernel, head dim and dtype with the configuration that the runner would use: registers of a thread,
bytes of a thread that went to slow memory (spills), shared memory of a program and what the GPU has. Fails if one
spills or does not fit, and says so where the runner would refuse.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from options import integer, new_file

from memserve.jit import KernelLaunch, KernelResources
from memserve.model.kernels.configs import paged_decode_config, paged_prefill_config
from memserve.model.kernels.few_rows import MAX_ROWS, NormOf, few_rows_launch, num_parts
from memserve.model.kernels.kv_write import kv_write_launch
from memserve.model.kernels.norm import norm_launch
from memserve.model.kernels.paged_decode import MAX_SPLITS, paged_decode_launches
from memserve.model.kernels.paged_prefill import PrefillTiles, paged_prefill_launch, tokens_a_tile
from memserve.model.kernels.swiglu import swiglu_launch
from memserve.transfer.row_kernel import row_copy_launch

SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
DEFAULT_CAPABILITIES = (80, 90)
BY_HEAD = ("paged_prefill", "paged_decode", "kv_write")
KERNELS = (*BY_HEAD, "norm", "swiglu", "few_rows", "row_copy")
HEAD_DIMS = (64, 80, 96, 128, 256)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
OF_ONE_DTYPE = {"row_copy": torch.uint8, "few_rows": torch.bfloat16}
NUM_TOKENS, NUM_KV_HEADS = 48, 8
HIDDEN_SIZES, ROW_BYTES = (576, 4096, 8192), (1024, 40)


@dataclass(frozen=True)
class CacheShape:
    """num_groups: query heads of each kv head.  block_size: in tokens."""

    num_groups: int = 4
    block_size: int = 16

    def __str__(self) -> str:
        return "" if self == CacheShape() else f", {self.num_groups} heads a kv head, blocks of {self.block_size}"


@dataclass(frozen=True)
class Case:
    """One kernel to compile. what: its size, such as `head_dim 128`."""

    kernel: str
    what: str
    dtype: torch.dtype
    capability: int
    launch: KernelLaunch


@dataclass(frozen=True)
class Compiled:
    """A case and what came of it."""

    case: Case
    resources: KernelResources

    @property
    def fits(self) -> bool:
        limit_bytes = SHARED_KIB[self.case.capability] * 1024
        return self.resources.spill_bytes == 0 and self.resources.shared_bytes <= limit_bytes


def cases(
    kernel: str, capability: int, sizes: Sequence[int] | None = None, shape: CacheShape = CacheShape()
) -> Iterator[Case]:
    """Every size and dtype of one kernel; sizes: head dims, features or bytes, all that are listed above by default."""
    by_head = kernel in BY_HEAD
    known = HEAD_DIMS if by_head else ROW_BYTES if kernel == "row_copy" else HIDDEN_SIZES
    unit = "head dim" if by_head else "row bytes" if kernel == "row_copy" else "features"
    for size in sizes or known:
        for dtype in (OF_ONE_DTYPE[kernel],) if kernel in OF_ONE_DTYPE else DTYPES:
            for launch in _launches(kernel, size, dtype, capability, shape):
                what = f"{unit} {size}{shape}{_around(launch)}"
                yield Case(launch.kernel.__name__.strip("_"), what, dtype, capability, launch)


def _around(launch: KernelLaunch) -> str:
    """What else it does."""
    named = {"NORM": "after a norm", "GLU": "SwiGLU", "ADD": "with residual"}
    rows = f", {launch.constants['BLOCK_T']} rows" if "BLOCK_T" in launch.constants else ""
    return "".join(f", {words}" for name, words in named.items() if launch.constants.get(name)) + rows


def compile_case(case: Case) -> Compiled:
    return Compiled(case, case.launch.compile(case.capability))


def _launches(kernel: str, size: int, dtype: torch.dtype, capability: int, shape: CacheShape) -> list[KernelLaunch]:
    if kernel == "norm":
        return _norms(size, dtype)
    if kernel == "swiglu":
        return [swiglu_launch(_empty(dtype, NUM_TOKENS, 2 * size), _empty(dtype, NUM_TOKENS, size))]
    if kernel == "few_rows":
        return _products(size)
    if kernel == "row_copy":
        memory, rows = _empty(torch.uint8, 64 * size), _empty(torch.int64, 8)
        return [row_copy_launch(memory, rows, memory, rows, size)]
    return _on_cache(kernel, size, dtype, capability, shape)


def _norms(size: int, dtype: torch.dtype) -> list[KernelLaunch]:
    x_TE, scale_E = _empty(dtype, NUM_TOKENS, size), _empty(torch.float32, size)
    return [norm_launch(x_TE, None, None, x_TE, scale_E, 0.1), norm_launch(x_TE, x_TE, x_TE, x_TE, scale_E, 0.1)]


def _products(size: int) -> list[KernelLaunch]:
    """From as many features to as many, of one tile's rows and of two."""
    weight_WI, bias_W = _empty(torch.bfloat16, size, size), _empty(torch.bfloat16, size)
    two_WI, scale_I = _empty(torch.bfloat16, 2 * size, size), _empty(torch.float32, size)
    launches = []
    for num_rows in (MAX_ROWS // 2, MAX_ROWS):
        x_TI = _empty(torch.bfloat16, num_rows, size)
        squares_TP = _empty(torch.float32, num_rows, num_parts(size))
        norm = NormOf(scale_I, 0.1, squares_TP)
        launches += [
            few_rows_launch(x_TI, weight_WI, x_TI, norm, bias_W),
            few_rows_launch(x_TI, two_WI, x_TI, norm),
            few_rows_launch(x_TI, weight_WI, x_TI, add_TO=x_TI, squares_TP=squares_TP),
        ]
    return launches


def _on_cache(kernel: str, head_dim: int, dtype: torch.dtype, capability: int, shape: CacheShape) -> list[KernelLaunch]:
    num_heads = NUM_KV_HEADS * shape.num_groups
    kv = _empty(dtype, 2, 512, shape.block_size, NUM_KV_HEADS, head_dim)
    q_THD = _empty(dtype, NUM_TOKENS, num_heads, head_dim)
    index = _empty(torch.int64, NUM_TOKENS)
    tables_RM = _empty(torch.int64, NUM_TOKENS, 8)
    if kernel == "kv_write":
        qkv_THD = _empty(dtype, NUM_TOKENS, num_heads + 2 * NUM_KV_HEADS, head_dim)
        cos = _empty(dtype, NUM_TOKENS, 1, 2, head_dim // 2)
        num_rotated = num_heads + NUM_KV_HEADS
        return [kv_write_launch(qkv_THD[:, :num_rotated], qkv_THD[:, num_rotated:], cos, cos, q_THD, kv, index)]
    if kernel == "paged_decode":
        config = paged_decode_config(head_dim, dtype, capability)
        return list(paged_decode_launches(q_THD, kv, q_THD, tables_RM, index, index, index, MAX_SPLITS, config))
    config = paged_prefill_config(head_dim, dtype, capability)
    one = np.ones(1, dtype=np.int64)
    tokens = tokens_a_tile(shape.num_groups, config)
    tiles = PrefillTiles.of(one * NUM_TOKENS, one * NUM_TOKENS, one * 0, tokens, torch.device("cpu"))
    return [paged_prefill_launch(q_THD, kv, q_THD, tables_RM, index, index, tiles, config)]


def _empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def as_markdown(done: Sequence[Compiled]) -> str:
    """A table; kernels that differ in nothing but the dtype are one line."""
    lines = ["| kernel | size | dtype | GPU | warps | stages | registers | spilled | shared KiB of |", "|---" * 9 + "|"]
    dtypes: dict[tuple[str, ...], list[str]] = {}
    for c in done:
        dtypes.setdefault(_cells(c), []).append(str(c.case.dtype).removeprefix("torch."))
    for (kernel, what, *rest), names in dtypes.items():
        lines.append(f"| {' | '.join((kernel, what, ', '.join(dict.fromkeys(names)), *rest))} |")
    return "\n".join(lines) + "\n"


def _cells(c: Compiled) -> tuple[str, ...]:
    """Of its line, all but the dtype."""
    launch, got, capability = c.case.launch, c.resources, c.case.capability
    shared = f"{got.shared_bytes / 1024:.1f} of {SHARED_KIB[capability]}"
    numbers = (launch.num_warps, launch.num_stages, got.registers, got.spill_bytes)
    return c.case.kernel, c.case.what, f"sm_{capability}", *map(str, numbers), shared


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--capabilities", nargs="+", type=int, choices=SHARED_KIB, default=DEFAULT_CAPABILITIES)
    some = partial(integer, least=1)
    parser.add_argument("--groups", nargs="+", type=some, default=[4], help="query heads of each kv head")
    parser.add_argument("--block-sizes", nargs="+", type=some, default=[16], help="in tokens")
    parser.add_argument("--markdown", type=new_file, help="write the table there as well")
    args = parser.parse_args(argv)
    done: list[Compiled] = []
    shapes = [CacheShape(*each) for each in itertools.product(args.groups, args.block_sizes)]
    for kernel, capability in itertools.product(args.kernels, args.capabilities):
        for shape in shapes if kernel in BY_HEAD else shapes[:1]:
            try:
                of_kernel = list(cases(kernel, capability, shape=shape))
            except ValueError as error:
                sys.exit(f"error: {kernel} on sm_{capability}: {error}")
            for case in of_kernel:
                done.append(compile_case(case))
                print(as_markdown(done[-1:]).splitlines()[-1], "" if done[-1].fits else "<-- does not fit", flush=True)
    if args.markdown is not None:
        args.markdown.write_text(as_markdown(done), encoding="utf-8")
    misfits = [c for c in done if not c.fits]
    if misfits:
        sys.exit(f"error: {len(misfits)} of {len(done)} kernels spill or take more shared memory than there is")
    print(f"{len(done)} kernels: none spills, all fit")


if __name__ == "__main__":
    main(sys.argv[1:])
