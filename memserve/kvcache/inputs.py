"""What comes in at MemPool's edge, checked: token ids, counts, names of holders. Raises ValueError naming the value."""

from collections.abc import Sequence

import numpy as np

from memserve.kvcache.address import Medium
from memserve.kvcache.allocator import Holder
from memserve.values import require_int

Tokens = np.ndarray | Sequence[int]
OWN_HOLDERS = ("index", "swap", "transfer", "quarantine", "remote")  # how the names begin that a pool itself has
_PLAIN = frozenset((str, int))


def count_of(value: int, name: str = "num_blocks", most: int | None = None) -> int:
    """An integer from 0 on, to `most` if that is given."""
    return require_int(name, value, 0, most)


def medium_of(value: Medium | int) -> Medium:
    """A medium, or its number."""
    if isinstance(value, bool) or not isinstance(value, int) or value not in set(Medium):
        raise ValueError(f"medium={value!r}: expected {' or '.join(map(repr, Medium))}")
    return Medium(value)


def as_addrs(addrs: np.ndarray | Sequence[int]) -> np.ndarray:
    """int64 [n] from an array or a list of addresses. Raises ValueError for anything else."""
    array = np.asarray(addrs)
    if array.ndim != 1 or (array.size and array.dtype != np.int64):
        raise ValueError(f"addresses of dtype {array.dtype}, shape {array.shape}: expected int64 [n]")
    return array.astype(np.int64, copy=False)


def as_blocks(blocks: np.ndarray | Sequence[int], count: int) -> np.ndarray:
    """int [n] from an array or a list of numbers of a pool's `count` blocks. Raises ValueError for anything else."""
    array = _as_integers("blocks", blocks)
    if array.size and not 0 <= array.min() <= array.max() < count:
        raise ValueError(f"blocks from {array.min()} to {array.max()}: expected 0 to {count - 1}")
    return array


def as_holder(holder: Holder) -> Holder:
    """A name of whoever holds blocks: strings and integers, at least one."""
    if not isinstance(holder, tuple) or not holder or not _PLAIN.issuperset(map(type, holder)):
        raise ValueError(f"holder={holder!r}: expected a tuple of strings and integers, at least one")
    return holder


def named(holder: Holder) -> Holder:
    """Callers hold under names of their own: what a pool holds itself is not theirs to give up."""
    if as_holder(holder)[0] in OWN_HOLDERS:
        raise ValueError(f"holder={holder!r}: expected a name that begins with none of {', '.join(OWN_HOLDERS)}")
    return holder


def as_tokens(tokens: Tokens) -> np.ndarray:
    """C-contiguous int32 [n] from an array or a list of token ids. Raises ValueError for anything else."""
    array = _as_integers("tokens", tokens)
    if array.size and (array.min() < 0 or array.max() > np.iinfo(np.int32).max):
        raise ValueError(f"token ids from {array.min()} to {array.max()}: expected int32 >= 0")
    return np.ascontiguousarray(array, dtype=np.int32)


def _as_integers(name: str, values: np.ndarray | Sequence[int]) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise ValueError(f"{name} of dtype {array.dtype}, shape {array.shape}: expected integers [n]")
    return array
