"""InProcess: a transport between endpoints of one process, in virtual time. The copies are real, their duration is the
link model's.

A move waits for its link, is copied at the moment it arrives, and is then told to the endpoint that posted it. Reading
so late on purpose: a block that was freed or overwritten too early shows in the answer.
"""

import heapq
from collections import defaultdict
from collections.abc import Sequence

import torch

from memserve.transfer.block_copy import copy_rows
from memserve.transfer.link import LinkModel
from memserve.transfer.transport import Arrived, Move, MoveId, Transport
from memserve.values import require_int


class InProcess(Transport):
    """All endpoints of one process, connected by links that are alike."""

    within_process = True

    def __init__(self, link: LinkModel) -> None:
        self.link = link
        self._memories: dict[int, list[torch.Tensor | None]] = {}
        self._taken: set[int] = set()  # numbers of all that were ever attached
        self._under_way: list[tuple[int, int, MoveId, Move, int]] = []  # a heap by time of arrival
        self._arrived: dict[int, list[Arrived]] = defaultdict(list)
        self._free_ns: dict[tuple[str, int, int], int] = {}  # when a port, or a pair's link, is free
        self._num_posted = 0

    def attach(self, endpoint: int, memories: Sequence[torch.Tensor | None]) -> None:
        if endpoint in self._taken:
            raise ValueError(f"endpoint {endpoint} is attached already: expected a number never used before")
        self._taken.add(endpoint)
        self._memories[endpoint] = list(memories)

    def knows(self, endpoint: int) -> bool:
        return endpoint in self._memories

    def detach(self, endpoint: int) -> None:
        self._memories.pop(endpoint, None)
        self._arrived.pop(endpoint, None)
        self._under_way = [entry for entry in self._under_way if entry[3].source[0] != endpoint]
        heapq.heapify(self._under_way)

    def post(self, move_id: MoveId, move: Move, ready_ns: int) -> None:
        for endpoint, memory in (move.source, move.target):
            if endpoint in self._memories and not 0 <= memory < len(self._memories[endpoint]):
                raise ValueError(f"memory {memory} of endpoint {endpoint}: it has {len(self._memories[endpoint])}")
        ports = self._ports(move)
        begun_ns = max([ready_ns, *(self._free_ns.get(port, 0) for port in ports)])
        ended_ns = begun_ns + self._duration_ns(move)
        self._free_ns.update(dict.fromkeys(ports, ended_ns))
        self._num_posted += 1
        heapq.heappush(self._under_way, (ended_ns, self._num_posted, move_id, move, begun_ns))

    def poll(self, endpoint: int, now_ns: int) -> list[Arrived]:
        while self._under_way and self._under_way[0][0] <= now_ns:
            ended_ns, _, move_id, move, begun_ns = heapq.heappop(self._under_way)
            self._copy(move)
            self._arrived[move_id[0]].append(Arrived(move_id, begun_ns, ended_ns))
        return self._arrived.pop(endpoint, [])

    def next_time_ns(self) -> int | None:
        return self._under_way[0][0] if self._under_way else None

    def close(self) -> None:
        self._memories.clear()
        self._under_way.clear()
        self._arrived.clear()

    def due_ns(self) -> dict[int, int]:
        """When to poll whom next: at once where a move has arrived that its endpoint was not told of, else when the
        first that is under way arrives.
        """
        due = {self._under_way[0][2][0]: self._under_way[0][0]} if self._under_way else {}
        return due | dict.fromkeys(self._arrived, 0)

    def _duration_ns(self, move: Move) -> int:
        takes_ns = self.link.duration_ns(move.num_calls, move.num_bytes)
        return require_int(f"duration_ns of {type(self.link).__name__}", takes_ns, 0)

    def _ports(self, move: Move) -> list[tuple[str, int, int]]:
        source, target = move.source[0], move.target[0]
        if self.link.contention:
            return [("out of", source, source), ("into", target, target)]
        return [("between", source, target)]

    def _copy(self, move: Move) -> None:
        """Moves the bytes, unless an end is gone or has none."""
        source, target = (
            self._memories[endpoint][memory] if endpoint in self._memories else None
            for endpoint, memory in (move.source, move.target)
        )
        if source is not None and target is not None:
            copy_rows(source, move.source_rows, target, move.target_rows, move.row_bytes)
