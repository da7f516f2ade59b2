"""Classes: kinds of requests in one workload, each with a share of its sessions, a priority and objectives of its own.

A session's class is drawn from the seed and its place in order, by random numbers that nothing else is drawn by: with
classes a workload has the sessions, arrivals and tokens that it has without. What a file says of a line's class or
priority goes before what is drawn. Knows no session.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from memserve.clock import LONGEST_S
from memserve.request import require_priority
from memserve.values import require_number

OBJECTIVES = ("ttft_s", "tpot_s", "itl_s", "jct_s")  # as those of `slo`
_KEYS = ("name", "share", "priority", *OBJECTIVES)
_STREAM = 0x636C6173  # of random numbers


@dataclass(frozen=True)
class RequestClass:
    """share: of the sessions, of which all requests are of the class.  priority: of these.

    objectives: by name, in seconds; None: any will do. What is not named is as `slo` says.
    """

    name: str
    share: float
    priority: int = 0
    objectives: Mapping[str, float | None] = field(default_factory=dict)


def request_classes(given: object) -> tuple[RequestClass, ...]:
    """The classes that a list of mappings describes, with `name` and `share` and, where they are not the defaults,
    `priority`, `ttft_s`, `tpot_s`, `itl_s`, `jct_s`. Raises ValueError naming what is wrong of which and what is
    allowed.
    """
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise ValueError(f"workload.classes={given!r}: expected a list of mappings with {', '.join(_KEYS)}")
    classes = tuple(_class_of(f"workload.classes[{number}]", each) for number, each in enumerate(given))
    repeated = [name for name, count in Counter(c.name for c in classes).items() if count > 1]
    if repeated:
        raise ValueError(f"workload.classes: name={repeated[0]!r} of more than one: expected names that differ")
    total = sum(c.share for c in classes)
    if classes and abs(total - 1) > 1e-6:
        raise ValueError(f"workload.classes: shares that add up to {total:g}: expected 1")
    return classes


def _class_of(where: str, given: Any) -> RequestClass:
    if not isinstance(given, Mapping):
        raise ValueError(f"{where}={given!r}: expected a mapping with {', '.join(_KEYS)}")
    unknown = [key for key in given if key not in _KEYS]
    if unknown:
        raise ValueError(f"{where}.{unknown[0]}={given[unknown[0]]!r}: expected one of {', '.join(_KEYS)}")
    name = given.get("name")
    if not isinstance(name, str) or not name:
        raise ValueError(f"{where}.name={name!r}: expected a word")
    share = require_number(f"{where}.share", given.get("share"), "a number in [0, 1]", minimum=0.0, maximum=1.0)
    priority = require_priority(f"{where}.priority", given.get("priority", 0))
    objectives = {key: _objective(f"{where}.{key}", given[key]) for key in OBJECTIVES if key in given}
    return RequestClass(name, share, priority, objectives)


def _objective(name: str, value: object) -> float | None:
    if value is None:
        return None
    allowed = f"null or seconds in (0, {LONGEST_S:g}]"
    return require_number(name, value, allowed, minimum=0.0, maximum=LONGEST_S, exclusive=True)


def drawn(classes: Sequence[RequestClass], num_sessions: int, seed: int) -> list[RequestClass]:
    """A class for each session, at least one class being there. More sessions leave those of the first as they were."""
    ends = np.cumsum([c.share for c in classes])
    rows = np.searchsorted(ends, np.random.default_rng((seed, _STREAM)).random(num_sessions) * ends[-1], side="right")
    return [classes[row] for row in rows]
