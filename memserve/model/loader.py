"""Loader: takes tensors out of a WeightSource and converts them. Knows names and shapes as the decoder asks for them,
which `check_tensors` has compared, and no file format. Of a tensor that is split over ranks it copies this rank's part
alone.

Shapes are those of the rank's part; the tensor in the source is `shard.size` times as long where it is split.
"""

from collections.abc import Sequence

import torch

from memserve.model.layers import Linear, RMSNorm
from memserve.model.parallel import WHOLE, Shard, SummedLinear
from memserve.model.weights import WeightSource


class Loader:
    """Serves the construction of one model. Each tensor is copied once, straight to its place."""

    def __init__(self, source: WeightSource, dtype: torch.dtype, device: torch.device, shard: Shard = WHOLE) -> None:
        self.dtype, self.device, self.shard = dtype, torch.device(device), shard
        self._source = source
        self._unused = set(source.names())

    def has(self, name: str) -> bool:
        """Whether there is such a tensor that was not taken yet."""
        return name in self._unused

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A copy of the whole named tensor, in memory of our own."""
        return self._read(name, self._empty(shape))

    def rows(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A copy of this rank's rows of the named tensor."""
        return self._read(name, self._empty(shape), split_dim=0)

    def linear(self, prefix: str, rows: dict[str, int], num_in: int, bias: bool) -> Linear:
        """One Linear out of the projections in `rows` (name -> this rank's output features), stacked in that order."""
        weight = self._stacked([(f"{prefix}.{name}.weight", (n, num_in)) for name, n in rows.items()])
        biases = [(f"{prefix}.{name}.bias", (n,)) for name, n in rows.items()]
        return Linear(weight, self._stacked(biases) if bias else None)

    def summed_linear(self, name: str, num_out: int, num_in: int, bias: bool) -> Linear:
        """The Linear of this rank's `num_in` input features, which gives the sum over the ranks."""
        weight = self._read(f"{name}.weight", self._empty((num_out, num_in)), split_dim=1)
        addend = self.shard.addend(self.tensor(f"{name}.bias", (num_out,)) if bias else None)
        return SummedLinear(weight, addend, self.shard)

    def norm(self, name: str, num_features: int, eps: float) -> RMSNorm:
        return RMSNorm(self.tensor(f"{name}.weight", (num_features,)), eps)

    def _stacked(self, parts: Sequence[tuple[str, tuple[int, ...]]]) -> torch.Tensor:
        num_rows = sum(shape[0] for _, shape in parts)
        target = self._empty((num_rows, *parts[0][1][1:]))
        for (name, _), rows in zip(parts, torch.split(target, [shape[0] for _, shape in parts]), strict=True):
            self._read(name, rows, split_dim=0)
        return target

    def _empty(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def _read(self, name: str, target: torch.Tensor, split_dim: int | None = None) -> torch.Tensor:
        tensor = self._source.tensor(name)
        shape = tuple(n * self.shard.size if dim == split_dim else n for dim, n in enumerate(target.shape))
        assert tensor.shape == shape, f"{name}: {tuple(tensor.shape)}, which check_tensors took for {shape}"
        self._unused.remove(name)
        return target.copy_(tensor if split_dim is None else self.shard.part(tensor, split_dim))
