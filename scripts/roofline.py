"""Roofline: the least time a step can take on this machine, from its GEMM rate and its memory bandwidth, both measured.

    decode step   products and head for every request; attention to all of its KV, which is read
    prefill       products for every new token, the head for the last one; attention to what is before each, of which
                  the KV that was cached is read
    seconds       = max(operations / GEMM rate, bytes / bandwidth), of all of this together

What these are, operator by operator: memserve/sched/cost_model/work.py. Elements have the size of `dtype`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from memserve.clock import monotonic_ns, to_s
from memserve.cluster.costs import shape_of
from memserve.model.model_config import ModelConfig
from memserve.sched.cost_model.work import Shape, StepWork, Work, num_pairs

GEMM_SHAPES = ((1024, 1024, 1024), (2048, 2048, 2048), (512, 576, 3072), (2048, 576, 3072))
NUM_TRIES = 5


@dataclass(frozen=True)
class Machine:
    """gemm_flops: best operations per second of a matrix product.  read_bytes: best bytes read per second."""

    gemm_flops: float
    read_bytes: float

    def seconds(self, work: Work) -> float:
        """At least, for what all of this has to do."""
        return max(work.flops / self.gemm_flops, work.num_bytes / self.read_bytes)

    def mean_with(self, other: "Machine") -> "Machine":
        return Machine((self.gemm_flops + other.gemm_flops) / 2, (self.read_bytes + other.read_bytes) / 2)


def measure_machine(read_mib: int = 512) -> Machine:
    """Best of several products and of several ways to read `read_mib` MiB once, with torch's threads, in float32."""
    flops = []
    for m, k, n in GEMM_SHAPES:
        a, b = torch.randn(m, k), torch.randn(k, n)
        flops.append(2 * m * k * n / _best_s(partial(torch.mm, a, b)))
    x = torch.randn(read_mib * 2**18)
    v = torch.randn(2048)
    reads: list[Callable[[], object]] = [
        x.sum,
        lambda: torch.dot(x, x),
        lambda: torch.mv(x.view(-1, 2048), v),
        lambda: torch.linalg.vector_norm(x),
    ]
    return Machine(max(flops), max(x.nbytes / _best_s(read) for read in reads))


def decode_work(config: ModelConfig, seq_lens: np.ndarray, itemsize: int = 4) -> Work:
    """One step in which every request, with seq_lens tokens of KV (its own new one included), gets a token."""
    work, num_kv = _step_work(config, itemsize), float(seq_lens.sum())
    return sum(work.products(len(seq_lens)), work.head(len(seq_lens)) + work.attention(num_kv, num_kv))


def prefill_work(config: ModelConfig, num_tokens: int, num_cached: int = 0, itemsize: int = 4) -> Work:
    """A prompt of num_tokens, of which num_cached have their KV, up to its first token."""
    work, num_new = _step_work(config, itemsize), num_tokens - num_cached
    attention = work.attention(num_pairs(num_cached, num_new), num_cached)
    return sum(work.products(num_new), work.head(1) + attention)


def _step_work(config: ModelConfig, itemsize: int) -> StepWork:
    return StepWork(Shape(**shape_of(config), bytes_per_element=itemsize))


def _best_s(run: Callable[[], object]) -> float:
    run()
    times = []
    for _ in range(NUM_TRIES):
        start_ns = monotonic_ns()
        run()
        times.append(to_s(monotonic_ns() - start_ns))
    return min(times)
