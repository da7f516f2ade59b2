"""Checks of workload options: each raises ValueError naming the option, its value and what is allowed."""

import math


def require_count(name: str, value: object, minimum: int) -> int:
    """`value` as an int, at least `minimum`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name}={value!r}: expected an integer >= {minimum}")
    return value


def require_number(name: str, value: object, allowed: str, *, minimum: float, exclusive: bool = False) -> float:
    """`value` as a finite float, at least `minimum` (above it when `exclusive`)."""
    if (
        not isinstance(value, int | float)
        or isinstance(value, bool)
        or not math.isfinite(value)
        or value < minimum
        or (exclusive and value == minimum)
    ):
        raise ValueError(f"{name}={value!r}: expected {allowed}")
    return float(value)


def require_choice(name: str, value: object, choices: tuple[str, ...]) -> str:
    """`value`, one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(choices)}")
    return str(value)


def require_instance(name: str, value: object, kind: type[object]) -> None:
    """`value` is an object of `kind`: what a config group or a `_target_` node gives, a bool, ..."""
    if not isinstance(value, kind):
        hint = "true or false" if kind is bool else f"an object of {kind.__name__} (config: workload/{name}=NAME)"
        raise ValueError(f"{name}={value!r}: expected {hint}")
