"""Values that callers give, and that a user's own classes return, checked. Raises ValueError naming the value and what
is allowed; knows no option.

`require_...` is of an argument, by its name. `given_...` is of what a method returned, by its class and its own name:
a forgotten `return` gives None, which is false, equal to any other None, and never what was meant.
"""

import math
from collections.abc import Iterable
from typing import TypeGuard

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
    if not is_integer(value, minimum, maximum):
        raise ValueError(f"{name}={value!r}: expected {allowed or _integers(minimum, maximum)}")
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


def wrong_return(owner: object, method: str, value: object, expected: str, of: str = "") -> ValueError:
    """What is raised where a method of `owner`, an object, gave something else than is asked of it. of: whom it was
    asked about; "" where that says nothing.
    """
    about = f" of {of}" if of else ""
    return ValueError(f"{type(owner).__name__}.{method} gave {value!r}{about}: expected {expected}")


def given_bool(owner: object, method: str, value: object) -> bool:
    """What a method returned, true or false; NumPy's too, as Python's."""
    if not isinstance(value, bool | np.bool_):
        raise wrong_return(owner, method, value, "True or False")
    return bool(value)


def given_int(
    owner: object, method: str, value: object, minimum: int, maximum: int | None = None, *, unit: str = ""
) -> int:
    """What a method returned, an integer in [minimum, maximum], NumPy's too, as Python's. unit: of what it counts."""
    if not is_integer(value, minimum, maximum):
        expected = _integers(minimum, maximum)
        raise wrong_return(owner, method, value, f"{expected}, {unit}" if unit else expected)
    return int(value)


def given_number(owner: object, method: str, value: object, of: str = "") -> float:
    """What a method returned to be compared: a real number, as it is; infinite, or a bool, is one, NaN is none."""
    if not is_number(value):
        raise wrong_return(owner, method, value, "a number", of)
    return value


def given_key(owner: object, method: str, value: object) -> tuple[float, ...]:
    """What a method returned to be compared with others that it gives: a tuple of numbers, as it is."""
    if not isinstance(value, tuple) or not all(map(is_number, value)):
        raise wrong_return(owner, method, value, "a tuple of numbers")
    return value


def is_integer(value: object, minimum: int, maximum: int | None = None) -> TypeGuard[int]:
    """Whether it is an integer in [minimum, maximum], Python's or NumPy's, and no bool."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        return False
    return bool(value >= minimum and (maximum is None or value <= maximum))


def _integers(minimum: int, maximum: int | None) -> str:
    return f"an integer >= {minimum}" if maximum is None else f"an integer in [{minimum}, {maximum}]"


def is_number(value: object) -> TypeGuard[float]:
    """Whether it has a place among numbers. Plain ones first: of each node and request in an order this is asked."""
    if type(value) is int or type(value) is float:
        return value == value
    return isinstance(value, int | float | np.integer | np.floating | np.bool_) and bool(value == value)
