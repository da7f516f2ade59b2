"""Mapped: a transport between processes of one host. One-sided: the sender writes into the receiver's memory.

Each process publishes where its shared memory is; a sender maps a peer's once, and a thread of its own copies, so that
nobody waits in `post`. The receiver takes no part, even stopped. A dead peer's memory stays while it is mapped here:
moves to it go on to arrive, and reach nobody. Knows no KV. Linux only, as the shared memory is.

    post -> queue -> [thread: map the peer, copy piece by piece] -> poll
"""

import os
import queue
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.distributed.distributed_c10d import Store

from memserve.clock import monotonic_ns
from memserve.transfer.block_copy import as_bytes, copy_rows
from memserve.transfer.directory import Directory, Endpoint, Memory
from memserve.transfer.shared_memory import SharedHandle, handle_of, host_id, reserve
from memserve.transfer.transport import Arrived, Move, MoveId, Transport

_PIECE_BYTES = 1 << 23  # `detach` waits for at most one piece
_PAGE_BYTES = 4096


class Mapped(Transport):
    """One process's end. store: reached by all processes of the transport. A process attaches one endpoint.

    Moves arrive in the order in which they were posted. `close` ends the thread.
    """

    def __init__(self, store: Store) -> None:
        self._directory = Directory(store, "mapped")
        self._own: int | None = None
        self._memories: dict[int, list[torch.Tensor | None]] = {}  # of this endpoint, and of those that it writes to
        self._gone: set[int] = set()
        self._posted: queue.SimpleQueue[tuple[MoveId, Move] | None] = queue.SimpleQueue()
        self._arrived: deque[Arrived] = deque()
        self._lock = threading.Lock()  # held while a piece is copied, and while what may be copied changes
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="mapped", daemon=True)
        self._thread.start()

    def attach(self, endpoint: int, memories: Sequence[torch.Tensor | None]) -> None:
        """Raises ValueError for memory that is not shared, and MemoryError where its pages cannot be had."""
        if self._own is not None:
            raise ValueError(f"endpoint {endpoint}: this process is endpoint {self._own} already")
        published = [_published(endpoint, number, memory) for number, memory in enumerate(memories)]
        self._memories[endpoint] = list(memories)
        self._directory.publish(endpoint, Endpoint(host_id(), os.getpid(), published))
        self._own = endpoint

    def knows(self, endpoint: int) -> bool:
        return endpoint not in self._gone and self._directory.knows(endpoint)

    def detach(self, endpoint: int) -> None:
        with self._lock:
            self._gone.add(endpoint)
            self._memories.pop(endpoint, None)

    def post(self, move_id: MoveId, move: Move, ready_ns: int) -> None:
        """Copies at once: ready_ns has passed on this clock. Raises ValueError for a target that is not attached or on
        another host, for rows outside of a memory, and once this end is closed or detached.
        """
        if self._own is None or self._own in self._gone:
            raise ValueError(f"a move from endpoint {move.source[0]}: expected this process to be attached")
        self._directory.check(move, self._own)
        theirs, ours = (self._directory.find(number).host for number in (move.target[0], self._own))
        if theirs != ours:
            raise ValueError(
                f"endpoint {move.target[0]} is on host {theirs!r}, this one on {ours!r}: expected transport=gloo"
            )
        self._posted.put((move_id, move))

    def poll(self, endpoint: int, now_ns: int) -> list[Arrived]:
        """Raises what ended the copying thread, if anything has; a peer's death does not."""
        assert endpoint == self._own, f"endpoint {endpoint} is polled by {self._own}"
        if self._failure is not None:
            raise self._failure
        return [self._arrived.popleft() for _ in range(len(self._arrived))]

    def next_time_ns(self) -> int | None:
        """None: on the machine's own clock nobody knows."""
        return None

    def close(self) -> None:
        if self._own is not None:
            self.detach(self._own)
        self._posted.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (posted := self._posted.get()) is not None:
            move_id, move = posted
            begun_ns = monotonic_ns()
            try:
                self._map(move.target[0])
                self._copy(move)
            except Exception as error:  # whoever polls is told
                self._failure = error
                return
            if move.source[0] not in self._gone:
                self._arrived.append(Arrived(move_id, begun_ns, monotonic_ns()))

    def _copy(self, move: Move) -> None:
        """Piece by piece, until the last or until an end is gone."""
        rows_at_once = max(1, _PIECE_BYTES // move.row_bytes)
        for start in range(0, len(move.source_rows), rows_at_once):
            rows = slice(start, start + rows_at_once)
            with self._lock:
                source, target = (
                    self._memories[endpoint][memory] if endpoint in self._memories else None
                    for endpoint, memory in (move.source, move.target)
                )
                if source is None or target is None:
                    return
                copy_rows(source, move.source_rows[rows], target, move.target_rows[rows], move.row_bytes)

    def _map(self, endpoint: int) -> None:
        """Maps a peer's memories before the first move to it. Of a process that is gone there are none."""
        if endpoint in self._memories or endpoint in self._gone:
            return
        peer = self._directory.find(endpoint)
        try:
            memories = [_attached(peer.pid, memory) for memory in peer.memories]
        except (FileNotFoundError, ProcessLookupError):
            memories = [None] * len(peer.memories)
        with self._lock:
            if endpoint not in self._gone:
                self._memories[endpoint] = memories


def _published(endpoint: int, number: int, memory: torch.Tensor | None) -> Memory:
    """What the others need to map a memory of this process, all of whose pages are taken now."""
    if memory is None:
        return Memory(-1)
    if not memory.numel():
        return Memory(0)
    handle = handle_of(memory)
    if handle is None:
        raise ValueError(f"memory {number} of endpoint {endpoint} on {memory.device}: expected all of a SharedMemory")
    reserve(handle)
    return Memory(handle.num_bytes, handle.fd, Path(f"/dev/fd/{handle.fd}").stat().st_ino)


def _attached(pid: int, memory: Memory) -> torch.Tensor | None:
    """A peer's memory, its pages in this process's table so that the first moves are as fast as the later ones.

    Raises FileNotFoundError or ProcessLookupError for a process that is gone, PermissionError for another user's.
    """
    if memory.num_bytes < 0:
        return None
    if not memory.num_bytes:
        return torch.empty(0, dtype=torch.uint8)
    path = Path(f"/proc/{pid}/fd/{memory.fd}")
    if path.stat().st_ino != memory.inode:
        raise ProcessLookupError(f"{path} is another file by now: its process is gone")
    mapped = SharedHandle(pid, memory.fd, memory.num_bytes).attach()
    as_bytes(mapped)[::_PAGE_BYTES].max()
    return mapped
