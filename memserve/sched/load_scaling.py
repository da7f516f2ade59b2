"""Scaling policies that look at how many unfinished requests the instances of each role have."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from memserve.clock import to_ns
from memserve.request import Role
from memserve.sched.scaling import Add, Change, ChangeRole, Drain, Load, Scaling, Standing
from memserve.values import require_duration, require_int, require_number

ROLES = ", ".join(Role)


@dataclass(frozen=True)
class _Team:
    """The instances of one role. full: requests that one of them is to have."""

    role: Role
    serving: list[Load]
    num_starting: int
    num_draining: int
    num_requests: int
    full: float

    @property
    def fewest(self) -> Load:
        """The instance that has the least to finish; of equals the one that came last."""
        return min(reversed(self.serving), key=lambda load: load.num_requests)

    def pressure(self, num_instances: int) -> float:
        """How full so many instances would be; 1 is full."""
        return self.num_requests / (num_instances * self.full) if num_instances else math.inf


class _ByRequests(Scaling):
    """Looks every interval_s at how many unfinished requests the instances of each role have.

    full: for each role, requests an instance is to have.
    """

    def __init__(self, full: Mapping[str, float], interval_s: float, startup_s: float, switch_s: float) -> None:
        super().__init__(startup_s, switch_s)
        self._interval_ns = to_ns(require_duration("scaling.interval_s", interval_s))
        if not self._interval_ns:
            raise ValueError(f"scaling.interval_s={interval_s!r}: expected seconds above 0")
        if not isinstance(full, Mapping) or not set(full) <= set(Role):
            raise ValueError(f"scaling.full={full!r}: expected a number of requests for each of {ROLES}")
        self._full = {
            Role(role): require_number(f"scaling.full.{role}", value, "a number > 0", minimum=0, exclusive=True)
            for role, value in full.items()
        }
        self._roles: list[Role] = []  # of the cluster

    def next_time_ns(self, last_ns: int | None) -> int | None:
        return self._interval_ns if last_ns is None else last_ns + self._interval_ns

    def begin(self, roles: Sequence[Role]) -> None:
        for role in roles:
            if role not in self._full:
                given = {str(known): number for known, number in self._full.items()}
                raise ValueError(f"scaling.full={given}: expected a number of requests for {role} too")
        self._roles = sorted(set(roles))

    def _teams(self, loads: Sequence[Load]) -> list[_Team]:
        teams = []
        for role in self._roles:
            mine = [load for load in loads if load.role == role]
            counts = [sum(load.standing == standing for load in mine) for standing in Standing]
            serving = [load for load in mine if load.standing == Standing.SERVING]
            num_requests = sum(load.num_requests for load in mine)
            teams.append(_Team(role, serving, counts[0], counts[2], num_requests, self._full[role]))
        return teams


class ByLoad(_ByRequests):
    """Adds instances of a role until nobody has more than `full` requests, and drains one where the others would have
    less than `slack` of that; the rule of horizontal autoscalers. At most max_instances in all, at least one of a role.
    """

    def __init__(
        self,
        full: Mapping[str, float],
        max_instances: int,
        slack: float = 0.7,
        interval_s: float = 1.0,
        startup_s: float = 0.0,
    ) -> None:
        super().__init__(full, interval_s, startup_s, 0.0)
        self._max_instances = require_int("scaling.max_instances", max_instances, 1)
        self._slack = require_number("scaling.slack", slack, "a number in (0, 1]", minimum=0, maximum=1, exclusive=True)

    def begin(self, roles: Sequence[Role]) -> None:
        super().begin(roles)
        if len(roles) > self._max_instances:
            raise ValueError(
                f"scaling.max_instances={self._max_instances}: expected at least the {len(roles)} of cluster.roles"
            )

    @property
    def most_instances(self) -> int | None:
        return self._max_instances

    def changes(self, loads: Sequence[Load], now_ns: int) -> list[Change]:
        changes, num_free = list[Change](), self._max_instances - len(loads)
        for team in self._teams(loads):
            num_here = len(team.serving) + team.num_starting
            num_wanted = max(1, -int(-team.num_requests // team.full))
            num_added = min(max(num_wanted - num_here, 0), max(num_free, 0))
            changes += [Add(team.role)] * num_added
            num_free -= num_added
            is_steady = not (num_added or team.num_starting or team.num_draining)
            if is_steady and len(team.serving) > 1 and team.pressure(len(team.serving) - 1) < self._slack:
                changes.append(Drain(team.fewest.label))
        return changes


class SwitchRoles(_ByRequests):
    """As many instances as there are, of which one changes its role when the other one is full: when the instances of a
    role have more than `full` requests each, and those of another would, without one of them, have less than `slack` of
    theirs. One at a time.
    """

    def __init__(
        self, full: Mapping[str, float], slack: float = 0.7, interval_s: float = 1.0, switch_s: float = 0.0
    ) -> None:
        super().__init__(full, interval_s, 0.0, switch_s)
        self._slack = require_number("scaling.slack", slack, "a number in (0, 1]", minimum=0, maximum=1, exclusive=True)

    def begin(self, roles: Sequence[Role]) -> None:
        super().begin(roles)
        if len(set(roles)) < 2:
            raise ValueError(f"scaling=SwitchRoles with cluster.roles={[str(r) for r in roles]}: expected two roles")

    def changes(self, loads: Sequence[Load], now_ns: int) -> list[Change]:
        if any(load.standing != Standing.SERVING for load in loads):
            return []
        teams = self._teams(loads)
        for needy in teams:
            if needy.pressure(len(needy.serving)) > 1:
                for donor in teams:
                    num_left = len(donor.serving) - 1
                    if donor is not needy and num_left and donor.pressure(num_left) < self._slack:
                        return [ChangeRole(donor.fewest.label, needy.role)]
        return []
