"""Roofline: the least time a step can take on this machine, from its GEMM rate and its memory bandwidth, both measured.

    decode step   bytes = weights that are multiplied + KV of every request; operations = 2 per weight and request
                  + 4 per query head, head dim and token of KV, in every layer
    prefill       bytes = weights; operations = 2 per weight of the layers and token + 4 per query head, head dim and
                  pair (token, earlier token or itself), in every layer, + 2 per weight of the head for the last token
    seconds       = max(operations / GEMM rate, bytes / bandwidth)

The embedding table is looked up, not multiplied: it counts only as the head, once. Elements have the size of `dtype`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from memserve.clock import monotonic_ns, to_s
from memserve.model.model_config import ModelConfig
from memserve.model.weights import tensor_shapes

GEMM_SHAPES = ((1024, 1024, 1024), (2048, 2048, 2048), (512, 576, 3072), (2048, 576, 3072))
NUM_TRIES = 5


@dataclass(frozen=True)
class Machine:
    """gemm_flops: best operations per second of a matrix product.  read_bytes: best bytes read per second."""

    gemm_flops: float
    read_bytes: float

    def mean_with(self, other: "Machine") -> "Machine":
        return Machine((self.gemm_flops + other.gemm_flops) / 2, (self.read_bytes + other.read_bytes) / 2)


@dataclass(frozen=True)
class Work:
    """What one step cannot avoid doing."""

    flops: float
    num_bytes: float

    def seconds(self, machine: Machine) -> float:
        return max(self.flops / machine.gemm_flops, self.num_bytes / machine.read_bytes)


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
    num_weights, num_kv = _layer_weights(config) + _head_weights(config), float(seq_lens.sum())
    flops = 2 * num_weights * len(seq_lens) + _attention_flops(config) * num_kv
    return Work(flops, itemsize * (num_weights + _kv_elements(config) * num_kv))


def prefill_work(config: ModelConfig, num_tokens: int, num_cached: int = 0, itemsize: int = 4) -> Work:
    """A prompt of num_tokens, of which num_cached have their KV, up to its first token."""
    num_new = num_tokens - num_cached
    pairs = num_new * num_cached + num_new * (num_new + 1) / 2
    flops = 2 * _layer_weights(config) * num_new + 2 * _head_weights(config) + _attention_flops(config) * pairs
    return Work(flops, itemsize * (_layer_weights(config) + _head_weights(config) + _kv_elements(config) * num_cached))


def _layer_weights(config: ModelConfig) -> int:
    return sum(int(np.prod(s)) for name, s in tensor_shapes(config).items() if name.startswith("model.layers."))


def _head_weights(config: ModelConfig) -> int:
    return config.vocab_size * config.hidden_size


def _attention_flops(config: ModelConfig) -> int:
    return 4 * config.num_layers * config.num_heads * config.head_dim


def _kv_elements(config: ModelConfig) -> int:
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim


def _best_s(run: Callable[[], object]) -> float:
    run()
    times = []
    for _ in range(NUM_TRIES):
        start_ns = monotonic_ns()
        run()
        times.append(to_s(monotonic_ns() - start_ns))
    return min(times)
