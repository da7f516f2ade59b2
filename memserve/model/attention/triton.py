"""TritonAttention: attention as kernels that read the paged cache in place; for GPUs. Copies no KV.

Requests with one new token go to the decode kernel, the others to the prefill kernel; both in one step where a batch
has both. RoPE and the write into the cache are one kernel, and norms and SwiGLU are kernels too (`TritonOps`).

Shape legend: base.py's.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from memserve.jit import KernelLaunch
from memserve.model.attention.base import Attention
from memserve.model.batch import ForwardBatch
from memserve.model.kernels.configs import capability_of, paged_decode_config, paged_prefill_config
from memserve.model.kernels.kv_write import kv_write_launch
from memserve.model.kernels.paged_decode import num_splits, paged_decode_launches
from memserve.model.kernels.paged_prefill import PrefillTiles, paged_prefill_launch, tokens_a_tile
from memserve.model.ops import TritonOps, check_runs_kernels, in_rows
from memserve.model.rope import Rotation
from memserve.transfer.block_copy import to_device


class TritonAttention(Attention):
    """At most three launches a layer, and one for the write. Nothing waits for the GPU."""

    ops = TritonOps()

    def __init__(self, batch: ForwardBatch, kv_layers: Sequence[torch.Tensor], num_heads: int) -> None:
        super().__init__(batch, kv_layers, num_heads)
        num_kv_heads, head_dim = kv_layers[0].shape[3:]
        kind = (head_dim, kv_layers[0].dtype, capability_of(batch.device))
        self._prefill_config, self._decode_config = paged_prefill_config(*kind), paged_decode_config(*kind)
        num_new = np.diff(batch.query_starts)
        decoding, prefilling = np.flatnonzero(num_new == 1), np.flatnonzero(num_new > 1)
        self._max_splits = int(num_splits(batch.seq_lens[decoding], self._decode_config).max(initial=0))
        columns = np.stack((decoding, batch.query_starts[decoding]))
        self._decoding_R, self._decode_rows_R = to_device(columns, batch.device)
        tokens = tokens_a_tile(num_heads // num_kv_heads, self._prefill_config)
        self._tiles = PrefillTiles.of(num_new, batch.seq_lens, prefilling, tokens, batch.device)

    @classmethod
    def check(cls, device: torch.device, dtype: torch.dtype) -> None:
        check_runs_kernels(device, dtype)

    def rotate_and_write(
        self, layer: int, qk_THD: torch.Tensor, v_TKD: torch.Tensor, rotation: Rotation
    ) -> torch.Tensor:
        q_THD = qk_THD.new_empty(len(qk_THD), qk_THD.shape[1] - v_TKD.shape[1], qk_THD.shape[2])
        slots_T = self.batch.slot_mapping_T
        kv_write_launch(in_rows(qk_THD), in_rows(v_TKD), *rotation, q_THD, self.kv_layers[layer], slots_T).run()
        return q_THD

    def attend(self, layer: int, q_THD: torch.Tensor) -> torch.Tensor:
        q_THD = q_THD.contiguous()
        out_THD = torch.empty_like(q_THD)
        for launch in self._launches(self.kv_layers[layer], q_THD, out_THD):
            launch.run()
        return out_THD

    def _launches(self, kv_2NBKD: torch.Tensor, q_THD: torch.Tensor, out_THD: torch.Tensor) -> Iterator[KernelLaunch]:
        tables_RM, lens_R = self.batch.block_tables_RM, self.batch.seq_lens_R
        if len(self._tiles.requests_P):
            starts_R1 = self.batch.query_starts_R1
            yield paged_prefill_launch(
                q_THD, kv_2NBKD, out_THD, tables_RM, starts_R1, lens_R, self._tiles, self._prefill_config
            )
        if len(self._decoding_R):
            yield from paged_decode_launches(
                q_THD, kv_2NBKD, out_THD, tables_RM, lens_R, self._decoding_R, self._decode_rows_R,
                self._max_splits, self._decode_config,
            )  # fmt: skip
