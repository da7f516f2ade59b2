"""InProcess: a transport between endpoints of one process, in virtual time. The copies are real, their duration is the
link model's.

A move waits for those before it on its way, shares ports with others (ports.py), is copied at the moment it arrives,
and is then told to the endpoint that posted it. Reading so late on purpose: a block that was freed or overwritten too
early shows in the answer.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch

from memserve.transfer.block_copy import copy_rows
from memserve.transfer.link import LinkModel, duration_ns
from memserve.transfer.ports import Flow, Ports
from memserve.transfer.transport import Arrived, Move, MoveId, Transport


class InProcess(Transport):
    """All endpoints of one process, connected by links that are alike.

    bytes_per_stored: what every byte in the memories stands for in moves: a simulation's are those of a large model's
    KV, of which little is stored.
    """

    within_process = True
    bytes_per_stored = 1

    def __init__(self, link: LinkModel) -> None:
        self.link = link
        self._memories: dict[int, list[torch.Tensor | None]] = {}
        self._taken: set[int] = set()  # numbers of all that were ever attached
        self._arrived: dict[int, list[Arrived]] = defaultdict(list)  # by who is to be told
        self._over: list[Arrived] | None = None  # kept for whoever drains them
        self._ports: Ports[tuple[MoveId, Move]] = Ports()

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
        self._ports.cancel(lambda what: what[1].source[0] == endpoint)

    def post(self, move_id: MoveId, move: Move, ready_ns: int) -> None:
        for endpoint, memory in (move.source, move.target):
            if endpoint in self._memories and not 0 <= memory < len(self._memories[endpoint]):
                raise ValueError(f"memory {memory} of endpoint {endpoint}: it has {len(self._memories[endpoint])}")
        alone_ns = self._duration_ns(move)
        demand = min(1.0, move.num_bytes / self.link.gb_per_s / alone_ns) if alone_ns else 0.0
        pair = (move.source[0], move.target[0])
        self._ports.add(Flow((move_id, move), pair, self._ports_of(*pair), alone_ns, demand), ready_ns)

    def poll(self, endpoint: int, now_ns: int) -> list[Arrived]:
        self.run(now_ns)
        return self._arrived.pop(endpoint, [])

    def run(self, until_ns: int) -> None:
        """Lets time pass: what arrives until then is copied, and is told in `poll`."""
        for flow in self._ports.run(until_ns):
            if not flow.is_cancelled:
                move_id, move = flow.what
                self._copy(move)
                arrived = Arrived(move_id, flow.begun_ns, flow.ends_ns)
                self._arrived[move_id[0]].append(arrived)
                if self._over is not None:
                    self._over.append(arrived)

    def next_time_ns(self) -> int | None:
        event = self._ports.next_event
        return None if event is None else event[0]

    @property
    def next_event(self) -> tuple[int, int] | None:
        """When the next move begins or arrives, and who has posted it."""
        event = self._ports.next_event
        return None if event is None else (event[0], event[1][0][0])

    def close(self) -> None:
        self._memories.clear()
        self._ports.clear()
        self._arrived.clear()

    def has_arrived(self, endpoint: int) -> bool:
        """Whether moves have arrived of which `endpoint`, which posted them, was not told yet."""
        return endpoint in self._arrived

    def drain_over(self) -> list[Arrived]:
        """The moves of all endpoints that have arrived since the last call, in order; none before the first one."""
        over, self._over = self._over or [], []
        return over

    def _duration_ns(self, move: Move) -> int:
        return duration_ns(self.link, move.num_calls, move.num_bytes)

    def _ports_of(self, source: int, target: int) -> list[tuple[str, int, int]]:
        """Every endpoint, which is a rank of an instance, has a port out and a port in."""
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
            row_bytes, rest = divmod(move.row_bytes, self.bytes_per_stored)
            if rest:
                raise ValueError(f"rows of {move.row_bytes} bytes: expected a multiple of {self.bytes_per_stored}, of "
                                 "which one is stored")  # fmt: skip
            move = move.expanded()
            copy_rows(source, move.source_rows, target, move.target_rows, row_bytes)
