"""What bench_kernels.py measures and tune_kernels.py tunes: kernels on shapes that count, and how they are timed.

A case makes its launches for a configuration, its own by default; its inputs stay. Prints nothing.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from memserve.clock import monotonic_ns, to_s
from memserve.jit import KernelLaunch
from memserve.model.kernels.configs import (
    ELEMENTWISE,
    KV_WRITE,
    DecodeConfig,
    ProductConfig,
    RowConfig,
    TileConfig,
    capability_of,
    few_rows_config,
    norm_config,
    paged_decode_config,
    paged_prefill_config,
)
from memserve.model.kernels.few_rows import NormOf, few_rows_launch, squares_of
from memserve.model.kernels.kv_write import kv_write_launch
from memserve.model.kernels.norm import norm_launch
from memserve.model.kernels.paged_decode import MAX_SPLITS, paged_decode_launches
from memserve.model.kernels.paged_prefill import PrefillTiles, paged_prefill_launch, tokens_a_tile
from memserve.model.kernels.swiglu import swiglu_launch
from memserve.model.layers import Linear, RMSNorm
from memserve.model.ops import TritonOps
from memserve.transfer.row_kernel import ROW_COPY, row_copy_launch

Config = TypeVar("Config", RowConfig, TileConfig, DecodeConfig, ProductConfig)
BLOCK_SIZE = 16
COPIED_ROW_BYTES = 65536
# Read before each try: more than any L2 cache, and long enough to launch the kernel behind it. Not written: the kernel
# that is timed would have to write back what a cache still holds of that.
FLUSHED_BYTES = 1 << 30


@dataclass(frozen=True)
class Scale:
    """Which shapes are measured, and on which device.  num_rows: of the block copy, half of them to the other half.

    num_tokens, num_rows: so many that what the L2 cache has not written back at the end is a small part.

    decodes: (batch, tokens of KV).  prefills: (cached, new, batch).  steps: (batch, context).
    few_rows: of the products that fuse.
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
    few_rows: tuple[int, ...]
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=self.dtype, device=self.device)

    def of(self, head_dim: int, dtype: torch.dtype) -> "Scale":
        """The same shapes with other heads."""
        return replace(self, head_dim=head_dim, dtype=dtype)


FULL = Scale(
    torch.device("cuda"), 20, 32, 8, 2 << 30, 65536, 4096, 14336, 16384,
    decodes=((1, 2048), (16, 4096), (64, 2048), (64, 4096)),
    prefills=((0, 2048, 8), (0, 8192, 2), (6144, 2048, 2)),
    steps=((1, 2048), (16, 2048), (64, 2048)), few_rows=(1, 16),
)  # fmt: skip
DRY = Scale(
    torch.device("cpu"), 1, 4, 2, 1 << 16, 16, 64, 96, 4,
    decodes=((2, 64),), prefills=((32, 32, 2),), steps=((2, 32),), few_rows=(2,),
)  # fmt: skip


@dataclass(frozen=True)
class Case(Generic[Config]):
    """work: bytes moved, or operations.  config: what the runner would use.  output: what the launches write."""

    what: str
    work: float
    config: Config
    launches: Callable[[Config], Sequence[KernelLaunch]]
    output: torch.Tensor

    def run(self, config: Config | None = None) -> Callable[[], None]:
        """A function that runs it once; its launches are made now."""
        launches = self.launches(self.config if config is None else config)

        def run_all() -> None:
            for launch in launches:
                launch.run()

        return run_all


