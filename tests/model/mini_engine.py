"""MiniEngine: the smallest thing that can play scheduler to a ModelRunner in tests: a bump allocator and a loop."""

from collections.abc import Sequence

import numpy as np
import torch

from memserve.kvcache.layout import AggregatedLayout, DiscreteLayout
from memserve.model.llama import Llama, load_model
from memserve.model.model_config import ModelConfig
from memserve.model.runner import ModelRunner, geometry
from memserve.model.sampler import Sampler
from memserve.request import Request, ScheduledBatch
from memserve.sampling_params import SamplingParams

LAYOUTS = {"discrete": DiscreteLayout(), "aggregated": AggregatedLayout()}


class DictWeights:
    """A WeightSource over a state dict."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def names(self) -> set[str]:
        return set(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def tensor(self, name: str) -> torch.Tensor:
        return self.tensors[name]


def model_of(hf_model: torch.nn.Module, dtype: torch.dtype = torch.float32) -> Llama:
    """Our decoder with the weights of a transformers model."""
    config = ModelConfig.from_hf(hf_model.config.to_dict())
    return load_model(config, DictWeights(hf_model.state_dict()), dtype, torch.device("cpu"))


class MiniEngine:
    """A cache full of NaN, requests that get blocks as they grow, and batches made by the caller.

    scatter: hand out blocks in a shuffled order, so that no two of a request are adjacent but by chance.
    """

    def __init__(
        self,
        model: Llama,
        block_size: int = 16,
        layout: str = "discrete",
        attention: str = "sdpa",
        num_blocks: int = 256,
        scatter: bool = False,
        sampler: Sampler | None = None,
    ) -> None:
        shape = LAYOUTS[layout].shape(geometry(model.config, block_size, model.dtype), num_blocks)
        self.kv = LAYOUTS[layout].view(torch.full(shape, torch.nan, dtype=model.dtype, device=model.device))
        self.vocab_size = model.config.vocab_size
        self.runner = ModelRunner(model, self.kv, block_size, attention=attention, sampler=sampler)
        blocks = np.arange(num_blocks, dtype=np.int32)
        self._free = list(np.random.default_rng(0).permutation(blocks) if scatter else blocks)
        self._num_requests = 0

    def request(
        self, prompt: Sequence[int], cached_from: Request | None = None, num_cached: int = 0, **params
    ) -> Request:
        """A new request; the first `num_cached` tokens (whole blocks) reuse the blocks of `cached_from`."""
        self._num_requests += 1
        params = SamplingParams(ignore_eos=True, **params)
        request = Request(f"r{self._num_requests}", np.array(prompt, dtype=np.int32), params)
        if cached_from is not None:
            assert num_cached % self.runner.block_size == 0
            request.block_table.extend(cached_from.block_table.view[: num_cached // self.runner.block_size])
            request.num_cached = request.num_computed = num_cached
        return request

    def step(self, requests: list[Request], num_new: list[int], num_steps: int = 1) -> None:
        """Computes and commits one batch."""
        for request, n in zip(requests, num_new, strict=True):
            self._reserve(request, request.num_computed + n + num_steps - 1)
        output = self.runner.forward(ScheduledBatch(requests, num_new, num_steps))
        for request, n, tokens in zip(requests, num_new, output.token_ids, strict=True):
            request.num_computed += n + num_steps - 1
            request.tokens.extend(tokens[tokens >= 0])

    def finish(self, requests: list[Request], chunk: int | None = None, num_steps: int = 1) -> list[list[int]]:
        """Runs all to their max_tokens, computing at most `chunk` tokens of each in a step."""
        while running := [r for r in requests if r.num_generated < r.params.max_tokens]:
            num_new = [min(chunk or r.num_to_compute, r.num_to_compute) for r in running]
            left = min(r.params.max_tokens - r.num_generated for r in running)
            decode_only = all(r.num_to_compute == 1 for r in running)
            self.step(running, num_new, min(num_steps, left) if decode_only else 1)
        return [r.output_token_ids.tolist() for r in requests]

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int, **how) -> list[list[int]]:
        return self.finish([self.request(p, max_tokens=max_tokens) for p in prompts], **how)

    def _reserve(self, request: Request, num_tokens: int) -> None:
        while len(request.block_table) * self.runner.block_size < num_tokens:
            request.block_table.append(self._free.pop(0))


class RecordingSampler(Sampler):
    """Keeps the logits that it samples from."""

    def __init__(self) -> None:
        self.logits: list[torch.Tensor] = []

    def sample(self, logits_RV, rows):
        self.logits.append(logits_RV.clone())
        return super().sample(logits_RV, rows)


def logits_of(model: Llama, tokens: Sequence[int], attention: str = "sdpa", chunk: int = 1) -> torch.Tensor:
    """[n, V]: logits after the last token of each of the prompt's n prefixes that are whole chunks."""
    engine = MiniEngine(model, attention=attention, sampler=(sampler := RecordingSampler()))
    for end in range(chunk, len(tokens) + 1, chunk):
        engine.finish([engine.request(tokens[:end], max_tokens=1)])
    return torch.cat(sampler.logits)
