"""Attention: what a backend must do over the paged cache. Knows no layout: it reads KV through the view's strides.

Shape legend: T tokens, H query heads, K kv heads, D head dim, N blocks, B tokens in a block, S tokens of one request's
KV. One layer of a cache is kv[2, N, B, K, D] in any layout, index 0 the keys and 1 the values; it is strided, never
assumed contiguous, and whatever was not written through a request's block table may hold anything, NaN included.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch

from memserve.model.batch import ForwardBatch


class Attention(ABC):
    """Attention of one step. What all layers share is worked out once, by the constructor.

    A backend is a subclass. The runner makes one object a step; each layer calls `write` and then `attend`.

    kv_layers: kv[2, N, B, K, D] of each layer.  num_heads: query heads, a multiple of the kv heads.
    """

    def __init__(self, batch: ForwardBatch, kv_layers: Sequence[torch.Tensor], num_heads: int) -> None:
        self.batch = batch
        self.kv_layers = kv_layers
        block, offset = np.divmod(batch.slot_mapping, batch.block_size)
        self._write_index = (torch.from_numpy(block).to(batch.device), torch.from_numpy(offset).to(batch.device))

    def write(self, layer: int, new_kv_T2KD: torch.Tensor) -> None:
        """Stores the step's new keys and values in the slots of its tokens."""
        self.kv_layers[layer].permute(1, 2, 0, 3, 4)[self._write_index] = new_kv_T2KD

    @abstractmethod
    def attend(self, layer: int, q_THD: torch.Tensor) -> torch.Tensor:
        """Causal attention of each token to its request's KV up to itself, after `write`. Returns [T, H, D]."""