def median_s(scale: Scale, run: Callable[[], object]) -> float:
    """Seconds of the device, each try after a read that leaves nothing of its inputs in the L2 cache."""
    if scale.device.type == "cpu":
        start_ns = monotonic_ns()
        run()
        return to_s(monotonic_ns() - start_ns)
    flush = torch.zeros(FLUSHED_BYTES // 4, dtype=torch.int32, device=scale.device)
    times = []
    for i in range(scale.num_tries + 3):
        flush.amax()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        if i >= 3:
            times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def elementwise_cases(scale: Scale) -> Iterator[Case[RowConfig]]:
    yield from norm_cases(scale)
    yield swiglu_case(scale)
    yield kv_write_case(scale)
    yield row_copy_case(scale)


def norm_cases(scale: Scale) -> Iterator[Case[RowConfig]]:
    n, hidden = scale.num_tokens, scale.hidden_size
    x, delta, y, total = (scale.random(n, hidden) for _ in range(4))
    ones_E, config = torch.ones(hidden, device=scale.device), norm_config(hidden)
    yield Case("norm", 2 * x.nbytes, config, lambda c: [norm_launch(x, None, None, y, ones_E, 0.04, c)], y)
    yield Case(
        "norm with residual", 4 * x.nbytes, config, lambda c: [norm_launch(x, delta, total, y, ones_E, 0.04, c)], y
    )


def swiglu_case(scale: Scale) -> Case[RowConfig]:
    gate_up = scale.random(scale.num_tokens, 2 * scale.intermediate_size)
    out = scale.random(scale.num_tokens, scale.intermediate_size)
    num_bytes = gate_up.nbytes + out.nbytes
    return Case("swiglu", num_bytes, ELEMENTWISE, lambda c: [swiglu_launch(gate_up, out, c)], out)


def kv_write_case(scale: Scale) -> Case[RowConfig]:
    n, heads, kv_heads, head_dim = scale.num_tokens, scale.num_heads, scale.num_kv_heads, scale.head_dim
    qkv, q = scale.random(n, heads + 2 * kv_heads, head_dim), scale.random(n, heads, head_dim)
    qk, v = qkv.split((heads + kv_heads, kv_heads), 1)
    cos, sin = (scale.random(n, 1, 2, head_dim // 2) for _ in range(2))
    kv = scale.random(2, n // BLOCK_SIZE, BLOCK_SIZE, kv_heads, head_dim)
    slots = torch.randperm(n, device=scale.device)
    num_bytes = 2 * qkv.nbytes + cos.nbytes + sin.nbytes
    return Case(
        "rope and cache write", num_bytes, KV_WRITE, lambda c: [kv_write_launch(qk, v, cos, sin, q, kv, slots, c)], q
    )


def row_copy_case(scale: Scale) -> Case[RowConfig]:
    blocks = torch.randint(0, 256, (scale.num_rows * COPIED_ROW_BYTES,), dtype=torch.uint8, device=scale.device)
    source, target = torch.randperm(scale.num_rows, device=scale.device).split(scale.num_rows // 2)
    return Case(
        "block copy, 64 KiB rows", blocks.nbytes, ROW_COPY,
        lambda c: [row_copy_launch(blocks, source, blocks, target, COPIED_ROW_BYTES, c)], blocks,
    )  # fmt: skip


@dataclass(frozen=True)
class Product:
    """A product of a decode step with what fuses with it. apart: torch's product, and as kernels what is not part of
    another of these products' lines.
    """

    case: Case[ProductConfig]
    apart: Callable[[], object]


def products(scale: Scale, num_rows: int) -> Iterator[Product]:
    """Those of a decoder layer, in bfloat16."""
    hidden, inner = scale.hidden_size, scale.intermediate_size
    num_qkv = (scale.num_heads + 2 * scale.num_kv_heads) * scale.head_dim
    yield _product(scale, "norm, QKV", num_rows, hidden, num_qkv, normed=True)
    yield _product(scale, "output and sum", num_rows, scale.num_heads * scale.head_dim, hidden, normed=False)
    yield _product(scale, "norm, gate and up, SwiGLU", num_rows, hidden, inner, normed=True, gated=True)
    yield _product(scale, "down and sum", num_rows, inner, hidden, normed=False)


def _product(
    scale: Scale, what: str, num_rows: int, num_in: int, num_out: int, normed: bool, gated: bool = False
) -> Product:
    """normed: after a norm; otherwise before a sum."""
    x, y = scale.random(num_rows, num_in), scale.random(num_rows, num_out)
    weight = scale.random(2 * num_out if gated else num_out, num_in) / num_in**0.5
    added, ops, linear = scale.random(num_rows, num_out), TritonOps(), Linear(weight)
    norm, delta = RMSNorm(torch.ones(num_in, device=scale.device), 1e-5), scale.random(num_rows, num_in)
    around: dict[str, Any] = {"add_TO": added}
    if normed:
        around = {"norm": NormOf(norm.scale, norm.sum_eps, squares_of(x))}

    @torch.inference_mode()
    def apart() -> object:
        if not normed:
            return linear(x)  # the next norm takes the sum
        return ops.norm_swiglu(norm, (x, delta), linear) if gated else ops.norm_linear(norm, (x, delta), linear)

    case = Case(
        f"{what}, {num_rows} x {num_in}", weight.nbytes, few_rows_config(gated),
        lambda c: [few_rows_launch(x, weight, y, config=c, **around)], y,
    )  # fmt: skip
    return Product(case, apart)


def decode_case(scale: Scale, batch: int, num_kv: int) -> Case[DecodeConfig]:
    """All requests of one length, their blocks scattered over the cache; the grid is that of a captured step."""
    width, device = num_kv // BLOCK_SIZE, scale.device
    kv = scale.random(2, batch * width, BLOCK_SIZE, scale.num_kv_heads, scale.head_dim)
    tables = torch.randperm(batch * width, device=device).view(batch, width)
    q, out = (scale.random(batch, scale.num_heads, scale.head_dim) for _ in range(2))
    rows, lens = torch.arange(batch, device=device), torch.full((batch,), num_kv, device=device)
    return Case(
        f"decode attention, {batch} x {num_kv}", kv.nbytes,
        paged_decode_config(scale.head_dim, scale.dtype, capability_of(device)),
        lambda c: paged_decode_launches(q, kv, out, tables, lens, rows, rows, MAX_SPLITS, c), out,
    )  # fmt: skip


def prefill_case(scale: Scale, num_cached: int, num_new: int, batch: int) -> Case[TileConfig]:
    """Equal requests."""
    num_kv, heads, device = num_cached + num_new, scale.num_heads, scale.device
    width = num_kv // BLOCK_SIZE
    kv = scale.random(2, batch * width, BLOCK_SIZE, scale.num_kv_heads, scale.head_dim)
    tables = torch.randperm(batch * width, device=device).view(batch, width)
    q, out = (scale.random(batch * num_new, heads, scale.head_dim) for _ in range(2))
    starts, lens = torch.arange(batch + 1, device=device) * num_new, torch.full((batch,), num_kv, device=device)
    ones = np.ones(batch, dtype=np.int64)

    def launches(config: TileConfig) -> list[KernelLaunch]:
        tokens = tokens_a_tile(heads // scale.num_kv_heads, config)
        tiles = PrefillTiles.of(ones * num_new, ones * num_kv, np.arange(batch), tokens, device)
        return [paged_prefill_launch(q, kv, out, tables, starts, lens, tiles, config)]

    flops = 4 * batch * heads * scale.head_dim * (num_new * num_cached + num_new * (num_new + 1) / 2)
    config = paged_prefill_config(scale.head_dim, scale.dtype, capability_of(device))
    return Case(f"prefill, {batch} x {num_new} after {num_cached} cached", flops, config, launches, out)
