"""StepBench: our scheduler, pool, index and ModelRunner on given prompts, every step timed part by part.

Prompts whose time does not matter need not be prefilled: `preload` enters them into the index as if they had been, over
KV that is random numbers, in memory of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from memserve.clock import monotonic_ns, to_s
from memserve.kvcache.arena import Arena
from memserve.kvcache.block_pool import BlockPool
from memserve.kvcache.index import NullIndex
from memserve.kvcache.layout import DiscreteLayout
from memserve.kvcache.radix import RadixIndex
from memserve.model.llama import Llama
from memserve.model.runner import ModelRunner, geometry
from memserve.model.sampler import Sampler, SamplingRow
from memserve.request import FinishReason, Request, TokenLogprobs
from memserve.sampling_params import SamplingParams
from memserve.sched.local_scheduler import LocalScheduler
from memserve.sched.preemption import Recompute
from memserve.sched.queue_policy import FCFS
from memserve.sched.swap_policy import Always

INDEXES = {"none": NullIndex, "radix": RadixIndex}
PRELOADED = ("bench",)
UNLIMITED_TOKENS = 1 << 20


@dataclass(frozen=True)
class Step:
    """One step's seconds: all of it, of it the runner's forward (sampling included), of that the sampler.

    num_tokens: computed.  decode: every request got one token.  seq_lens: int64 [requests], KV after the step.
    """

    total_s: float
    forward_s: float
    sampling_s: float
    num_tokens: int
    decode: bool
    seq_lens: np.ndarray


class _TimedSampler(Sampler):
    """A Sampler that adds up the time it takes."""

    def __init__(self) -> None:
        self.elapsed_ns = 0

    def sample(
        self, logits_RV: torch.Tensor, rows: Sequence[SamplingRow]
    ) -> tuple[np.ndarray, list[TokenLogprobs | None] | None]:
        start_ns = monotonic_ns()
        result = super().sample(logits_RV, rows)
        self.elapsed_ns += monotonic_ns() - start_ns
        return result


class StepBench:
    """One instance without its messages. index: "none" or "radix"."""

    def __init__(self, model: Llama, num_blocks: int, block_size: int, attention: str, index: str = "radix") -> None:
        shape = geometry(model.config, block_size, model.dtype)
        arena = Arena(DiscreteLayout(), shape, num_blocks, model.device)
        arena.tensor.normal_()  # zeros would share one page of memory, and be read from the cache
        self._pool = BlockPool(num_blocks, block_size, INDEXES[index])
        self._sampler = _TimedSampler()
        self._runner = ModelRunner(model, arena.kv, block_size, attention=attention, sampler=self._sampler)
        self._scheduler = LocalScheduler(
            self._pool,
            FCFS(),
            Recompute(),
            Always(),
            token_budget=UNLIMITED_TOKENS,
            chunk_size=None,
            max_running=1 << 10,
        )
        self._num_served = 0

    def preload(self, prompts: Sequence[np.ndarray]) -> None:
        """Makes the whole blocks of each prompt a cached prefix."""
        for prompt in prompts:
            num_blocks = len(prompt) // self._pool.block_size
            blocks = self._pool.alloc(num_blocks, PRELOADED)
            self._pool.publish(prompt[: num_blocks * self._pool.block_size], blocks)
            self._pool.release_all(PRELOADED)

    def forget(self) -> None:
        """Empties the index."""
        self._pool.clear()

    def serve(self, prompts: Sequence[np.ndarray], num_new: int) -> tuple[list[Step], np.ndarray]:
        """Runs the prompts together until each has num_new tokens; greedy. Returns the steps, and the tokens int32."""
        params = SamplingParams(max_tokens=num_new, ignore_eos=True)
        requests = []
        for prompt in prompts:
            self._num_served += 1
            total = len(prompt) + num_new
            requests.append(Request(f"bench-{self._num_served}", prompt, params, max_num_tokens=total))
            self._scheduler.add(requests[-1])
        steps = []
        while self._scheduler.num_unfinished:
            steps.append(self._step(num_new))
        return steps, np.stack([request.output_token_ids for request in requests])

    def _step(self, num_new: int) -> Step:
        sampled_ns, start_ns = self._sampler.elapsed_ns, monotonic_ns()
        batch = self._scheduler.schedule()
        assert batch is not None, "the pool is too small for the benchmark"
        forward_ns = monotonic_ns()
        output = self._runner.forward(batch)
        done_ns = monotonic_ns()
        self._scheduler.commit(batch, output)
        for request in batch.requests:
            if request.num_generated == num_new:
                self._scheduler.finish(request, FinishReason.LENGTH)
        end_ns = monotonic_ns()
        return Step(
            to_s(end_ns - start_ns),
            to_s(done_ns - forward_ns),
            to_s(self._sampler.elapsed_ns - sampled_ns),
            batch.num_tokens,
            max(batch.num_new) == 1,
            np.array([request.num_computed for request in batch.requests]),
        )
