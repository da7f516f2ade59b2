"""ModelRunner: turns a ScheduledBatch into tokens. Knows no scheduler, index or role; it never changes a request.

The life of a step: build the ForwardBatch -> embed -> every layer writes and reads its KV -> logits of the rows that
sample -> Sampler. A compiled model takes the middle part of a decode step in one go, as its DecodeGraph, or on a GPU
as the runner's CapturedDecode. Whoever scheduled the batch appends the tokens and advances `num_computed` afterwards.

Shape legend: R requests, E hidden size, S sampled rows, V vocabulary; kv[L, 2, N, B, K, D] as in kvcache/layout.py.
"""

from collections.abc import Generator

import numpy as np
import torch

from memserve.kvcache.layout import CacheGeometry, DiscreteLayout
from memserve.model.attention import Attention, attention_backend
from memserve.model.attention.base import FirstStep, LayerAttention
from memserve.model.batch import ForwardBatch, build_forward_batch
from memserve.model.captured_decode import CapturedDecode
from memserve.model.decode_graph import DecodeGraph
from memserve.model.llama import Llama
from memserve.model.model_config import ModelConfig
from memserve.model.penalties import History
from memserve.model.sampler import Sampler, SamplingRow
from memserve.request import LayerRun, Request, ScheduledBatch, StepOutput, TokenLogprobs
from memserve.transfer.block_copy import to_device

Logprobs = list[TokenLogprobs | None] | None


def geometry(config: ModelConfig, block_size: int, dtype: torch.dtype) -> CacheGeometry:
    """What a pool needs to know of the model whose KV it holds, for blocks of `block_size` tokens of `dtype`.

    Of a model split over ranks, `Llama.config` gives the geometry of each rank's pool.
    """
    return CacheGeometry(config.num_layers, block_size, config.num_kv_heads, config.head_dim, dtype)


