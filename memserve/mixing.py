"""mix64, digest64: 64 bits of which each depends on every bit of the input. Knows nothing of what they are for."""

import hashlib
from typing import TypeVar

import numpy as np

Word = TypeVar("Word", int, np.ndarray)

MASK64 = 0xFFFFFFFFFFFFFFFF
GOLDEN64 = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio: splitmix64's step from one state to the next


def mix64(word: Word) -> Word:
    """splitmix64's finaliser (Steele, Lea and Flood, OOPSLA 2014). word: in [0, 2**64), or uint64 of any shape."""
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & MASK64
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB & MASK64
    mixed: Word = word ^ (word >> 31)
    return mixed


def digest64(data: bytes) -> int:
    """In [0, 2**64), the same in every process: Python's `hash` is not."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
