"""ReferenceAttention: attention as its formula reads, request after request. The others are tested against it."""

import math

import torch

from memserve.model.attention.base import Attention


class ReferenceAttention(Attention):
    """softmax(q k^T / sqrt(D)) v in the dtype of q; in float64 it settles what rounding did.

    Shape legend: base.py's, and n new tokens of one request, G query heads a kv head.
    """

    def attend(self, layer: int, q_THD: torch.Tensor) -> torch.Tensor:
        q_of_requests = q_THD.tensor_split(self.batch.query_starts[1:-1].tolist())
        return torch.cat([self._attend_one(i, q_nHD, self.kv_layers[layer]) for i, q_nHD in enumerate(q_of_requests)])

    def _attend_one(self, request: int, q_nHD: torch.Tensor, kv_2NBKD: torch.Tensor) -> torch.Tensor:
        num_kv, num_new = int(self.batch.seq_lens[request]), len(q_nHD)
        num_blocks = -(-num_kv // self.batch.block_size)
        blocks = self.batch.block_tables_RM[request, :num_blocks]
        k_SKD, v_SKD = kv_2NBKD[:, blocks].flatten(1, 2)[:, :num_kv]
        q_nKGD = torch.unflatten(q_nHD, 1, (k_SKD.shape[1], -1))
        scores_KGnS = torch.einsum("nkgd,skd->kgns", q_nKGD, k_SKD) / math.sqrt(q_nHD.shape[-1])
        future_nS = torch.ones(num_new, num_kv, dtype=torch.bool, device=q_nHD.device).triu(num_kv - num_new + 1)
        weights_KGnS = scores_KGnS.masked_fill(future_nS, -math.inf).softmax(-1)
        return torch.einsum("kgns,skd->nkgd", weights_KGnS, v_SKD).flatten(1, 2)
