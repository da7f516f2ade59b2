"""How fast the Triton kernels and a decode step are on this machine's GPU, each beside its limit measured in the run.

    python scripts/bench_kernels.py                          # kernels, then Llama-3-8B's shape with random weights
    python scripts/bench_kernels.py --no-model --out page.md
    python scripts/bench_kernels.py --no-hf                  # leave out Hugging Face transformers

Element-wise kernels, copies and decode attention are bound by memory: GB/s as a share of what a copy of 2 GiB reaches.
Prefill is bound by products: TFLOP/s as a share of torch's flash attention on equal shapes. A decode step's limit is
roofline.py's, from the same bandwidth. Times are medians of CUDA events, after a warm-up.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import triton
from gpu_decode import MODEL, hugging_face_step_s, our_step_s
from roofline import Machine, decode_work
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from memserve.model.kernels.configs import capability_of
from memserve.model.kernels.kv_write import kv_write_launch
from memserve.model.kernels.norm import norm_launch
from memserve.model.kernels.paged_decode import num_splits, paged_decode_launches
from memserve.model.kernels.paged_prefill import PrefillTiles, paged_prefill_launch, tokens_a_tile
from memserve.model.kernels.swiglu import swiglu_launch
from memserve.transfer.row_kernel import row_copy_launch

DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE = 32, 8, 128, 16
NUM_TRIES = 20


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


def median_s(run: Callable[[], object]) -> float:
    """Seconds of the GPU, each try after a write that leaves nothing of its inputs in the L2 cache."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE)
    times = []
    for i in range(NUM_TRIES + 3):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        if i >= 3:
            times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def bandwidth() -> float:
    """Bytes per second, read and written, of a copy of 2 GiB."""
    source, target = torch.empty(2, 2 << 30, dtype=torch.uint8, device=DEVICE)
    return 2 * source.nbytes / median_s(lambda: target.copy_(source))


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=DTYPE, device=DEVICE)


