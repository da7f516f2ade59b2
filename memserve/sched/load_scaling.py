"""Scaling policies that look at how many unfinished requests the instances of each role have."""

import math
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from memserve.clock import LONGEST_S, to_ns
from memserve.request import SERVING, Role
from memserve.sched.scaling import Add, Change, ChangeRole, Drain, Load, Scaling, Standing
from memserve.values import require_duration, require_int, require_number

ROLES = ", ".join(SERVING)
SHORTEST_S = 0.001  # between looks
LEAST_FULL = 1e-6
MOST_INSTANCES = 2**14 - 1  # as many as addresses can name


@dataclass(frozen=True)
class _Team:
    """The instances of one role. most_lately: requests that they had at a time.  full: that one of them is to have."""

    role: Role
    serving: list[Load]
    num_starting: int
    num_draining: int
    num_requests: int
    most_lately: float
    full: float

    @property
    def fewest(self) -> Load:
        """The instance that has the least to finish; of equals the one that came last."""
        return min(reversed(self.serving), key=lambda load: load.num_requests)

    @property
    def pressure(self) -> float:
        """How full those that serve are; 1 is full."""
        return self.num_requests / (len(self.serving) * self.full) if self.serving else math.inf

    @property
    def pressure_without_one(self) -> float:
        """How full the others would have been, lately, with one less."""
        num_left = len(self.serving) - 1
        return self.most_lately / (num_left * self.full) if num_left > 0 else math.inf


class _ByRequests(Scaling):
    """Looks every interval_s at how many unfinished requests the instances of each role have.

    full: for each role, requests an instance is to have.  slack: an instance can be spared where the others would have
    had less than this share of that all of the last window_s.
    """

    def __init__(
        self,
        full: Mapping[str, float],
        slack: float,
        interval_s: float,
        window_s: float,
        startup_s: float = 0.0,
        switch_s: float = 0.0,
    ) -> None:
        super().__init__(startup_s, switch_s)
        self._slack = require_number("scaling.slack", slack, "a number in (0, 1]", minimum=0, maximum=1, exclusive=True)
        self._window_ns = to_ns(require_duration("scaling.window_s", window_s))
        allowed = f"seconds in [{SHORTEST_S:g}, {LONGEST_S:g}]"
        require_number("scaling.interval_s", interval_s, allowed, minimum=SHORTEST_S, maximum=LONGEST_S)
        self._interval_ns = to_ns(interval_s)
        if not isinstance(full, Mapping) or not set(full) <= set(SERVING):
            raise ValueError(f"scaling.full={full!r}: expected a number of requests for each of {ROLES}")
        self._full = {
            Role(role): require_number(f"scaling.full.{role}", value, f"a number >= {LEAST_FULL:g}", minimum=LEAST_FULL)
            for role, value in full.items()
        }
        self._lately: dict[Role, deque[tuple[int, float]]] = {}  # of each role: (when, requests)

    def next_time_ns(self, last_ns: int | None) -> int | None:
        return self._interval_ns if last_ns is None else last_ns + self._interval_ns

    def begin(self, roles: Sequence[Role]) -> None:
        for role in (roles := _serving(roles)):
            if role not in self._full:
                given = {str(known): number for known, number in self._full.items()}
                raise ValueError(f"scaling.full={given}: expected a number of requests for {role} too")
        self._lately = {role: deque([(0, roles.count(role) * self._full[role])]) for role in sorted(set(roles))}

    def _teams(self, loads: Sequence[Load], now_ns: int) -> list[_Team]:
        teams = []
        for role, lately in self._lately.items():
            mine = [load for load in loads if load.role == role]
            counts = Counter(load.standing for load in mine)
            serving = [load for load in mine if load.standing == Standing.SERVING]
            num_requests = sum(load.num_requests for load in mine)
            while lately and lately[-1][1] <= num_requests:
                lately.pop()  # so that the first one is the largest
            lately.append((now_ns, num_requests))
            while lately[0][0] < now_ns - self._window_ns:
                lately.popleft()
            num_starting, num_draining = counts[Standing.STARTING], counts[Standing.DRAINING]
            teams.append(_Team(role, serving, num_starting, num_draining, num_requests, lately[0][1], self._full[role]))
        return teams


def _serving(roles: Sequence[Role]) -> list[Role]:
    """Those of instances that requests go to."""
    return [role for role in roles if role in SERVING]


class ByLoad(_ByRequests):
    """Adds instances of a role until nobody has more than `full` requests, and drains one that can be spared; the rule
    of horizontal autoscalers, with their window. At most max_instances in all, at least one of a role.
    """

    def __init__(
        self,
        full: Mapping[str, float],
        max_instances: int,
        slack: float = 0.7,
        interval_s: float = 1.0,
        window_s: float = 60.0,
        startup_s: float = 0.0,
    ) -> None:
        super().__init__(full, slack, interval_s, window_s, startup_s=startup_s)
        self._max_instances = require_int("scaling.max_instances", max_instances, 1, MOST_INSTANCES)

    def begin(self, roles: Sequence[Role]) -> None:
        super().begin(roles)
        if (num_serving := len(_serving(roles))) > self._max_instances:
            raise ValueError(
                f"scaling.max_instances={self._max_instances}: expected at least the {num_serving} of cluster.roles"
            )

    @property
    def most_instances(self) -> int | None:
        return self._max_instances

    def changes(self, loads: Sequence[Load], now_ns: int) -> list[Change]:
        teams = self._teams(loads, now_ns)
        num_empty = sum(not team.serving and not team.num_starting for team in teams)
        changes, num_free = list[Change](), self._max_instances - len(loads)
        for team in sorted(teams, key=lambda team: bool(team.serving or team.num_starting)):  # the lost ones first
            if not team.serving and not team.num_starting:
                num_empty -= 1
            num_here = len(team.serving) + team.num_starting
            num_filled = max(1, math.ceil(team.num_requests / team.full))
            num_added = min(max(num_filled - num_here, 0), max(num_free - num_empty, 0))
            changes += [Add(team.role)] * num_added
            num_free -= num_added
            is_steady = not (num_added or team.num_starting or team.num_draining)
            if is_steady and team.pressure_without_one < self._slack:
                changes.append(Drain(team.fewest.label))
        return changes


class SwitchRoles(_ByRequests):
    """As many instances as there are, of which one changes its role when those of another have more than `full`
    requests each and it can be spared in its own. One at a time.
    """

    def __init__(
        self,
        full: Mapping[str, float],
        slack: float = 0.7,
        interval_s: float = 1.0,
        window_s: float = 10.0,
        switch_s: float = 0.0,
    ) -> None:
        super().__init__(full, slack, interval_s, window_s, switch_s=switch_s)

    def begin(self, roles: Sequence[Role]) -> None:
        if len(set(_serving(roles))) < 2:
            raise ValueError(f"scaling=SwitchRoles with cluster.roles={[str(r) for r in roles]}: expected two roles")
        super().begin(roles)

    def changes(self, loads: Sequence[Load], now_ns: int) -> list[Change]:
        teams = self._teams(loads, now_ns)
        if any(load.standing in (Standing.STARTING, Standing.DRAINING) for load in loads):
            return []
        for needy in teams:
            for donor in teams:
                if donor is not needy and needy.pressure > 1 and donor.pressure_without_one < self._slack:
                    return [ChangeRole(donor.fewest.label, needy.role)]
        return []
