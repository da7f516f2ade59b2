"""Attention backends by the word, or the dotted name of a class, that a config names them with."""

from memserve.config.targets import imported_class
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
    """The backend's class, one of ours by its word or anybody's by its dotted name. Raises ValueError for another."""
    if "." in word:
        return imported_class("model.attention", word, Attention)
    if word not in _BACKENDS:
        raise ValueError(f"model.attention={word!r}: expected one of {', '.join(_BACKENDS)}, or my_package.MyAttention")
    return _BACKENDS[word]
