"""Gloo: a transport between processes anywhere, two-sided: the receiver posts a receive for every call of the sender.

Every directed pair of endpoints has process groups of its own, made when the first move is posted, in the pair's own
threads: nobody waits in `post`, and no two pairs wait for each other. The sender leaves a notice in the receiver's
inbox in the store, and both then meet in groups named pair/epoch/channel. A move has arrived when its receiver says so.
The death of a peer ends its pairs, and nothing else does: no call has a time limit. Knows no KV.
"""

import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta

import numpy as np
import torch
from torch.distributed.distributed_c10d import PrefixStore, Store

from memserve.clock import monotonic_ns
from memserve.transfer.directory import Directory, Endpoint, Memory
from memserve.transfer.pair import Inlet, Outlet, PairEnd
from memserve.transfer.store import own_connection
from memserve.transfer.transport import Arrived, Move, MoveId, Transport
from memserve.transfer.wire import NO_LIMIT, RECEIVER, SENDER, GlooCarrier, Wire

_NO_ROWS = np.empty(0, dtype=np.int64)
_END = "end"
_LEAVING_S = 5.0  # for a thread to end; one that still waits for its peer to come ends later, and alone


class Gloo(Transport):
    """One process's end. store: reached by all processes of the transport. A process attaches one endpoint.

    channels: process groups over which the calls of a pair are spread, in turn.  patience_s: how long an end of a pair
    waits for the other one to come; then the sender's asks again.  host: this machine's address, as the others reach
    it; "" for what its name stands for. Moves to one peer arrive in the order in which they were posted. `close` ends
    the threads. Raises ValueError for options out of range.
    """

    def __init__(self, store: Store, *, channels: int = 1, patience_s: float = 60.0, host: str = "") -> None:
        for name, value, low in (("channels", channels, 1), ("patience_s", patience_s, 0.001)):
            if value < low:
                raise ValueError(f"{name}={value}: expected at least {low}")
        self._host = host
        self._carrier = self._make_carrier()
        self._directory = Directory(store, self._kind)
        self._store = PrefixStore(f"memserve/{self._kind}/pairs", store)
        self._channels, self._patience_s = channels, patience_s
        self._own: int | None = None
        self._memories: list[torch.Tensor | None] = []
        self._outlets: dict[int, Outlet] = {}
        self._inlets: dict[int, list[Inlet]] = {}
        self._gone: set[int] = set()
        self._lock = threading.Lock()  # of `_inlets` and `_gone`, which the listener uses too
        self._arrived: deque[Arrived] = deque()
        self._failure: Exception | None = None
        self._listener = threading.Thread(target=self._listen, name=f"{self._kind} inbox", daemon=True)

    @property
    def _kind(self) -> str:
        return "gloo"

    def _make_carrier(self) -> GlooCarrier:
        return GlooCarrier(self._host)

    def _described(self, memories: Sequence[torch.Tensor | None]) -> Endpoint:
        """What the others are told."""
        sizes = [-1 if memory is None else memory.numel() * memory.itemsize for memory in memories]
        return Endpoint("", 0, [Memory(num_bytes) for num_bytes in sizes])

    def attach(self, endpoint: int, memories: Sequence[torch.Tensor | None]) -> None:
        if self._own is not None:
            raise ValueError(f"endpoint {endpoint}: this process is endpoint {self._own} already")
        self._directory.publish(endpoint, self._described(memories))
        self._own, self._memories = endpoint, list(memories)
        self._listener.start()

    def knows(self, endpoint: int) -> bool:
        return endpoint not in self._gone and self._directory.knows(endpoint)

    def detach(self, endpoint: int) -> None:
        with self._lock:
            self._gone.add(endpoint)
            leaving: list[PairEnd] = list(self._inlets.pop(endpoint, []))
        outlet = self._outlets.pop(endpoint, None)
        for end in leaving if outlet is None else [*leaving, outlet]:
            end.close()
        if outlet is not None:
            outlet.abandon()

    def post(self, move_id: MoveId, move: Move, ready_ns: int) -> None:
        """Sends at once: ready_ns has passed on this clock. Raises ValueError for a target that is not attached, for
        rows outside of a memory, and once this end is closed or detached.
        """
        if self._own is None or self._own in self._gone:
            raise ValueError(f"a move from endpoint {move.source[0]}: expected this process to be attached")
        self._directory.check(move, self._own)
        peer, memory = move.target
        if peer in self._gone:
            now_ns = monotonic_ns()
            self._arrived.append(Arrived(move_id, now_ns, now_ns))
            return
        if self._memories[move.source[1]] is None or self._directory.find(peer).memories[memory].num_bytes < 0:
            move = replace(move, source_rows=_NO_ROWS, target_rows=_NO_ROWS, call_starts=_NO_ROWS)
        if peer not in self._outlets:
            self._outlets[peer] = self._new_outlet(self._own, peer)
        self._outlets[peer].post(move_id, move.expanded())

    def poll(self, endpoint: int, now_ns: int) -> list[Arrived]:
        """Raises what ended a thread, if anything has; a peer's death does not."""
        assert endpoint == self._own, f"endpoint {endpoint} is polled by {self._own}"
        with self._lock:
            inlets = [inlet for ends in self._inlets.values() for inlet in ends]
        for failure in (self._failure, *(end.failure for end in (*self._outlets.values(), *inlets))):
            if failure is not None:
                raise failure
        return [self._arrived.popleft().later_by(self.offset_ns) for _ in range(len(self._arrived))]

    def next_time_ns(self) -> int | None:
        """None: on the machine's own clock nobody knows."""
        return None

    def close(self) -> None:
        if self._own is None or self._own in self._gone:
            return
        with self._lock:
            self._gone.add(self._own)
            ends: list[PairEnd] = [inlet for inlets in self._inlets.values() for inlet in inlets]
        with suppress(RuntimeError):  # the store is gone: the listener has ended with it
            self._leave_notice(self._store, self._own, _END)
        for end in (*ends, *self._outlets.values()):
            end.close()
        self._listener.join(_LEAVING_S)
        for end in (*ends, *self._outlets.values()):
            end.join(_LEAVING_S)
        with suppress(RuntimeError):
            self._directory.give_back_device(self._own)

    def _new_outlet(self, own: int, peer: int) -> Outlet:
        def open_wire() -> Wire:
            store = own_connection(self._store)
            epoch = self._leave_notice(store, peer, f"{own} {self._channels}")
            return self._wire(store, f"{own}-{peer}/{epoch}", SENDER, self._channels)

        return Outlet(f"{self._kind} to {peer}", open_wire, self._memories, self._arrived)

    def _new_inlet(self, source: int, epoch: int, channels: int) -> Inlet:
        def open_wire() -> Wire:
            return self._wire(own_connection(self._store), f"{source}-{self._own}/{epoch}", RECEIVER, channels)

        return Inlet(f"{self._kind} from {source}", open_wire, self._memories)

    def _wire(self, store: Store, name: str, rank: int, channels: int) -> Wire:
        return Wire(self._carrier, store, name, rank, channels, timedelta(seconds=self._patience_s))

    def _leave_notice(self, store: Store, endpoint: int, notice: str) -> int:
        """Puts a notice into an endpoint's inbox; returns its number there."""
        number = store.add(f"inbox/{endpoint}", 1)
        store.set(f"inbox/{endpoint}/{number}", notice)
        return number

    def _listen(self) -> None:
        """Answers each sender that leaves a notice by the other end of its pair."""
        store, number = own_connection(self._store), 0
        try:
            while True:
                number += 1
                key = f"inbox/{self._own}/{number}"
                store.wait([key], NO_LIMIT)
                notice = store.get(key).decode()
                if notice == _END:
                    return
                source, channels = map(int, notice.split())
                with self._lock:
                    if source not in self._gone:
                        self._inlets.setdefault(source, []).append(self._new_inlet(source, number, channels))
        except Exception as error:  # whoever polls is told
            self._failure = error
