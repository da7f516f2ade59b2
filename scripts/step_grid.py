"""StepGrid: which steps are measured for a cost model, and a timer of one of them on the model runner itself.

No prompt is prefilled to be cached: the arena is full of random numbers, and a request is said to have computed what it
has not. Time does not depend on the values.
"""

from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import torch

from memserve.clock import monotonic_ns, to_s
from memserve.cluster.worker import Followers, ParallelRunner
from memserve.kvcache.arena import Arena
from memserve.kvcache.layout import DiscreteLayout
from memserve.model.llama import Llama
from memserve.model.runner import ModelRunner, geometry
from memserve.request import Request, Runner, ScheduledBatch
from memserve.sampling_params import SamplingParams
from memserve.sched.cost_model.fit import MeasuredStep

PREFIX_SHARES = (0.0, 0.25, 0.5, 0.9)
NUM_SWAPPED = 64


@dataclass(frozen=True)
class Case:
    """One step: per request, tokens in the cache and tokens to compute."""

    num_cached: list[int]
    num_new: list[int]


PACE = Case([32], [1])  # the step that short ones are run in turn with


def linear_points(max_context: int, max_tokens: int) -> list[int]:
    """Tokens of a step between which its linear part is taken as straight: every number to 12, since products of a few
    rows are as fast as their number suits the kernel; then powers of two, and 3/2 of them.
    """
    most = min(max_context, max_tokens)
    points = {*range(1, 13), *(int(base * 2**i) for i in range(3, 12) for base in (1, 1.5))}
    return sorted(p for p in points if p <= most)


def draw_log(rng: np.random.Generator, low: int, high: int) -> int:
    """A number from low to high, evenly over their logarithms."""
    return round(np.exp(rng.uniform(np.log(low), np.log(high))))


def fitted_cases(points: list[int], max_context: int, max_batch: int, rng: np.random.Generator) -> list[Case]:
    """A grid over cached and new tokens, batches of prompts, decode batches over lengths, and both together.

    New tokens behind a prefix are drawn between the points: prompts seldom end where kernels like it.
    """
    lengths = [max_context // 64, max_context // 8, max_context // 2, max_context - 1]
    alone = []
    for before, point in pairwise([0, *points]):
        for share in PREFIX_SHARES:
            y = draw_log(rng, before + 1, point) if share else point
            alone.append(Case([int(share * (max_context - y))], [y]))
    sizes = [s for s in (*range(2, 9), 10, 12, 16, 24, 32, 48, 64) if s <= max_batch]
    decode = [Case([length] * size, [1] * size) for size in [1, *sizes] for length in lengths]
    several = [
        Case([x] * size, [y] * size)
        for size in sizes[::2]
        for y in (5, 30, max(points[-1] // size // 2, 1))
        for x in (0, max_context // 4)
    ]
    chunks = [p for p in points if p >= 24][::3]
    mixed = [Case([max_context // 4] * size + [0], [1] * size + [y]) for size in sizes[::3] for y in chunks]
    return [*alone, *decode, *several, *mixed]


def held_out_cases(
    number: int, max_tokens: int, max_context: int, max_batch: int, rng: np.random.Generator
) -> list[Case]:
    """Steps of all four kinds, sizes drawn evenly over their logarithms."""
    draw = partial(draw_log, rng)
    cases = []
    for i in range(number):
        size = draw(2, max_batch)
        y = draw(4, max_tokens)
        x = int(rng.uniform(0, max_context - y)) if rng.random() < 0.7 else 0
        if i % 2 == 0:
            cases.append(Case([x], [y]))
        elif i % 4 == 1:
            cases.append(Case([draw(16, max_context - 1) for _ in range(size)], [1] * size))
        elif i % 8 == 3:
            new = [max(draw(2, max_tokens) // size, 2) for _ in range(size)]
            cases.append(Case([int(rng.uniform(0, max_context - n)) for n in new], new))
        else:
            cases.append(
                Case([draw(16, max_context // 2) for _ in range(size)] + [0], [1] * size + [draw(16, max_tokens)])
            )
    return cases


def by_kind(steps: list[MeasuredStep]) -> dict[str, list[MeasuredStep]]:
    """Those of each kind of which there are any, and all."""
    kinds = {
        "one prompt": [s for s in steps if len(s.num_new) == 1 and s.num_new[0] > 1],
        "several prompts": [s for s in steps if len(s.num_new) > 1 and min(s.num_new) > 1],
        "decode": [s for s in steps if max(s.num_new) == 1],
        "decode and a chunk": [s for s in steps if max(s.num_new) > 1 and min(s.num_new) == 1],
        "all": steps,
    }
    return {kind: found for kind, found in kinds.items() if found}


class StepTimer:
    """Runs steps on a model. max_context: most tokens of a request.  max_batch: most requests, one more beside them.

    `runner` computes this rank's part of the model. followers: the other ranks, which are told of every step.
    """

    def __init__(
        self,
        model: Llama,
        block_size: int,
        attention: str,
        max_context: int,
        max_batch: int,
        followers: Followers | None = None,
    ) -> None:
        self._blocks_each = -(-max_context // block_size)
        self._model, self._geometry = model, geometry(model.config, block_size, model.dtype)
        arena = Arena(DiscreteLayout(), self._geometry, self._blocks_each * (max_batch + 1), model.device)
        arena.tensor.normal_()
        self._arena = arena
        self.runner = ModelRunner(model, arena.kv, block_size, attention=attention)
        self._whole: Runner = self.runner if followers is None else ParallelRunner(self.runner, followers)

    def seconds(self, case: Case) -> float:
        """One forward, sampling included."""
        requests = [self._request(i, x, y) for i, (x, y) in enumerate(zip(case.num_cached, case.num_new, strict=True))]
        batch = ScheduledBatch(requests, case.num_new)
        self._synchronize()
        start_ns = monotonic_ns()
        self._whole.forward(batch)
        self._synchronize()
        return to_s(monotonic_ns() - start_ns)

    def swap_block_s(self, repeats: int) -> float:
        """Seconds to copy a block between host memory and the cache, of many at a time."""
        num_blocks = min(NUM_SWAPPED, self._blocks_each)
        dram = Arena(DiscreteLayout(), self._geometry, num_blocks, torch.device("cpu"))
        dram.tensor.normal_()
        times = []
        for _ in range(repeats + 1):
            self._synchronize()
            start_ns = monotonic_ns()
            self._arena.kv[:, :, :num_blocks].copy_(dram.kv)
            self._synchronize()
            times.append(to_s(monotonic_ns() - start_ns) / num_blocks)
        return float(np.median(times[1:]))

    def _request(self, number: int, num_cached: int, num_new: int) -> Request:
        prompt = np.arange(num_cached + num_new, dtype=np.int32) % self._model.config.vocab_size
        request = Request(f"step-{number}", prompt, SamplingParams(ignore_eos=True))
        request.num_computed = num_cached
        request.block_table.extend(np.arange(self._blocks_each, dtype=np.int32) + number * self._blocks_each)
        return request

    def _synchronize(self) -> None:
        if self._model.device.type == "cuda":
            torch.cuda.synchronize()
