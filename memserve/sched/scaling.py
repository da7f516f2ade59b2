"""Scaling policies: which instances join and leave a running cluster, and which change their role (section 4.4).

A policy is asked when it says so (`next_time_ns`), sees what each instance has to do, and names changes; who performs
them is the cluster manager. A new policy is one class, named in the config by `scaling._target_=my_package.MyPolicy`.
The paper's cluster manager adds and removes instances without saying when. Policies that look at the load are in
load_scaling.py.
"""

import enum
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from memserve.clock import to_ns
from memserve.request import SERVING, Role
from memserve.values import require_choice, require_duration


class Standing(enum.StrEnum):
    """Of an instance that is in the cluster, or will be. Only one that is SERVING is named for new requests; one that
    is SILENT may be again.
    """

    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"
    SILENT = "silent"


@dataclass(frozen=True)
class Load:
    """An instance and what it has to do. num_requests: unfinished ones that it holds or that wait for it: those without
    a first token at a prefill instance, those with one at a decode instance.
    """

    label: str
    role: Role
    standing: Standing
    num_requests: int


@dataclass(frozen=True)
class Add:
    """A new instance of a role."""

    role: Role

    def __str__(self) -> str:
        return f"add {self.role}"


@dataclass(frozen=True)
class Drain:
    """The instance gets no new requests, finishes what it has, and leaves."""

    label: str

    def __str__(self) -> str:
        return f"drain {self.label}"


@dataclass(frozen=True)
class ChangeRole:
    """The instance drains and comes back in another role, with an empty pool, under a new name."""

    label: str
    role: Role

    def __str__(self) -> str:
        return f"switch {self.label} to {self.role}"


@dataclass(frozen=True)
class Crash:
    """The instance's process ends at once, with all it has: a fault."""

    label: str

    def __str__(self) -> str:
        return f"crash {self.label}"


Change = Add | Drain | ChangeRole | Crash


class Scaling(ABC):
    """startup_s: from the decision to add an instance until it takes requests.  switch_s: the same for one that has
    drained and comes back in another role, whose weights are there. Raises ValueError for values out of range.
    """

    startup_ns = switch_ns = 0  # of a policy with a constructor of its own

    def __init__(self, startup_s: float = 0.0, switch_s: float = 0.0) -> None:
        self.startup_ns = to_ns(require_duration("scaling.startup_s", startup_s))
        self.switch_ns = to_ns(require_duration("scaling.switch_s", switch_s))

    @abstractmethod
    def next_time_ns(self, last_ns: int | None) -> int | None:
        """When it wants to be asked next; None for never again. last_ns: when it was asked last, if it was."""

    @abstractmethod
    def changes(self, loads: Sequence[Load], now_ns: int) -> list[Change]:
        """What is to be done at now_ns, when it wanted to be asked. loads: of all instances that are in the cluster or
        will be, and serve requests, in the order in which they were named.
        """

    def begin(self, roles: Sequence[Role]) -> None:
        """The cluster begins with instances of these roles, and perhaps a store, which neither comes nor goes. Raises
        ValueError for what cannot be done to it.
        """
        return

    @property
    def most_instances(self) -> int | None:
        """Instances that there may be at a time, if it knows."""
        return None


class NoScaling(Scaling):
    """Nobody comes and nobody goes: the baseline."""

    def __init__(self) -> None:
        super().__init__()

    def next_time_ns(self, last_ns: int | None) -> int | None:
        return None

    def changes(self, loads: Sequence[Load], now_ns: int) -> list[Change]:
        return []


class Schedule(Scaling):
    """Changes at times that are given: a list of `{at_s, add: ROLE}`, `{at_s, drain: LABEL}`, `{at_s, crash: LABEL}` or
    `{at_s, switch: LABEL, to: ROLE}`, in any order.

    A label is a role and a number: `decode-1` is the second instance of the cluster; whoever is added, or comes back in
    another role, gets the next number, in the order of these changes. Raises ValueError for a change that is none.
    """

    def __init__(
        self, changes: Sequence[Mapping[str, object]] = (), startup_s: float = 0.0, switch_s: float = 0.0
    ) -> None:
        super().__init__(startup_s, switch_s)
        if isinstance(changes, str | Mapping) or not isinstance(changes, Sequence):
            raise ValueError(f"scaling.changes={changes!r}: expected a list of changes")
        timed = [_timed_change(number, change) for number, change in enumerate(changes)]
        self._timed = sorted(timed, key=lambda entry: entry[0])

    @property
    def crashes(self) -> list[Crash]:
        return [change for _, change in self._timed if isinstance(change, Crash)]

    def next_time_ns(self, last_ns: int | None) -> int | None:
        return next((time_ns for time_ns, _ in self._timed if last_ns is None or time_ns > last_ns), None)

    def changes(self, loads: Sequence[Load], now_ns: int) -> list[Change]:
        return [change for time_ns, change in self._timed if time_ns == now_ns]

    def begin(self, roles: Sequence[Role]) -> None:
        here = {f"{role}-{number}": role for number, role in enumerate(roles)}
        num_named = len(roles)
        for _, change in self._timed:
            if not isinstance(change, Add):
                role = here.pop(change.label, None)
                if role is None:
                    names = ", ".join(here)
                    raise ValueError(f"scaling.changes: {change}: expected an instance that is there then, of {names}")
                if not isinstance(change, Crash) and role not in SERVING:
                    raise ValueError(f"scaling.changes: {change}: expected an instance that serves requests")
                if not isinstance(change, Crash) and role not in here.values():
                    raise ValueError(f"scaling.changes: {change}: expected another {role} instance that stays")
            if isinstance(change, Add | ChangeRole):
                if change.role not in roles:
                    known = ", ".join(sorted(set(roles)))
                    raise ValueError(f"scaling.changes: {change}: expected a role of the cluster's, {known}")
                here[f"{change.role}-{num_named}"] = change.role
                num_named += 1


def _timed_change(number: int, given: Mapping[str, object]) -> tuple[int, Change]:
    """(nanoseconds, what) of one entry of a schedule."""
    name = f"scaling.changes[{number}]"
    kinds = {("add",), ("drain",), ("crash",), ("switch", "to")}
    words = tuple(sorted(key for key in given if key != "at_s")) if isinstance(given, Mapping) else ()
    if words not in kinds:
        raise ValueError(f"{name}={given!r}: expected at_s, and one of add, drain, crash, or switch with to")
    at_ns = to_ns(require_duration(f"{name}.at_s", given.get("at_s")))
    if words == ("add",):
        return at_ns, Add(_role(f"{name}.add", given["add"]))
    label = given[words[0]]
    if not isinstance(label, str):
        raise ValueError(f"{name}.{words[0]}={label!r}: expected the label of an instance, such as decode-1")
    if words == ("switch", "to"):
        return at_ns, ChangeRole(label, _role(f"{name}.to", given["to"]))
    return at_ns, Drain(label) if words == ("drain",) else Crash(label)


def _role(name: str, value: object) -> Role:
    return Role(require_choice(name, str(value), SERVING))
