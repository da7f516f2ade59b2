"""Attention: what a backend must do over the paged cache. Knows no layout: it reads KV through the view's strides.

Shape legend: T tokens, H query heads, K kv heads, D head dim, N blocks, B tokens in a block, S tokens of one request's
KV. `kv_2NBKD` is one layer of a cache in any layout, index 0 the keys and 1 the values; it is strided, never assumed
contiguous, and whatever was not written through a request's block table may hold anything, NaN included.
"""

from abc import ABC, abstractmethod

import numpy as np
import torch

from memserve.model.batch import ForwardBatch


class Attention(ABC):
    """Attention of one step. What all layers share is worked out once, by the constructor, from the batch.

    A backend is a subclass; the runner makes one object a step and calls `write` and then `attend` for each layer.
    """

    def __init__(self, batch: ForwardBatch) -> None:
        self.batch = batch
        block, offset = np.divmod(batch.slot_mapping, batch.block_size)
        self._write_index = (torch.from_numpy(block).to(batch.device), torch.from_numpy(offset).to(batch.device))

    def write(self, kv_2NBKD: torch.Tensor, new_kv_T2KD: torch.Tensor) -> None:
        """Stores the step's new keys and values in the slots of its tokens."""
        kv_2NBKD.permute(1, 2, 0, 3, 4)[self._write_index] = new_kv_T2KD

    @abstractmethod
    def attend(self, q_THD: torch.Tensor, kv_2NBKD: torch.Tensor) -> torch.Tensor:
        """Causal attention of each token to its request's KV up to itself, after `write`. Returns [T, H, D]."""
