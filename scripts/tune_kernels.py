"""Times candidates for the launch configurations of the kernels on this machine's GPU, beside those in use.

    python scripts/tune_kernels.py                                      # all kernels, head dim 128 in bfloat16
    python scripts/tune_kernels.py --kernels paged_decode --head-dims 64 256 --dtypes bfloat16 float32 --out page.md
    TRITON_INTERPRET=1 python scripts/tune_kernels.py --dry             # without a GPU: two candidates, small shapes

What it prints is for memserve/model/kernels/configs.py: no run searches. A candidate is dropped if it spills even with
all registers allowed, takes more shared memory than there is, or writes something else than the configuration in use
does; the others are ordered by the geometric mean, over the kernel's shapes, of their time as a share of the one in
use.
"""

import argparse
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
from gpu_cases import (
    DRY,
    FULL,
    Case,
    Scale,
    decode_case,
    kv_write_case,
    median_s,
    norm_cases,
    prefill_case,
    products,
    row_copy_case,
    swiglu_case,
)
from options import new_file

from memserve.jit import RowConfig, runs_on
from memserve.model.kernels.configs import (
    DecodeConfig,
    ProductConfig,
    TileConfig,
    capability_of,
    paged_decode_config,
    power_of_two,
)

BEST = 5
_ALL_REGISTERS = 255  # of a thread
_ROWS = (1024, 2048, 4096, 8192)
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32)}
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2, torch.uint8: 0.0}


@dataclass(frozen=True)
class Tuned:
    """share: of the time that the configuration in use takes."""

    config: Any
    share: float


def decode_tiles(scale: Scale) -> Iterator[DecodeConfig]:
    """Tiles; and for the one in use, and with four warps of it, how requests are cut and by how many programs taken."""
    for block_n, warps, stages in itertools.product((16, 32, 64, 128), (2, 4, 8), (2, 3, 5, 7)):
        yield DecodeConfig(16, block_n, warps, stages)
    own = paged_decode_config(scale.head_dim, scale.dtype, capability_of(scale.device))
    for split_tokens, programs in itertools.product((128, 256, 512, 1024), (4, 8, 16, 32)):
        for tile in (own, DecodeConfig(16, own.block_n, 4, own.num_stages)):
            yield replace(tile, split_tokens=split_tokens, programs=programs)


def prefill_tiles(scale: Scale) -> Iterator[TileConfig]:
    rows = (16, 32, 64) if scale.dtype == torch.float32 else (64, 128, 256)
    for block_m, block_n, warps, stages in itertools.product(rows, (16, 32, 64, 128), (4, 8), (2, 3, 5)):
        yield TileConfig(block_m, block_n, warps, stages)


def rows(scale: Scale) -> Iterator[RowConfig]:
    for block_elements, warps in itertools.product(_ROWS, (2, 4, 8, 16)):
        yield RowConfig(block_elements, warps)


def norm_rows(scale: Scale) -> Iterator[RowConfig]:
    """A program holds a row whole, so only the narrow ones may share it."""
    for block_elements, warps in itertools.product(_ROWS, (4, 8, 16)):
        if block_elements >= power_of_two(scale.hidden_size) or block_elements == _ROWS[0]:
            yield RowConfig(block_elements, warps)


def product_tiles(scale: Scale) -> Iterator[ProductConfig]:
    for block_w, block_i, warps, stages in itertools.product((16, 32, 64), (128, 256, 512), (2, 4, 8), (3, 4, 6)):
        yield ProductConfig(block_w, block_i, warps, stages)


def product_cases(scale: Scale, gated: bool) -> Iterator[Case[Any]]:
    """Gate and up have a configuration of their own."""
    for num_rows in scale.few_rows:
        yield from (p.case for p in products(scale, num_rows) if ("SwiGLU" in p.case.what) == gated)


@dataclass(frozen=True)
class Kernel:
    """by_head: whether its configuration is one for each head dim and element size."""

    cases: Callable[[Scale], Iterator[Case[Any]]]
    candidates: Callable[[Scale], Iterator[Any]]
    by_head: bool


KERNELS = {
    "paged_decode": Kernel(lambda s: (decode_case(s, *shape) for shape in s.decodes), decode_tiles, by_head=True),
    "paged_prefill": Kernel(lambda s: (prefill_case(s, *shape) for shape in s.prefills), prefill_tiles, by_head=True),
    "kv_write": Kernel(lambda s: iter([kv_write_case(s)]), rows, by_head=False),
    "swiglu": Kernel(lambda s: iter([swiglu_case(s)]), rows, by_head=False),
    "few_rows": Kernel(lambda s: product_cases(s, gated=False), product_tiles, by_head=False),
    "few_rows_gated": Kernel(lambda s: product_cases(s, gated=True), product_tiles, by_head=False),
    "norm": Kernel(norm_cases, norm_rows, by_head=False),
    "row_copy": Kernel(lambda s: iter([row_copy_case(s)]), rows, by_head=False),
}


