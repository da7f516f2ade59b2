"""Values that callers give, checked. Raises ValueError naming the value and what is allowed; knows no option."""

import math
from collections.abc import Iterable

import numpy as np

from memserve.clock import LONGEST_S


def as_tuple(name: str, value: object) -> tuple[object, ...]:
    """None is nothing, a string is one."""
    if value is None or isinstance(value, str):
        return () if value is None else (value,)
    if not isinstance(value, Iterable):
        raise ValueError(f"{name}={value!r}: expected a list")
    return tuple(value)


def as_text(content: object) -> object:
    """OpenAI's list of text parts, [{"type": "text", "text": str}, ..], as one string, a line each; else what it is."""
    if not isinstance(content, list) or not content:
        return content
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content]
    return "\n".join(map(str, texts)) if all(isinstance(text, str) for text in texts) else content


def require_number(
    name: str, value: object, allowed: str, *, minimum: float, maximum: float = math.inf, exclusive: bool = False
) -> float:
    """A finite number in [minimum, maximum], above the minimum when `exclusive`; as Python's."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise ValueError(f"{name}={value!r}: expected {allowed}")
    try:
        number = float(value)
    except OverflowError:  # an integer beyond the largest float
        number = math.inf
    if not math.isfinite(number) or not minimum <= number <= maximum or (exclusive and number == minimum):
        raise ValueError(f"{name}={value!r}: expected {allowed}")
    return number


def require_int(name: str, value: object, minimum: int, maximum: int | None = None, *, allowed: str = "") -> int:
    """An integer in [minimum, maximum], as Python's. allowed: in other words than these."""
    in_range = f"an integer >= {minimum}" if maximum is None else f"an integer in [{minimum}, {maximum}]"
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ValueError(f"{name}={value!r}: expected {allowed or in_range}")
    if value < minimum or (maximum is not None and value > maximum):
        raise ValueError(f"{name}={value!r}: expected {allowed or in_range}")
    return int(value)


def require_duration(name: str, value: object) -> float:
    """A number of seconds from 0 to LONGEST_S."""
    return require_number(name, value, f"seconds in [0, {LONGEST_S:g}]", minimum=0.0, maximum=LONGEST_S)


def require_choice(name: str, value: object, choices: tuple[str, ...]) -> str:
    """`value`, one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(choices)}")
    return str(value)


def require_bool(name: str, value: object) -> bool:
    """`value`, true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r}: expected true or false")
    return value


def require_part(group: str, name: str, value: object, kind: type[object]) -> None:
    """`value` is an object of `kind`, such as a config group within `group` gives."""
    if not isinstance(value, kind):
        expected = f"an object of {kind.__name__} (config: {group}/{name}=NAME)"
        raise ValueError(f"{name}={value!r}: expected {expected}")
