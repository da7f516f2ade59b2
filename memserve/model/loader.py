"""Loader: takes tensors out of a WeightSource, checks and converts them. Knows names and shapes as the decoder asks for
them, and no file format.
"""

from collections.abc import Sequence

import torch

from memserve.model.layers import Linear, RMSNorm
from memserve.model.weights import WeightSource


class Loader:
    """Serves the construction of one model. Each tensor is copied once, straight to its place."""

    def __init__(self, source: WeightSource, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, torch.device(device)
        self._source = source
        self._unused = set(source.names())

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A copy of the named tensor, in memory of our own."""
        target = torch.empty(shape, dtype=self.dtype, device=self.device)
        return self._read(name, target)

    def linear(self, prefix: str, rows: dict[str, int], num_in: int, bias: bool) -> Linear:
        """One Linear out of the projections in `rows` (name -> output features), stacked in that order."""
        weight = self._stacked([(f"{prefix}.{name}.weight", (n, num_in)) for name, n in rows.items()])
        biases = [(f"{prefix}.{name}.bias", (n,)) for name, n in rows.items()]
        return Linear(weight, self._stacked(biases) if bias else None)

    def norm(self, name: str, num_features: int, eps: float) -> RMSNorm:
        return RMSNorm(self.tensor(f"{name}.weight", (num_features,)), eps)

    def check_all_used(self) -> None:
        """What the decoder has no place for would change its answers: only known leftovers may stay."""
        left = sorted(n for n in self._unused if n != "lm_head.weight" and not n.endswith(".rotary_emb.inv_freq"))
        if left:
            raise ValueError(f"weights have {len(left)} tensors the model has no place for: {', '.join(left[:4])} ...")

    def _stacked(self, parts: Sequence[tuple[str, tuple[int, ...]]]) -> torch.Tensor:
        num_rows = sum(shape[0] for _, shape in parts)
        target = torch.empty((num_rows, *parts[0][1][1:]), dtype=self.dtype, device=self.device)
        for (name, _), rows in zip(parts, torch.split(target, [shape[0] for _, shape in parts]), strict=True):
            self._read(name, rows)
        return target

    def _read(self, name: str, target: torch.Tensor) -> torch.Tensor:
        if name not in self._unused:
            raise ValueError(f"weights have no tensor {name!r}, which the model's config asks for")
        tensor = self._source.tensor(name)
        if tensor.shape != target.shape:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)} in the weights, {tuple(target.shape)} by the config")
        self._unused.remove(name)
        return target.copy_(tensor)