def tuned(kernel: Kernel, scale: Scale, shared_bytes: int) -> tuple[Any, list[Tuned]]:
    """The configuration in use, and all that can take its place with it, the fastest first."""
    shares: dict[Any, float] = {}
    own, num_cases = None, 0
    for case in kernel.cases(scale):
        own, num_cases = case.config, num_cases + 1
        candidates = list(shares) or list(dict.fromkeys(kernel.candidates(scale)))
        chosen = _compiling(candidates, case, scale, shared_bytes, bounding=num_cases == 1)
        times = {config: median_s(scale, case.run(config)) for config in chosen if _agrees(case, config)}
        shares = {c: shares.get(c, 1.0) * seconds / times[own] for c, seconds in times.items()}
    best = [Tuned(config, share ** (1 / num_cases)) for config, share in shares.items()]
    return own, sorted(best, key=lambda t: t.share)


def _compiling(
    candidates: Sequence[Any], case: Case[Any], scale: Scale, shared_bytes: int, bounding: bool
) -> list[Any]:
    """The candidates that fit the GPU, compiled beside one another; under the interpreter the first one. bounding: one
    that spills by the compiler's own choice counts with a bound on its registers.
    """
    candidates = [c for c in candidates if c != case.config]
    if scale.device.type == "cpu":
        return [case.config, *candidates[:1]]
    capability = capability_of(scale.device)

    def fits(config: Any) -> bool:
        try:
            launches = case.launches(config)
            resources = [launch.compile(capability) for launch in launches]
        except Exception as error:  # the compiler's own failures have no common type
            print(f"  {astuple(config)}: {type(error).__name__}, dropped", file=sys.stderr)
            return False
        return all(r.spill_bytes == 0 and r.shared_bytes <= shared_bytes for r in resources)

    def fitting(config: Any) -> Any | None:
        takes_bound = bounding and not isinstance(config, RowConfig)
        bounded = [replace(config, max_registers=_ALL_REGISTERS)] if takes_bound else []
        return next((c for c in (config, *bounded) if fits(c)), None)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        kept = list(pool.map(fitting, candidates))
    return [case.config, *(c for c in kept if c is not None and c != case.config)]


def _agrees(case: Case[Any], config: Any) -> bool:
    """Whether it writes what the configuration in use does, over an output that holds something else."""
    outputs = []
    for each in (case.config, config):
        if case.output.is_floating_point():  # a block copy's holds its source too
            case.output.fill_(torch.nan)
        case.run(each)()
        outputs.append(case.output.to(torch.float32, copy=True))
    bound = _TOLERANCE[case.output.dtype]
    if torch.allclose(*outputs, atol=bound * float(outputs[0].std()), rtol=bound):
        return True
    print(f"  {case.what}: {astuple(config)} computes something else, dropped", file=sys.stderr)
    return False


def lines(name: str, scale: Scale, own: Any, best: Sequence[Tuned]) -> Iterator[str]:
    """Of a table: the fastest, and the one in use."""
    what = f"{name}, {scale.head_dim}, {scale.dtype}" if KERNELS[name].by_head else name
    shown = list(best[:BEST]) + [t for t in best[BEST:] if t.config == own]
    for t in shown:
        mark = "in use" if t.config == own else ""
        yield f"| {what.replace('torch.', '')} | {astuple(t.config)} | {t.share:.3f} | {mark} |"


def scales(name: str, base: Scale, head_dims: Sequence[int], dtypes: Sequence[str]) -> Iterator[Scale]:
    if not KERNELS[name].by_head:
        yield base
        return
    for head_dim, dtype in itertools.product(head_dims, dtypes):
        yield base.of(head_dim, _DTYPES[dtype])


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", choices=list(KERNELS), default=list(KERNELS))
    parser.add_argument("--head-dims", nargs="+", type=int, default=[128], help="of the attention kernels: at most 256")
    parser.add_argument("--dtypes", nargs="+", choices=list(_DTYPES), default=["bfloat16"], help="of the same")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU, under TRITON_INTERPRET=1")
    parser.add_argument("--out", type=new_file, help="append the table to this page")
    args = parser.parse_args(argv)
    base = DRY if args.dry else FULL
    if args.dry and not runs_on(base.device):
        parser.error("--dry: expected TRITON_INTERPRET=1")
    if not args.dry and not torch.cuda.is_available():
        sys.exit("error: no GPU here; scripts/compile_kernels.py compiles the kernels without one")
    if wrong := [d for d in args.head_dims if not 1 <= d <= 256]:
        parser.error(f"--head-dims={wrong[0]}: expected 1 to 256")
    device = "a dry run" if args.dry else torch.cuda.get_device_name()
    shared_bytes = 0 if args.dry else torch.cuda.get_device_properties(0).shared_memory_per_block_optin
    table = [
        f"{device}, torch {torch.__version__}",
        "",
        "| kernel | configuration | share of time | |",
        "|---|---|---|---|",
    ]
    print("\n".join(table), flush=True)
    for name in args.kernels:
        for scale in scales(name, base, args.head_dims, args.dtypes):
            for line in lines(name, scale, *tuned(KERNELS[name], scale, shared_bytes)):
                print(line, flush=True)
                table.append(line)
    if args.out is not None:
        with args.out.open("a", encoding="utf-8") as page:
            page.write("\n".join(table) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
