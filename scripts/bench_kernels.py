"""How fast the Triton kernels and a decode step are on this machine's GPU, each beside its limit measured in the run.

    python scripts/bench_kernels.py                          # kernels, then Llama-3-8B's shape with random weights
    python scripts/bench_kernels.py --parts kernels --out page.md
    python scripts/bench_kernels.py --parts steps --no-hf    # leave out Hugging Face transformers
    TRITON_INTERPRET=1 python scripts/bench_kernels.py --dry # without a GPU: every line runs, no figure means anything

Element-wise kernels, copies and decode attention are bound by memory: GB/s as a share of what a copy of 2 GiB reaches.
Prefill is bound by products: TFLOP/s as a share of torch's flash attention on equal shapes. A decode step's limit is
roofline.py's, from the same bandwidth. Times are medians of CUDA events, after a warm-up.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
from gpu_decode import LLAMA3_8B, TINY, DecodeSteps
from options import new_file
from roofline import Machine, decode_work
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from memserve.clock import monotonic_ns, to_s
from memserve.jit import runs_on
from memserve.model.kernels.configs import capability_of
from memserve.model.kernels.kv_write import kv_write_launch
from memserve.model.kernels.norm import norm_launch
from memserve.model.kernels.paged_decode import MAX_SPLITS, paged_decode_launches
from memserve.model.kernels.paged_prefill import PrefillTiles, paged_prefill_launch, tokens_a_tile
from memserve.model.kernels.swiglu import swiglu_launch
from memserve.transfer.row_kernel import row_copy_launch

DTYPE, HEAD_DIM, BLOCK_SIZE = torch.bfloat16, 128, 16
PARTS = ("kernels", "steps")


@dataclass(frozen=True)
class Scale:
    """What is measured, and on which device.  rows: of the block copy, 64 KiB each; half to the other half.

    decodes: (batch, tokens of KV).  prefills: (cached, new, batch).  steps: (batch, context).
    """

    device: torch.device
    num_tries: int
    num_heads: int
    num_kv_heads: int
    copied_bytes: int
    num_tokens: int
    hidden_size: int
    intermediate_size: int
    num_rows: int
    decodes: tuple[tuple[int, int], ...]
    prefills: tuple[tuple[int, int, int], ...]
    steps: tuple[tuple[int, int], ...]

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=DTYPE, device=self.device)


FULL = Scale(
    torch.device("cuda"), 20, 32, 8, 2 << 30, 16384, 4096, 14336, 4096,
    decodes=((1, 2048), (16, 4096), (64, 2048), (64, 4096)),
    prefills=((0, 2048, 8), (0, 8192, 2), (6144, 2048, 2)),
    steps=((1, 2048), (16, 2048), (64, 2048)),
)  # fmt: skip
DRY = Scale(
    torch.device("cpu"), 1, 4, 2, 1 << 16, 16, 64, 96, 4,
    decodes=((2, 64),), prefills=((32, 32, 2),), steps=((2, 32),),
)  # fmt: skip


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


def median_s(scale: Scale, run: Callable[[], object]) -> float:
    """Seconds of the device, each try after a write that leaves nothing of its inputs in the L2 cache."""
    if scale.device.type == "cpu":
        start_ns = monotonic_ns()
        run()
        return to_s(monotonic_ns() - start_ns)
    flush = torch.empty(256 << 20, dtype=torch.uint8, device=scale.device)
    times = []
    for i in range(scale.num_tries + 3):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        if i >= 3:
            times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def bandwidth(scale: Scale) -> float:
    """Bytes per second, read and written, of a plain copy."""
    source, target = torch.empty(2, scale.copied_bytes, dtype=torch.uint8, device=scale.device)
    return 2 * source.nbytes / median_s(scale, lambda: target.copy_(source))


def elementwise(scale: Scale, hbm: float) -> Iterator[Measured]:
    n, hidden, features, device = scale.num_tokens, scale.hidden_size, scale.intermediate_size, scale.device
    x, delta, y, total = (scale.random(n, hidden) for _ in range(4))
    scale_E = torch.ones(hidden, device=device)
    gate_up, out = scale.random(n, 2 * features), scale.random(n, features)
    heads, kv_heads = scale.num_heads, scale.num_kv_heads
    qkv, q = scale.random(n, heads + 2 * kv_heads, HEAD_DIM), scale.random(n, heads, HEAD_DIM)
    qk, v = qkv.split((heads + kv_heads, kv_heads), 1)
    cos = scale.random(n, 1, 2, HEAD_DIM // 2)
    kv = scale.random(2, n // BLOCK_SIZE, BLOCK_SIZE, kv_heads, HEAD_DIM)
    slots = torch.randperm(n, device=device)
    blocks = torch.empty(scale.num_rows * 65536, dtype=torch.uint8, device=device)
    from_rows, to_rows = torch.randperm(scale.num_rows, device=device).split(scale.num_rows // 2)
    for what, launch, num_bytes in (
        ("norm", norm_launch(x, None, None, y, scale_E, 0.04), 2 * x.nbytes),
        ("norm with residual", norm_launch(x, delta, total, y, scale_E, 0.04), 4 * x.nbytes),
        ("swiglu", swiglu_launch(gate_up, out), gate_up.nbytes + out.nbytes),
        ("rope and cache write", kv_write_launch(qk, v, cos, cos, q, kv, slots), 2 * qkv.nbytes + 2 * cos.nbytes),
        ("block copy, 64 KiB rows", row_copy_launch(blocks, from_rows, blocks, to_rows, 65536), blocks.nbytes),
    ):
        yield Measured(what, num_bytes / median_s(scale, launch.run) / 1e9, hbm / 1e9, "GB/s", ">= .85")


def decode(scale: Scale, hbm: float, batch: int, num_kv: int) -> Measured:
    """All requests of one length, their blocks scattered over the cache; the grid is that of a captured step."""
    width, device = num_kv // BLOCK_SIZE, scale.device
    kv = scale.random(2, batch * width, BLOCK_SIZE, scale.num_kv_heads, HEAD_DIM)
    tables = torch.randperm(batch * width, device=device).view(batch, width)
    q, out = (scale.random(batch, scale.num_heads, HEAD_DIM) for _ in range(2))
    rows, lens = torch.arange(batch, device=device), torch.full((batch,), num_kv, device=device)
    launches = paged_decode_launches(q, kv, out, tables, lens, rows, rows, MAX_SPLITS, capability_of(device))
    seconds = median_s(scale, lambda: [launch.run() for launch in launches])
    wanted = ">= .85" if batch >= 16 and num_kv >= 4096 else ""
    return Measured(f"decode attention, {batch} x {num_kv}", kv.nbytes / seconds / 1e9, hbm / 1e9, "GB/s", wanted)


def prefill(scale: Scale, num_cached: int, num_new: int, batch: int) -> Measured:
    """Equal requests; torch's flash attention beside it has its keys and values contiguous, and heads repeated."""
    num_kv, heads, device = num_cached + num_new, scale.num_heads, scale.device
    width = num_kv // BLOCK_SIZE
    kv = scale.random(2, batch * width, BLOCK_SIZE, scale.num_kv_heads, HEAD_DIM)
    tables = torch.randperm(batch * width, device=device).view(batch, width)
    q, out = (scale.random(batch * num_new, heads, HEAD_DIM) for _ in range(2))
    starts = torch.arange(batch + 1, device=device) * num_new
    lens, capability = torch.full((batch,), num_kv, device=device), capability_of(device)
    tokens = tokens_a_tile(heads // scale.num_kv_heads, HEAD_DIM, DTYPE, capability)
    ones = np.ones(batch, dtype=np.int64)
    tiles = PrefillTiles.of(ones * num_new, ones * num_kv, np.arange(batch), tokens, device)
    seconds = median_s(scale, paged_prefill_launch(q, kv, out, tables, starts, lens, tiles, capability).run)
    flops = 4 * batch * heads * HEAD_DIM * (num_new * num_cached + num_new * (num_new + 1) / 2)
    what = f"prefill, {batch} x {num_new} after {num_cached} cached"
    flash = _flash_flops(scale, batch, num_kv)
    return Measured(what, flops / seconds / 1e12, flash / 1e12, "TFLOP/s", ">= .7")


def _flash_flops(scale: Scale, batch: int, num_tokens: int) -> float:
    """Causal, over as many tokens: torch's flash attention masks from the first key, so it takes no prefix."""
    q, k, v = (scale.random(batch, scale.num_heads, num_tokens, HEAD_DIM) for _ in range(3))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        seconds = median_s(scale, lambda: scaled_dot_product_attention(q, k, v, is_causal=True))
    return 4 * batch * scale.num_heads * HEAD_DIM * num_tokens * (num_tokens + 1) / 2 / seconds


def kernels(scale: Scale, hbm: float) -> Iterator[Measured]:
    yield from elementwise(scale, hbm)
    yield from (decode(scale, hbm, *shape) for shape in scale.decodes)
    yield from (prefill(scale, *shape) for shape in scale.prefills)


def steps(scale: Scale, hbm: float, with_hf: bool) -> Iterator[Measured]:
    """Whole decode steps, sampled tokens read: milliseconds beside the roofline's, so below is better."""
    machine, model = Machine(gemm_flops=float("inf"), read_bytes=hbm), TINY if scale is DRY else LLAMA3_8B
    decoding = DecodeSteps(model, scale.device, scale.num_tries)
    for batch, context in scale.steps:
        limit_s = decode_work(model, np.full(batch, context), DTYPE.itemsize).seconds(machine)
        what = f"decode step, batch {batch}, {context} tokens each"
        yield Measured(what, decoding.ours_s(batch, context) * 1e3, limit_s * 1e3, "ms", "<= 1.25")
        if with_hf:
            seconds = decoding.hugging_face_s(batch, context)
            yield Measured(f"{what}, transformers", seconds * 1e3, limit_s * 1e3, "ms", "")


def measure(scale: Scale, parts: Sequence[str], with_hf: bool) -> Iterator[Measured]:
    hbm = bandwidth(scale)
    if "kernels" in parts:
        yield from kernels(scale, hbm)
    if "steps" in parts:
        yield from steps(scale, hbm, with_hf)


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
    lines = [f"{name}, torch {torch.__version__}, triton {triton.__version__}, bfloat16", "",
             "| what | rate or time | limit | unit | ratio | wanted |", "|---|---|---|---|---|---|"]  # fmt: skip
    print("\n".join(lines))
    for measured in measure(scale, parts, not args.no_hf):
        print(measured.line, flush=True)
        lines.append(measured.line)
    if args.out is not None:
        with args.out.open("a", encoding="utf-8") as page:
            page.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