def elementwise(hbm: float, num_tokens: int = 16384) -> Iterator[Measured]:
    x, delta, y, total = (random(num_tokens, 4096) for _ in range(4))
    scale = torch.ones(4096, device=DEVICE)
    gate_up, out = random(num_tokens, 28672), random(num_tokens, 14336)
    qkv, q = random(num_tokens, NUM_HEADS + 2 * NUM_KV_HEADS, HEAD_DIM), random(num_tokens, NUM_HEADS, HEAD_DIM)
    qk, v = qkv.split((NUM_HEADS + NUM_KV_HEADS, NUM_KV_HEADS), 1)
    cos = random(num_tokens, 1, 2, HEAD_DIM // 2)
    kv = random(2, num_tokens // BLOCK_SIZE, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
    slots = torch.randperm(num_tokens, device=DEVICE)
    blocks = torch.empty(4096 * 65536, dtype=torch.uint8, device=DEVICE)
    rows = torch.randperm(4096, device=DEVICE)
    for what, launch, num_bytes in (
        ("norm", norm_launch(x, None, None, y, scale, 0.04), 2 * x.nbytes),
        ("norm with residual", norm_launch(x, delta, total, y, scale, 0.04), 4 * x.nbytes),
        ("swiglu", swiglu_launch(gate_up, out), gate_up.nbytes + out.nbytes),
        ("rope and cache write", kv_write_launch(qk, v, cos, cos, q, kv, slots), 2 * qkv.nbytes + 2 * cos.nbytes),
        ("block copy, 64 KiB rows", row_copy_launch(blocks, rows[:2048], blocks, rows[2048:], 65536), blocks.nbytes),
    ):
        yield Measured(what, num_bytes / median_s(launch.run) / 1e9, hbm / 1e9, "GB/s", ">= .85")


def decode(hbm: float, batch: int, num_kv: int) -> Measured:
    """All requests of one length, their blocks scattered over the cache."""
    width = num_kv // BLOCK_SIZE
    kv = random(2, batch * width, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
    tables = torch.randperm(batch * width, device=DEVICE).view(batch, width)
    q, out = random(batch, NUM_HEADS, HEAD_DIM), random(batch, NUM_HEADS, HEAD_DIM)
    rows, lens = torch.arange(batch, device=DEVICE), torch.full((batch,), num_kv, device=DEVICE)
    splits = int(num_splits(np.array([num_kv]))[0])
    launches = paged_decode_launches(q, kv, out, tables, lens, rows, rows, splits, capability_of(DEVICE))
    seconds = median_s(lambda: [launch.run() for launch in launches])
    return Measured(f"decode attention, {batch} x {num_kv}", kv.nbytes / seconds / 1e9, hbm / 1e9, "GB/s", ">= .85")


def prefill(num_cached: int, num_new: int, batch: int) -> Measured:
    """Equal requests; torch's flash attention beside it has its keys and values contiguous, and heads repeated."""
    num_kv = num_cached + num_new
    width = num_kv // BLOCK_SIZE
    kv = random(2, batch * width, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
    tables = torch.randperm(batch * width, device=DEVICE).view(batch, width)
    q, out = random(batch * num_new, NUM_HEADS, HEAD_DIM), random(batch * num_new, NUM_HEADS, HEAD_DIM)
    starts = torch.arange(batch + 1, device=DEVICE) * num_new
    lens, capability = torch.full((batch,), num_kv, device=DEVICE), capability_of(DEVICE)
    tokens = tokens_a_tile(NUM_HEADS // NUM_KV_HEADS, HEAD_DIM, DTYPE, capability)
    ones = np.ones(batch, dtype=np.int64)
    tiles = PrefillTiles.of(ones * num_new, ones * num_kv, np.arange(batch), tokens, DEVICE)
    seconds = median_s(paged_prefill_launch(q, kv, out, tables, starts, lens, tiles, capability).run)
    flops = 4 * batch * NUM_HEADS * HEAD_DIM * (num_new * num_cached + num_new * (num_new + 1) / 2)
    what = f"prefill, {batch} x {num_new} after {num_cached} cached"
    flash = _flash_flops(batch, num_kv)
    return Measured(what, flops / seconds / 1e12, flash / 1e12, "TFLOP/s", ">= .7")


def _flash_flops(batch: int, num_tokens: int) -> float:
    """Causal, over as many tokens: torch's flash attention masks from the first key, so it takes no prefix."""
    q, k, v = (random(batch, NUM_HEADS, num_tokens, HEAD_DIM) for _ in range(3))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        seconds = median_s(lambda: scaled_dot_product_attention(q, k, v, is_causal=True))
    return 4 * batch * NUM_HEADS * HEAD_DIM * num_tokens * (num_tokens + 1) / 2 / seconds


def steps(hbm: float, with_hf: bool, context: int = 2048) -> Iterator[Measured]:
    """Whole decode steps, sampled tokens read: milliseconds beside the roofline's, so below is better."""
    machine = Machine(gemm_flops=float("inf"), read_bytes=hbm)
    for batch in (1, 16, 64):
        limit_s = decode_work(MODEL, np.full(batch, context), DTYPE.itemsize).seconds(machine)
        what = f"decode step, batch {batch}, {context} tokens each"
        yield Measured(what, our_step_s(batch, context) * 1e3, limit_s * 1e3, "ms", "<= 1.25")
        if with_hf:
            seconds = hugging_face_step_s(batch, context)
            yield Measured(f"{what}, transformers", seconds * 1e3, limit_s * 1e3, "ms", "")


def measure(args: argparse.Namespace) -> Iterator[Measured]:
    hbm = bandwidth()
    yield from elementwise(hbm)
    yield from (decode(hbm, batch, num_kv) for batch, num_kv in ((1, 2048), (16, 4096), (64, 2048), (64, 4096)))
    yield from (prefill(*shape) for shape in ((0, 2048, 8), (0, 8192, 2), (6144, 2048, 2)))
    if not args.no_model:
        yield from steps(hbm, not args.no_hf)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-model", action="store_true", help="kernels only")
    parser.add_argument("--no-hf", action="store_true", help="leave out Hugging Face")
    parser.add_argument("--out", type=Path, help="append the table to this page")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        sys.exit("error: no GPU here; scripts/compile_kernels.py compiles the kernels without one")
    name = torch.cuda.get_device_name()
    lines = [f"{name}, torch {torch.__version__}, triton {triton.__version__}, bfloat16", "",
             "| what | rate or time | limit | unit | ratio | wanted |", "|---|---|---|---|---|---|"]  # fmt: skip
    print("\n".join(lines))
    for measured in measure(args):
        print(measured.line, flush=True)
        lines.append(measured.line)
    if args.out is not None:
        with args.out.open("a", encoding="utf-8") as page:
            page.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