class ModelRunner:
    """One instance's compute: a model, which runners may share, over one cache, which they do not.

    model: whole, or this rank's part; the ranks of a group compute the same batches in the same order.
    kv: the pool's view [L, 2, N, B, K, D] in either layout, of the model's dtype and on its device; K are its heads.
    attention: the backend's word, see memserve/model/attention.

    Raises ValueError if the cache does not fit the model.
    """

    def __init__(
        self,
        model: Llama,
        kv: torch.Tensor,
        block_size: int,
        attention: str = "sdpa",
        sampler: Sampler | None = None,
    ) -> None:
        _check_cache(model, kv, block_size)
        self.model = model
        self.block_size = block_size
        self._kv, self._kv_layers = kv, kv.unbind(0)
        self._attention: type[Attention] = attention_backend(attention)
        self._attention.check(model.device, model.dtype)
        self._own_sampler = sampler if sampler is not None else Sampler()
        self._sampler = model.shard.sampler(self._own_sampler)
        self._decode_graph = self._built_graph(attention)
        self._has_attended = False

    @property
    def num_near_ties(self) -> int | None:
        """Of its tokens so far, by its sampler."""
        return self._own_sampler.num_near_ties

    def forward(self, batch: ScheduledBatch) -> StepOutput:
        """Computes the whole batch, all of its `num_steps`."""
        return LayerRun(self.forward_by_layer(batch)).finish()

    def forward_by_layer(self, batch: ScheduledBatch) -> Generator[int, None, StepOutput]:
        """The same as a generator: yields l once all the KV that the batch puts into layer l is written.

        In a batch of several steps that is during its last one.
        """
        token_ids = np.full((len(batch.requests), batch.num_steps), -1, dtype=np.int32)
        sampling = np.flatnonzero(batch.samples)
        logprobs: Logprobs = None
        step = build_forward_batch(batch, self.block_size, self.model.device)
        for i in range(batch.num_steps):
            layers = self._layers(step)
            logits_SV = (yield from layers) if i + 1 == batch.num_steps else LayerRun(layers).finish()
            if len(sampling):
                requests = [batch.requests[r] for r in sampling]
                token_ids[sampling, i], logprobs = self._sample(logits_SV, step, requests, token_ids[sampling, :i])
            else:
                self._wait()
            if i + 1 < batch.num_steps:
                step = step.next_step(to_device(token_ids[:, i].astype(np.int64), self.model.device))
        return StepOutput(token_ids, _one_a_request(logprobs, sampling, len(batch.requests)))

    def _built_graph(self, attention: str) -> CapturedDecode | DecodeGraph | None:
        """What computes decode steps in one go, ready to run; None where nothing does."""
        if self.model.captures_decode:
            if attention != "triton":
                raise ValueError(
                    f"model.compile=true on a GPU with attention={attention!r}: expected attention='triton'"
                )
            return CapturedDecode(self.model, self._kv, self.block_size)
        if self.model.decode_graph is not None:
            self.model.decode_graph.warm_up(self._kv)
        return self.model.decode_graph

    def _layers(self, step: ForwardBatch) -> Generator[int, None, torch.Tensor]:
        """Yields each layer's number once its KV is written; returns the logits [S, V] of the rows that sample."""
        graph = self._decode_graph
        if graph is not None and graph.takes(step):
            logits_RV = graph.step(step, self._kv)
            yield from range(self.model.config.num_layers)
            return logits_RV if step.samples_all else logits_RV[step.sample_rows_S]
        with torch.inference_mode():  # never held across a yield: it would leak into the caller
            own = self._attention(step, self._kv_layers, self.model.config.num_heads)
            attention: LayerAttention = own if self._has_attended else FirstStep(own)
            rotation = self.model.rotary.rotation(step.positions_T)
            stream = self.model.embed(step.token_ids)
        for i, layer in enumerate(self.model.layers):
            with torch.inference_mode():
                stream = layer(stream, rotation, attention)
            yield i
        self._has_attended = True
        with torch.inference_mode():
            x_TE, delta_TE = stream
            rows_S = step.sample_rows_S
            sampled = x_TE[rows_S], None if delta_TE is None else delta_TE[rows_S]
            return self.model.logits(sampled, attention.ops)

    def _wait(self) -> None:
        """A step that reads no token ends like one that does, with nothing under way: then its blocks may be freed for
        a peer to write to, and its time is what it took.
        """
        if self.model.device.type == "cuda":
            torch.cuda.current_stream(self.model.device).synchronize()

    @torch.inference_mode()
    def _sample(
        self, logits_SV: torch.Tensor, step: ForwardBatch, requests: list[Request], earlier: np.ndarray
    ) -> tuple[np.ndarray, Logprobs]:
        """int32 [S] tokens of the sampled rows, and their logprobs if any of `requests`, which own those rows, asks.

        earlier: int32 [S, n], what the batch's steps before this one sampled.
        """
        positions = step.positions[step.sample_rows] + 1
        rows = [
            SamplingRow(r.params, r.seed, int(p), _history(r, tokens), r.request_id)
            for r, p, tokens in zip(requests, positions, earlier, strict=True)
        ]
        return self._sampler.sample(logits_SV, rows)


def _history(request: Request, earlier: np.ndarray) -> History | None:
    """What a row needs to know of the tokens before the one it samples; None where it needs nothing."""
    if not request.params.penalises:
        return None
    return History(request.prompt, np.concatenate([request.output_token_ids, earlier]))


def _one_a_request(logprobs: Logprobs, sampling: np.ndarray, num_requests: int) -> Logprobs:
    """The logprobs of the rows that sampled, with None in the place of every other request."""
    if logprobs is None:
        return None
    by_row = dict(zip(sampling.tolist(), logprobs, strict=True))
    return [by_row.get(i) for i in range(num_requests)]


def _check_cache(model: Llama, kv: torch.Tensor, block_size: int) -> None:
    expected = geometry(model.config, block_size, model.dtype)
    num_blocks = kv.shape[2] if kv.dim() == 6 else 0
    shape = DiscreteLayout().shape(expected, num_blocks)
    if tuple(kv.shape) != shape or kv.dtype != model.dtype or kv.device.type != model.device.type:
        raise ValueError(
            f"kv: {kv.dtype} {tuple(kv.shape)} on {kv.device}, but the model needs {model.dtype} "
            f"{shape} on {model.device} (blocks of {block_size} tokens)"
        )
