"""Ports: who is on the wire, and how fast, where flows share ports of one bandwidth. Knows no bytes and no endpoints.

    add -> ready -> waits for the flow before it in its lane -> under way, at a speed -> ended

A port is a network card's way out, or its way in. Flows under way share each port's bandwidth fairly (max-min): what
one cannot use, since its other port is busier or since it waits for the latency of its calls, the others have. Flows
of one lane, which is a sender and a receiver, follow each other. Speeds change only when a flow begins or ends, so that
results do not depend on when anybody looks.
"""

import heapq
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(eq=False)
class Flow(Generic[T]):
    """what: it carries.  lane: whose flows follow each other.  ports: that it goes through.

    alone_ns: it takes where nobody else is.  demand: the share of a port's bandwidth that it uses then, 0 to 1; the
    rest of its time is latency, in which others may send.
    """

    what: T
    lane: Hashable
    ports: Sequence[Hashable]
    alone_ns: int
    demand: float
    number: int = 0
    begun_ns: int = 0
    ends_ns: int = 0
    is_cancelled: bool = False
    _left_ns: float = 0.0  # of alone_ns
    _speed: float = 0.0
    _since_ns: int = 0

    def begin(self, now_ns: int) -> None:
        """It is under way, and stands still until it gets a speed."""
        self.begun_ns = self._since_ns = now_ns
        self._left_ns, self._speed = float(self.alone_ns), 0.0

    def go_on(self, speed: float, now_ns: int) -> None:
        """speed: 1 as if it were alone."""
        if speed != self._speed:
            self._left_ns -= self._speed * (now_ns - self._since_ns)
            self._speed, self._since_ns = speed, now_ns
            self.ends_ns = now_ns + max(0, round(self._left_ns / speed))


class _Levels:
    """What each port has left for each flow that waits for a share of it; of many ports, the one with least."""

    def __init__(self, flows: Sequence[Flow[T]]) -> None:
        self._through: defaultdict[Hashable, list[int]] = defaultdict(list)  # by their places in `flows`
        for i, flow in enumerate(flows):
            for port in flow.ports:
                self._through[port].append(i)
        self._free = dict.fromkeys(self._through, 1.0)
        self._num_waiting = {port: len(places) for port, places in self._through.items()}
        self._levels = {port: 1.0 / count for port, count in self._num_waiting.items()}
        self._heap = [(level, number, port) for number, (port, level) in enumerate(self._levels.items())]
        self._num_pushed = len(self._heap)
        heapq.heapify(self._heap)

    def lowest(self) -> float:
        """The least that any port has left for each."""
        while self._levels.get(self._heap[0][2]) != self._heap[0][0]:  # it has changed since
            heapq.heappop(self._heap)
        return self._heap[0][0]

    def through_lowest(self) -> list[int]:
        """The flows through the ports that have no more than that."""
        places, level = [], self.lowest()
        while self._heap and self._heap[0][0] == level:
            port = heapq.heappop(self._heap)[2]
            places += self._through[port] if self._levels.get(port) == level else []
        return places

    def settle(self, ports: Sequence[Hashable], share: float) -> None:
        """A flow through these has got its share, and waits no longer."""
        for port in ports:
            self._free[port] -= share
            self._num_waiting[port] -= 1
            self._levels.pop(port)
            if count := self._num_waiting[port]:
                self._num_pushed += 1
                self._levels[port] = self._free[port] / count
                heapq.heappush(self._heap, (self._levels[port], self._num_pushed, port))


def fair_shares(flows: Sequence[Flow[T]]) -> list[float]:
    """The share of its ports' bandwidth that each flow gets: max-min fair, and no more than it demands."""
    if len(flows) == 1:
        return [flows[0].demand]
    shares, levels = [0.0] * len(flows), _Levels(flows)
    waiting, by_demand = set(range(len(flows))), deque(sorted(range(len(flows)), key=lambda i: flows[i].demand))
    while waiting:
        level, modest = levels.lowest(), set[int]()
        while by_demand and flows[by_demand[0]].demand <= level:
            modest.add(by_demand.popleft())
        settled = modest & waiting or waiting.intersection(levels.through_lowest())
        for i in sorted(settled):
            shares[i] = min(level, flows[i].demand)
            levels.settle(flows[i].ports, shares[i])
        waiting -= settled
    return shares


