"""RandomWeights: a model of any shape without a file. Knows no framework's initialisation and no trained values."""

import torch

from memserve.mixing import digest64
from memserve.model.model_config import ModelConfig
from memserve.model.weights import tensor_shapes

EMBEDDING_STD = 0.1


class RandomWeights:
    """Seeded weights of the shapes that `config` asks for; a WeightSource.

    A tensor is a function of (seed, its name, its shape) alone, so the order of reading does not matter. Linear layers
    are drawn with a standard deviation of features_in ** -0.5 and embeddings with EMBEDDING_STD: activations stay near
    1 and the logits spread enough that the best token seldom ties with the second. Norms are drawn around 1 and biases
    around 0, so that a model that ignores one gives other tokens.

    seed: integer >= 0.  dtype: of every tensor.  Raises ValueError on a negative seed.
    """

    def __init__(self, config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        if seed < 0:
            raise ValueError(f"seed={seed!r}: expected an integer >= 0")
        self._shapes = tensor_shapes(config)
        self._seed = seed
        self._dtype = dtype

    def names(self) -> set[str]:
        return set(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def tensor(self, name: str) -> torch.Tensor:
        shape = self._shapes[name]
        normal = torch.randn(shape, generator=self._generator(name))
        if len(shape) == 2:
            normal *= EMBEDDING_STD if "embed_tokens" in name or "lm_head" in name else shape[1] ** -0.5
        elif "norm" in name:
            normal = 1.0 + 0.1 * normal
        else:
            normal *= 0.1
        return normal.to(self._dtype)

    def _generator(self, name: str) -> torch.Generator:
        return torch.Generator().manual_seed(digest64(f"{self._seed}/{name}".encode()) >> 1)
