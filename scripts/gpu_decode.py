"""Decode steps of a model with random weights in bfloat16: ours, and Hugging Face's. Prints nothing."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from hf_baseline import hf_config
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, StaticCache

from memserve.clock import monotonic_ns, to_s
from memserve.jit import EARLY_CAPABILITY
from memserve.kvcache.layout import DiscreteLayout
from memserve.model.kernels.configs import capability_of
from memserve.model.kernels.few_rows import MAX_ROWS
from memserve.model.llama import Llama, load_model
from memserve.model.model_config import ModelConfig
from memserve.model.runner import ModelRunner, geometry
from memserve.model.weights import tensor_shapes
from memserve.request import Request, ScheduledBatch
from memserve.sampling_params import SamplingParams

DTYPE, BLOCK_SIZE = torch.bfloat16, 16
WARM_UP_STEPS = 3
LLAMA3_8B = ModelConfig(
    model_type="llama",
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    max_position=8192,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
)
TINY = replace(LLAMA3_8B, vocab_size=64, hidden_size=64, intermediate_size=96, num_layers=1, num_heads=2,
               num_kv_heads=1, head_dim=32, max_position=256)  # fmt: skip


@dataclass(frozen=True)
class KernelTime:
    """What one kernel takes of a step. count: launches a step.  us: of all of them."""

    name: str
    count: float
    us: float


class DrawnWeights:
    """A WeightSource that draws each tensor on the device when it is asked for: timing needs no better ones."""

    def __init__(self, model: ModelConfig, device: torch.device) -> None:
        self._shapes, self._device = tensor_shapes(model), device

    def names(self) -> set[str]:
        return set(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def tensor(self, name: str) -> torch.Tensor:
        return 0.02 * torch.randn(self._shapes[name], dtype=DTYPE, device=self._device)


class DecodeSteps:
    """Both models are made when they are first asked for, and stay. num_steps: of each measurement."""

    def __init__(self, model: ModelConfig, device: torch.device, num_steps: int) -> None:
        self.config, self._device, self._num_steps = model, device, num_steps

    def ours_s(self, batch: int, context: int, fused: bool = False, early: bool = False) -> float:
        """Median seconds of `ModelRunner.forward`: inputs copied, the graph replayed, greedy tokens read.

        fused: products by `FewRowsOps`, where steps are captured.  early: `Llama.early_launches`, where they can be.
        """
        return self._median_s(self._our_step(batch, context, fused, early))

    def profile(self, batch: int, context: int, fused: bool = False) -> list[KernelTime]:
        """Of the mean of as many of our steps, the kernels that take longest first; on a CPU, torch's operations."""
        step, on_gpu = self._our_step(batch, context, fused), self._device.type == "cuda"
        for _ in range(WARM_UP_STEPS):
            step()
        with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiled:
            for _ in range(self._num_steps):
                step()
        times = []
        for event in profiled.key_averages():
            total_us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            times.append(KernelTime(event.key, event.count / self._num_steps, total_us / self._num_steps))
        return sorted(times, key=lambda t: -t.us)

    def _our_step(self, batch: int, context: int, fused: bool, early: bool = False) -> Callable[[], object]:
        if self._device.type == "cuda":
            early = early and capability_of(self._device) >= EARLY_CAPABILITY
            self._ours.compile(MAX_ROWS if fused else 0, early)  # CUDA graphs; a CPU's takes a compiler and minutes
        blocks_each = -(-context // BLOCK_SIZE)
        shape = DiscreteLayout().shape(geometry(self.config, BLOCK_SIZE, DTYPE), batch * blocks_each)
        kv = torch.randn(shape, dtype=DTYPE, device=self._device)
        runner = ModelRunner(self._ours, kv, BLOCK_SIZE, attention="triton")
        blocks = np.random.default_rng(0).permutation(batch * blocks_each).astype(np.int32)
        requests = []
        for table in np.split(blocks, batch):
            request = Request("r", np.ones(context, dtype=np.int32), SamplingParams())
            request.num_computed = context - 1
            request.block_table.extend(table)
            requests.append(request)
        scheduled = ScheduledBatch(requests, [1] * batch)
        return lambda: runner.forward(scheduled)

    @torch.inference_mode()
    def hugging_face_s(self, batch: int, context: int) -> float:
        """Median seconds of a forward of transformers with sdpa attention and its static cache, greedy tokens read."""
        model = self._hugging_face
        cache = StaticCache(config=model.config, max_cache_len=context + self._num_steps + WARM_UP_STEPS)
        tokens = torch.ones(batch, context - 1, dtype=torch.int64, device=self._device)
        for part in tokens.split(256, 1):
            model(part, past_key_values=cache, logits_to_keep=1)
        one = tokens[:, :1]

        def step() -> None:
            out = model(one, past_key_values=cache)  # each step adds its token, as it does for a user
            out.logits[:, -1].argmax(-1).cpu()

        return self._median_s(step)

    @cached_property
    def _ours(self) -> Llama:
        return load_model(self.config, DrawnWeights(self.config, self._device), DTYPE, self._device)

    @cached_property
    def _hugging_face(self) -> torch.nn.Module:
        config = hf_config(self.config)
        with self._device:
            return AutoModelForCausalLM.from_config(config, dtype=DTYPE, attn_implementation="sdpa").eval()

    def _median_s(self, run: Callable[[], object]) -> float:
        times = []
        for i in range(self._num_steps + WARM_UP_STEPS):
            start_ns = monotonic_ns()
            run()
            if self._device.type == "cuda":
                torch.cuda.synchronize()
            if i >= WARM_UP_STEPS:
                times.append(to_s(monotonic_ns() - start_ns))
        return statistics.median(times)
