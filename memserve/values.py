"""Values that callers give, checked. Raises ValueError naming the value and what is allowed; knows nothing else."""

import math
from collections.abc import Iterable

import numpy as np


def as_tuple(name: str, value: object) -> tuple[object, ...]:
    """None is nothing, a string is one."""
    if value is None or isinstance(value, str):
        return () if value is None else (value,)
    if not isinstance(value, Iterable):
        raise ValueError(f"{name}={value!r}: expected a list")
    return tuple(value)


def require_number(name: str, value: object, low: float, high: float, allowed: str) -> float:
    """A finite number in [low, high], as Python's."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.floating) or not math.isfinite(value):
        raise ValueError(f"{name}={value!r}: expected {allowed}")
    if not low <= value <= high:
        raise ValueError(f"{name}={value!r}: expected {allowed}")
    return float(value)


def require_int(name: str, value: object, low: int, allowed: str, high: int | None = None) -> int:
    """An integer in [low, high], as Python's."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ValueError(f"{name}={value!r}: expected {allowed}")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name}={value!r}: expected {allowed}")
    return int(value)
