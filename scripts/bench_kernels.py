"""How fast the Triton kernels and a decode step are on this machine's GPU, each beside its limit measured in the run.

    python scripts/bench_kernels.py                          # kernels, then Llama-3-8B's shape with random weights
    python scripts/bench_kernels.py --parts kernels --out page.md
    python scripts/bench_kernels.py --parts steps --no-hf    # leave out Hugging Face transformers
    python scripts/bench_kernels.py --parts profile          # where the time of a decode step goes
    TRITON_INTERPRET=1 python scripts/bench_kernels.py --dry # without a GPU: every line runs, no figure means anything

Element-wise kernels and copies are bound by memory: GB/s as a share of what a copy of 2 GiB reaches. Decode attention
and products of few rows read, and write next to nothing: a share of what that copy or a sum reaches, whichever is more.
Prefill is bound by products: TFLOP/s as a share of torch's flash attention on equal shapes. A decode step's limit is
roofline.py's, from the rate of reading. Times are medians of CUDA events, after a warm-up.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
from gpu_cases import DRY, FULL, Case, Scale, decode_case, elementwise_cases, median_s, prefill_case, products
from gpu_decode import LLAMA3_8B, TINY, DecodeSteps
from options import new_file
from roofline import Machine, decode_work
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from memserve.jit import runs_on
from memserve.model.kernels.few_rows import MAX_ROWS

PARTS = ("kernels", "steps", "profile")
PROFILED = 12  # kernels of a step that are listed


@dataclass(frozen=True)
class Measured:
    """One line: a rate, the limit it is held against, and what their ratio should be."""

    what: str
    rate: float
    limit: float
    unit: str
    wanted: str

    @property
    def line(self) -> str:
        ratio = self.rate / self.limit
        return f"| {self.what} | {self.rate:.4g} | {self.limit:.4g} | {self.unit} | {ratio:.2f} | {self.wanted} |"


def bandwidth(scale: Scale) -> float:
    """Bytes per second, read and written, of a plain copy."""
    source, target = torch.empty(2, scale.copied_bytes, dtype=torch.uint8, device=scale.device)
    return 2 * source.nbytes / median_s(scale, lambda: target.copy_(source))


def reading(scale: Scale) -> float:
    """Bytes per second that a sum of torch's reads: what only reads may pass what a copy reaches."""
    source = torch.ones(scale.copied_bytes // 4, dtype=torch.float32, device=scale.device)
    return source.nbytes / median_s(scale, source.sum)


def _flash_s(scale: Scale, num_cached: int, num_new: int, batch: int) -> float:
    """Seconds of torch's flash attention of the same tokens to the same ones.

    Its keys and values are contiguous, with a head for each of the queries'.
    """
    num_kv = num_cached + num_new
    q, k, v = (scale.random(batch, scale.num_heads, n, scale.head_dim) for n in (num_new, num_kv, num_kv))
    mask = causal_lower_right(num_new, num_kv)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return median_s(scale, lambda: scaled_dot_product_attention(q, k, v, attn_mask=mask))


def kernels(scale: Scale, hbm: float, read: float) -> Iterator[Measured]:
    """hbm, read: bytes per second of what reads and writes, and of what reads."""
    yield Measured("the best of reading, beside a copy", read / 1e9, hbm / 1e9, "GB/s", "")
    for row_case in elementwise_cases(scale):
        yield _beside_bandwidth(scale, row_case, hbm, ">= .85")
    for batch, num_kv in scale.decodes:
        wanted = ">= .85" if batch >= 16 and num_kv >= 4096 else ""
        yield _beside_bandwidth(scale, decode_case(scale, batch, num_kv), read, wanted)
    for product in itertools.chain.from_iterable(products(scale, n) for n in scale.few_rows):
        yield _beside_bandwidth(scale, product.case, read, "")
        seconds = median_s(scale, product.apart)
        yield Measured(f"{product.case.what}: apart", product.case.work / seconds / 1e9, read / 1e9, "GB/s", "")
    for shape in scale.prefills:
        case = prefill_case(scale, *shape)
        flops, flash = (case.work / s for s in (median_s(scale, case.run()), _flash_s(scale, *shape)))
        yield Measured(case.what, flops / 1e12, flash / 1e12, "TFLOP/s", ">= .7")


def _beside_bandwidth(scale: Scale, case: Case[Any], limit: float, wanted: str) -> Measured:
    return Measured(case.what, case.work / median_s(scale, case.run()) / 1e9, limit / 1e9, "GB/s", wanted)


def steps(scale: Scale, decoding: DecodeSteps, read: float, with_hf: bool) -> Iterator[Measured]:
    """Whole decode steps, sampled tokens read: milliseconds beside the roofline's, so below is better."""
    machine = Machine(gemm_flops=float("inf"), read_bytes=read)
    for batch, context in scale.steps:
        limit_s = machine.seconds(decode_work(decoding.config, np.full(batch, context), scale.dtype.itemsize))
        what = f"decode step, batch {batch}, {context} tokens each"
        for fused, early in itertools.product((False, True) if batch <= MAX_ROWS else (False,), (False, True)):
            how = ", fused products" * fused + ", launched early" * early
            seconds = decoding.ours_s(batch, context, fused, early)
            yield Measured(what + how, seconds * 1e3, limit_s * 1e3, "ms", "<= 1.25")
        if with_hf:
            seconds = decoding.hugging_face_s(batch, context)
            yield Measured(f"{what}, transformers", seconds * 1e3, limit_s * 1e3, "ms", "")


def profile(scale: Scale, decoding: DecodeSteps) -> Iterator[str]:
    """Where a decode step's time goes, kernel by kernel: what it is not in is the GPU's waiting."""
    for (batch, context), fused in itertools.product(scale.steps, (False, True)):
        if fused and batch > MAX_ROWS:
            continue
        times = decoding.profile(batch, context, fused)
        total_us = sum(t.us for t in times)
        products = ", fused products" if fused else ""
        yield ""
        what = f"batch {batch}, {context} tokens each{products}"
        yield f"Kernels of a decode step, {what}: {total_us / 1e3:.3f} ms in all"
        yield ""
        yield "| kernel | launches | us | share |"
        yield "|---|---|---|---|"
        for t in times[:PROFILED]:
            yield f"| {t.name[:70].replace('|', ' ')} | {t.count:.0f} | {t.us:.1f} | {t.us / total_us:.3f} |"


def measure(scale: Scale, parts: Sequence[str], with_hf: bool) -> Iterator[str]:
    """The lines of the parts' tables, as they come."""
    decoding = DecodeSteps(TINY if scale is DRY else LLAMA3_8B, scale.device, scale.num_tries)
    if "kernels" in parts or "steps" in parts:
        hbm = bandwidth(scale)
        read = max(hbm, reading(scale))
        yield from ("| what | rate or time | limit | unit | ratio | wanted |", "|---|---|---|---|---|---|")
    if "kernels" in parts:
        yield from (m.line for m in kernels(scale, hbm, read))
    if "steps" in parts:
        yield from (m.line for m in steps(scale, decoding, read, with_hf))
    if "profile" in parts:
        yield from profile(scale, decoding)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}; joined by commas")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU, under TRITON_INTERPRET=1")
    parser.add_argument("--no-hf", action="store_true", help="leave out Hugging Face")
    parser.add_argument("--out", type=new_file, help="append the table to this page")
    args = parser.parse_args(argv)
    scale, parts = DRY if args.dry else FULL, args.parts.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"--parts={unknown[0]}: expected of {', '.join(PARTS)}")
    if args.dry and not runs_on(scale.device):
        parser.error("--dry: expected TRITON_INTERPRET=1")
    if not args.dry and not torch.cuda.is_available():
        sys.exit("error: no GPU here; scripts/compile_kernels.py compiles the kernels without one")
    name = "a dry run" if args.dry else torch.cuda.get_device_name()
    head = (f"{name}, torch {torch.__version__}, triton {triton.__version__}, bfloat16", "")
    lines = []
    for line in itertools.chain(head, measure(scale, parts, not args.no_hf)):
        print(line, flush=True)
        lines.append(line)
    if args.out is not None:
        with args.out.open("a", encoding="utf-8") as page:
            page.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