class Ports(Generic[T]):
    """The flows of some ports. Times are those of the caller, who never goes back."""

    def __init__(self) -> None:
        self._now_ns = 0  # of the last change of speeds
        self._num_added = 0
        self._coming: list[tuple[int, int, Flow[T]]] = []  # a heap by (when it is ready, number)
        self._lanes: defaultdict[Hashable, deque[Flow[T]]] = defaultdict(deque)  # who is first is under way
        self._under_way: list[Flow[T]] = []
        self._next: tuple[int, int, int, Flow[T]] | None = None  # when, 0 for an end and 1 for a beginning, number
        self._has_cancelled = False

    def add(self, flow: Flow[T], ready_ns: int) -> None:
        """A flow that begins at ready_ns or, where that is past for these ports, now."""
        self._num_added += 1
        flow.number, begins_ns = self._num_added, max(ready_ns, self._now_ns)
        heapq.heappush(self._coming, (begins_ns, flow.number, flow))
        event = (begins_ns, 1, flow.number, flow)
        self._next = event if self._next is None else min(self._next, event)

    def cancel(self, which: Callable[[T], bool]) -> None:
        """Those of the flows that carry such a thing stop with the next `run`."""
        for flow in self.flows():
            flow.is_cancelled |= which(flow.what)
        self._next, self._has_cancelled = self._find_next(), True

    def run(self, until_ns: int) -> list[Flow[T]]:
        """Lets time pass up to and with until_ns; the flows that have ended, in order, those cancelled too."""
        ended = []
        while self._next is not None and self._next[0] <= until_ns:
            time_ns, begins, _, flow = self._next
            self._now_ns = max(self._now_ns, time_ns)
            if begins:
                heapq.heappop(self._coming)
                self._arrive(flow)
            else:
                ended.append(flow)
                self._end([flow])
            self._next = self._find_next()
        return ended + self._stop_cancelled(until_ns) if self._has_cancelled else ended

    def _stop_cancelled(self, now_ns: int) -> list[Flow[T]]:
        cancelled, self._has_cancelled = [flow for flow in self._under_way if flow.is_cancelled], False
        if cancelled:
            self._now_ns = max(self._now_ns, now_ns)
            self._end(cancelled)
            self._next = self._find_next()
        return cancelled

    @property
    def next_event(self) -> tuple[int, T] | None:
        """When the next flow begins or ends, of those not cancelled, and what it carries."""
        return None if self._next is None else (self._next[0], self._next[3].what)

    def flows(self) -> Iterable[Flow[T]]:
        """All that have not ended."""
        yield from (entry[2] for entry in self._coming)
        for lane in self._lanes.values():
            yield from lane

    def clear(self) -> None:
        """Forgets all flows."""
        self._coming.clear()
        self._lanes.clear()
        self._under_way.clear()
        self._next = None

    def _find_next(self) -> tuple[int, int, int, Flow[T]] | None:
        """The next flow that ends or begins, of those not cancelled."""
        while self._coming and self._coming[0][2].is_cancelled:
            heapq.heappop(self._coming)
        events = [(flow.ends_ns, 0, flow.number, flow) for flow in self._under_way if not flow.is_cancelled]
        events += [(time_ns, 1, number, flow) for time_ns, number, flow in self._coming[:1]]
        return min(events, default=None)

    def _arrive(self, flow: Flow[T]) -> None:
        self._lanes[flow.lane].append(flow)
        if self._lanes[flow.lane][0] is flow:
            self._begin([flow])

    def _end(self, flows: Sequence[Flow[T]]) -> None:
        """They leave their ports; who is next in their lanes begins."""
        self._under_way = [flow for flow in self._under_way if flow not in flows]
        following = []
        for flow in flows:
            lane = self._lanes[flow.lane]
            lane.popleft()
            while lane and lane[0].is_cancelled:
                lane.popleft()
            if lane:
                following.append(lane[0])
            else:
                del self._lanes[flow.lane]
        self._begin(following, {port for flow in flows for port in flow.ports})

    def _begin(self, flows: Sequence[Flow[T]], freed: Iterable[Hashable] = ()) -> None:
        """They are under way; whoever shares a port with them, or with a port that was freed, gets a new speed."""
        for flow in flows:
            flow.begin(self._now_ns)
        self._under_way += flows
        sharing = self._sharing({*freed, *(port for flow in flows for port in flow.ports)})
        for flow, share in zip(sharing, fair_shares(sharing), strict=True):
            flow.go_on(share / flow.demand if share < flow.demand else 1.0, self._now_ns)

    def _sharing(self, ports: set[Hashable]) -> list[Flow[T]]:
        """The flows under way through these ports, and through those that they share with others."""
        sharing: list[Flow[T]] = []
        others = self._under_way
        while near := [flow for flow in others if not ports.isdisjoint(flow.ports)]:
            sharing += near
            others = [flow for flow in others if ports.isdisjoint(flow.ports)]
            ports = ports.union(*(flow.ports for flow in near))
        return sharing
