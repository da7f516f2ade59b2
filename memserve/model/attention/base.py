"""Attention: what a backend must do over the paged cache. Knows no layout: it reads KV through the view's strides.

Shape legend: T tokens, H query heads, K kv heads, D head dim, N blocks, B tokens in a block, S tokens of one request's
KV. One layer of a cache is kv[2, N, B, K, D] in any layout, index 0 the keys and 1 the values; it is strided, never
assumed contiguous, and whatever was not written through a request's block table may hold anything, NaN included.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch

from memserve.model.batch import ForwardBatch
from memserve.model.ops import Ops, TorchOps
from memserve.model.rope import Rotation, rotate


class LayerAttention(ABC):
    """What a layer asks of a step's attention: `rotate_and_write`, then `attend`; and the operations beside it."""

    ops: Ops = TorchOps()

    @abstractmethod
    def rotate_and_write(
        self, layer: int, qk_THD: torch.Tensor, v_TKD: torch.Tensor, rotation: Rotation
    ) -> torch.Tensor:
        """Rotates queries and keys, [T, H + K, D], and stores keys and values. Returns the queries, [T, H, D]."""

    @abstractmethod
    def attend(self, layer: int, q_THD: torch.Tensor) -> torch.Tensor:
        """Causal attention of each token to its request's KV up to itself, after the write. Returns [T, H, D]."""


class TorchWrite(LayerAttention):
    """RoPE in torch, and then the write."""

    def rotate_and_write(
        self, layer: int, qk_THD: torch.Tensor, v_TKD: torch.Tensor, rotation: Rotation
    ) -> torch.Tensor:
        turned_THD = rotate(qk_THD, *rotation)
        num_heads = qk_THD.shape[1] - v_TKD.shape[1]
        self.write(layer, torch.stack((turned_THD[:, num_heads:], v_TKD), 1))
        return turned_THD[:, :num_heads]

    @abstractmethod
    def write(self, layer: int, new_kv_T2KD: torch.Tensor) -> None:
        """Stores the step's new keys and values in the slots of its tokens."""


class Attention(TorchWrite):
    """Attention of one step. What all layers share is worked out once, by the constructor.

    A backend is a subclass. The runner makes one object a step.

    kv_layers: kv[2, N, B, K, D] of each layer.  num_heads: query heads, a multiple of the kv heads.
    """

    def __init__(self, batch: ForwardBatch, kv_layers: Sequence[torch.Tensor], num_heads: int) -> None:
        self.batch = batch
        self.kv_layers = kv_layers

    @classmethod
    def check(cls, device: torch.device, dtype: torch.dtype) -> None:
        """Raises ValueError, naming what is expected, for a device or dtype that the backend cannot run on."""

    @cached_property
    def _write_index(self) -> tuple[torch.Tensor, torch.Tensor]:
        block, offset = np.divmod(self.batch.slot_mapping, self.batch.block_size)
        return torch.from_numpy(block).to(self.batch.device), torch.from_numpy(offset).to(self.batch.device)

    def write(self, layer: int, new_kv_T2KD: torch.Tensor) -> None:
        self.kv_layers[layer].permute(1, 2, 0, 3, 4)[self._write_index] = new_kv_T2KD


class FirstStep(LayerAttention):
    """Attention of a runner's first step, of which is seen whether it gives what layers take; later ones go unwatched.

    of: the backend's, which is asked. Raises ValueError naming its class where it gives something else.
    """

    def __init__(self, of: LayerAttention) -> None:
        self._of, self.ops = of, of.ops

    def rotate_and_write(
        self, layer: int, qk_THD: torch.Tensor, v_TKD: torch.Tensor, rotation: Rotation
    ) -> torch.Tensor:
        return self._of.rotate_and_write(layer, qk_THD, v_TKD, rotation)

    def attend(self, layer: int, q_THD: torch.Tensor) -> torch.Tensor:
        given: object = self._of.attend(layer, q_THD)
        if not isinstance(given, torch.Tensor) or (given.shape, given.dtype) != (q_THD.shape, q_THD.dtype):
            said = f"{given.dtype} {list(given.shape)}" if isinstance(given, torch.Tensor) else repr(given)
            expected = f"{q_THD.dtype} {list(q_THD.shape)}, as the queries"
            raise ValueError(f"{type(self._of).__name__}.attend gave {said}: expected {expected}")
        return given
