"""Work: the operations and bytes of a decoder's step, operator by operator, none fused. Knows no machine.

    products    h x (H + 2 K) D, H D x h, h x 2 I and I x h in every layer: 2 operations a weight and token, and the
                weights read once; the head, h x V, for the tokens that are sampled from
    attention   4 H D operations a pair (new token, an earlier one or itself) in every layer; the KV read once
    the rest    two norms with their sums, RoPE and the cache write, SwiGLU: bytes read and written for every token

h hidden and I intermediate size, H query and K kv heads of dimension D, V tokens in the vocabulary. The embedding is
looked up, not multiplied. Of a model split over n ranks, a rank has a share of every product, of the query heads and of
the kv heads, of these one at least.
"""

from dataclasses import dataclass, fields

import numpy as np

from memserve.values import require_int

Number = float | np.ndarray  # of one step, or of each of several


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes. bytes_per_element: of a weight and of an element of KV.

    Raises ValueError for a size below 1, and for query heads that the kv heads do not divide.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    bytes_per_element: int = 2

    def __post_init__(self) -> None:
        for field in fields(self):
            require_int(f"shape.{field.name}", getattr(self, field.name), 1)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"shape.num_heads={self.num_heads}: expected a multiple of shape.num_kv_heads={self.num_kv_heads}"
            )


@dataclass(frozen=True)
class Work:
    """Operations and bytes of one operator, or of several that run one after the other."""

    flops: float
    num_bytes: float

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.num_bytes + other.num_bytes)


class StepWork:
    """What one of num_ranks ranks has to do, all layers together.

    Raises ValueError for ranks that heads cannot be split over.
    """

    def __init__(self, shape: Shape, num_ranks: int = 1) -> None:
        require_int("tensor_parallel", num_ranks, 1)
        if shape.num_heads % num_ranks or max(shape.num_kv_heads, num_ranks) % min(shape.num_kv_heads, num_ranks):
            raise ValueError(
                f"tensor_parallel={num_ranks}: expected a divisor of shape.num_heads={shape.num_heads}, and one of "
                f"shape.num_kv_heads={shape.num_kv_heads} or a multiple of it"
            )
        self.shape, self.num_ranks = shape, num_ranks
        self.num_kv_heads = max(shape.num_kv_heads // num_ranks, 1)
        query, kv = shape.num_heads // num_ranks * shape.head_dim, self.num_kv_heads * shape.head_dim
        h, inner = shape.hidden_size, shape.intermediate_size / num_ranks
        self._weights = (h * (query + 2 * kv), query * h, h * 2 * inner, inner * h)
        self._head = h * shape.vocab_size / num_ranks
        self._query, self._kv = query, kv
        self._moved = 8 * h + 2 * (query + 2 * kv) + 3 * inner  # elements a token and layer, beside products' own

    @property
    def weight_bytes(self) -> float:
        """Of a rank's weights, embedding and head apart; norms are left out."""
        shape = self.shape
        return (shape.num_layers * sum(self._weights) + 2 * self._head) * shape.bytes_per_element

    def products(self, num_tokens: float) -> list[Work]:
        """Of the four products of a layer, each in all layers."""
        num_layers, size = self.shape.num_layers, self.shape.bytes_per_element
        return [Work(2 * num_layers * n * num_tokens, num_layers * n * size) for n in self._weights]

    def head(self, num_rows: float) -> Work:
        """Of the product with the head, for the tokens that are sampled from."""
        return Work(2 * self._head * num_rows, self._head * self.shape.bytes_per_element)

    def attention(self, num_pairs: float, num_kv: float) -> Work:
        """num_pairs: of a new token with an earlier one or itself.  num_kv: tokens whose KV is read."""
        shape = self.shape
        num_bytes = 2 * shape.num_layers * self._kv * shape.bytes_per_element * num_kv
        return Work(4 * shape.num_layers * self._query * num_pairs, num_bytes)

    def the_rest(self, num_tokens: float) -> Work:
        """Norms, RoPE and cache write, SwiGLU: nothing but bytes."""
        return Work(0.0, self.shape.num_layers * self._moved * self.shape.bytes_per_element * num_tokens)


def num_pairs(num_cached: Number, num_new: Number) -> Number:
    """Of each new token of a prompt with all before it, cached or new, and itself."""
    return num_new * num_cached + num_new * (num_new + 1) / 2
