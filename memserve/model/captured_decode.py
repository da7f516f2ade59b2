"""CapturedDecode: decode steps of a GPU as CUDA graphs, one a batch bucket. Knows no request and no sampling.

A step's kernels are recorded once over memory that stays; every later step writes its numbers there and replays. A
batch is filled up to its bucket with padding rows: length 0, slot -1, so that they read and write no cache. All that a
step needs goes to the GPU in asynchronous copies from pinned memory, and of the block tables no more than is used.

Shape legend: R rows of a bucket, one token each; M blocks of the widest table; V vocabulary.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from memserve.model.attention.base import LayerAttention
from memserve.model.batch import ForwardBatch
from memserve.model.kernels.configs import capability_of, paged_decode_config
from memserve.model.kernels.kv_write import kv_write_launch
from memserve.model.kernels.paged_decode import MAX_SPLITS, paged_decode_launches
from memserve.model.llama import Llama
from memserve.model.ops import FewRowsOps, TritonOps, in_rows
from memserve.model.rope import Rotation
from memserve.transfer.side_stream import new_stream

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_SLOT, _LENGTH, _POSITION = range(3)


def bucket_of(num_requests: int) -> int:
    """The smallest bucket that holds them: index into BUCKETS. num_requests: from 1 to the largest bucket."""
    return int(np.searchsorted(BUCKETS, num_requests))


class StaticInputs:
    """A decode step's inputs at addresses that never change. All int64.

    token_ids: [R].  facts: [3, R] slots, lengths and positions.  tables: [R, M].
    """

    def __init__(self, num_rows: int, max_blocks: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self.token_ids = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.facts = torch.zeros(3, num_rows, dtype=torch.int64, device=device)
        self.tables = torch.zeros(num_rows, max_blocks, dtype=torch.int64, device=device)
        self.facts[_SLOT] = -1
        self.rows = torch.arange(num_rows, device=device)
        self._facts_on_host = torch.empty(3, num_rows, dtype=torch.int64, pin_memory=pinned)

    def fill(self, batch: ForwardBatch) -> None:
        """Rows [0, n) are the batch's n requests; the others become padding.

        The tokens of the step before must have been read: then its copies are done too, and their memory is free.
        """
        facts, num_requests, width = self._facts_on_host.numpy(), batch.num_requests, batch.block_tables.shape[1]
        facts[:] = np.array([[-1], [0], [0]])
        facts[:, :num_requests] = batch.slot_mapping, batch.seq_lens, batch.positions
        self.facts.copy_(self._facts_on_host, non_blocking=True)
        self.tables[:num_requests, :width].copy_(batch.block_tables_RM)
        self.token_ids[:num_requests].copy_(batch.token_ids)


class StaticAttention(LayerAttention):
    """The kernels of TritonAttention over StaticInputs, run as those of `ops`."""

    def __init__(self, inputs: StaticInputs, kv_layers: Sequence[torch.Tensor], ops: TritonOps) -> None:
        self.ops, self._run, self._inputs, self._kv_layers = ops, ops.run, inputs, kv_layers
        head_dim, dtype = kv_layers[0].shape[4], kv_layers[0].dtype
        self._config = paged_decode_config(head_dim, dtype, capability_of(inputs.rows.device))

    def rotate_and_write(
        self, layer: int, qk_THD: torch.Tensor, v_TKD: torch.Tensor, rotation: Rotation
    ) -> torch.Tensor:
        q_THD = qk_THD.new_empty(len(qk_THD), qk_THD.shape[1] - v_TKD.shape[1], qk_THD.shape[2])
        slots_T = self._inputs.facts[_SLOT]
        qk_THD, v_TKD = in_rows(qk_THD), in_rows(v_TKD)
        self._run(kv_write_launch(qk_THD, v_TKD, *rotation, q_THD, self._kv_layers[layer], slots_T))
        return q_THD

    def attend(self, layer: int, q_THD: torch.Tensor) -> torch.Tensor:
        out_THD, rows, lens_R = torch.empty_like(q_THD), self._inputs.rows, self._inputs.facts[_LENGTH]
        tables, kv_2NBKD = self._inputs.tables, self._kv_layers[layer]
        for launch in paged_decode_launches(
            q_THD, kv_2NBKD, out_THD, tables, lens_R, rows, rows, MAX_SPLITS, self._config
        ):
            self._run(launch)
        return out_THD


class CapturedDecode:
    """All graphs of one runner; they share the memory of their intermediate results.

    kv: the runner's cache, [L, 2, N, B, K, D]; its block 0 is left as it is. Every bucket is recorded by the
    constructor, the largest first, so that no request waits for one.
    """

    def __init__(self, model: Llama, kv: torch.Tensor, block_size: int) -> None:
        max_blocks = min(kv.shape[2], -(-model.config.max_position // block_size))
        self._model, self._kv_layers = model, kv.unbind(0)
        self._inputs = [StaticInputs(num_rows, max_blocks, model.device) for num_rows in BUCKETS]
        self._max_blocks, self._pool = max_blocks, torch.cuda.graph_pool_handle()
        # One for all: cuBLAS keeps 32 MiB for every stream that products ran on, and torch's own is of one device only.
        self._stream = new_stream(model.device)
        with _nothing_collected():
            recorded = [self._record(inputs) for inputs in reversed(self._inputs)]
        self._steps = recorded[::-1]

    def takes(self, batch: ForwardBatch) -> bool:
        """Whether a graph computes such a batch. All its rows sample: their tokens are read before the next step."""
        fits = batch.num_requests <= BUCKETS[-1] and batch.block_tables.shape[1] <= self._max_blocks
        return batch.decode_only and batch.samples_all and fits

    def step(self, batch: ForwardBatch, kv: torch.Tensor) -> torch.Tensor:
        """Logits [n, V] after each request's token, valid until the next step; its KV is written in every layer."""
        assert kv.data_ptr() == self._kv_layers[0].data_ptr()
        bucket = bucket_of(batch.num_requests)
        self._inputs[bucket].fill(batch)
        return self._steps[bucket]()[: batch.num_requests]

    @torch.inference_mode()
    def _record(self, inputs: StaticInputs) -> Callable[[], torch.Tensor]:
        """Runs the step twice over padding rows, which compiles its kernels, then records it."""
        self._stream.wait_stream(torch.cuda.current_stream(self._model.device))
        with torch.cuda.stream(self._stream):
            for _ in range(2):
                decode_step(self._model, inputs, self._kv_layers)
        torch.cuda.current_stream(self._model.device).wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local: what other threads ask of the GPU meanwhile is not recorded and breaks nothing
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            logits_RV = decode_step(self._model, inputs, self._kv_layers)

        def replay() -> torch.Tensor:
            graph.replay()
            return logits_RV

        return replay


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """Within, Python frees no cycle of objects by itself: a recording breaks when a graph of before ends in its thread
    (pytorch/pytorch, pull request 161037).
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@torch.inference_mode()
def decode_step(model: Llama, inputs: StaticInputs, kv_layers: Sequence[torch.Tensor]) -> torch.Tensor:
    """One step of every row: logits [R, V], of padding rows without meaning. Starts kernels and waits for nothing."""
    ops = (FewRowsOps if len(inputs.rows) <= model.fused_rows else TritonOps)(model.early_launches)
    attention = StaticAttention(inputs, kv_layers, ops)
    rotation = model.rotary.rotation(inputs.facts[_POSITION])
    stream = model.embed(inputs.token_ids)
    for layer in model.layers:
        stream = layer(stream, rotation, attention)
    return model.logits(stream, ops)
