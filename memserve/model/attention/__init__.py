"""Attention backends by the word a config names them with."""

from memserve.model.attention.base import Attention
from memserve.model.attention.reference import ReferenceAttention
from memserve.model.attention.sdpa import SdpaAttention
from memserve.model.attention.sparse import SparseAttention
from memserve.model.attention.triton import TritonAttention

__all__ = ["Attention", "attention_backend"]

_BACKENDS: dict[str, type[Attention]] = {
    "reference": ReferenceAttention,
    "sdpa": SdpaAttention,
    "sparse": SparseAttention,
    "triton": TritonAttention,
}


def attention_backend(word: str) -> type[Attention]:
    """The backend's class. Raises ValueError naming the words there are."""
    if word not in _BACKENDS:
        raise ValueError(f"attention={word!r}: expected one of {', '.join(_BACKENDS)}")
    return _BACKENDS[word]
