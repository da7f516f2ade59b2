"""Watch on a clock of the test's."""

import pytest

from memserve.clock import to_ns
from memserve.cluster import watch as module
from memserve.cluster.node_messages import Process
from memserve.cluster.roster import Roster
from memserve.cluster.watch import Finding, Watch

SILENCE_S = 2.0


class Clock:
    now_s = 100.0

    def __call__(self):
        return to_ns(self.now_s)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "monotonic_ns", clock)
    return clock


@pytest.fixture
def two(clock):
    """Two instances on other hosts, which are at rank 1 and 2."""
    watch = Watch(Roster([1, 1]), SILENCE_S)
    for instance in range(2):
        watch.arrived(instance, [Process(f"host {instance}", 1, 0)])
    watch.look()
    watch.begin()
    return watch


def findings(watch, clock, until_s, heard):
    """What is found until then; the ranks that are heard give a sign of life every half second."""
    found = []
    while clock.now_s < until_s:
        clock.now_s += 0.5
        for rank in heard:
            watch.heard(rank)
        found += watch.look()
    return found


def test_who_is_not_heard_for_long_is_silent(two, clock):
    assert findings(two, clock, 102, [1]) == []
    assert findings(two, clock, 103, [1]) == [(1, Finding.SILENT)]


def test_while_who_looks_stood_still_itself_nobody_was_silent(two, clock):
    findings(two, clock, 101, [1, 2])
    clock.now_s = 110  # it was stopped; what the others said meanwhile it has not read yet
    assert two.look() == []
    assert findings(two, clock, 111, [1]) == []
    assert findings(two, clock, 113, [1]) == [(1, Finding.SILENT)]
