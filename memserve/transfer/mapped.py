"""Mapped: a transport between processes of one host. One-sided: the sender writes into the receiver's memory.

Each process publishes where its memory is, shared by the host's means or by CUDA's; a sender maps a peer's once, and a
thread of its own copies, on a GPU on a stream of its own, so that nobody waits in `post`. The receiver takes no part,
even stopped. Knows no KV. Linux only, as the shared memory is.

    prepare: map the peers
    post -> queue -> [thread: map the peer if it came later, copy piece by piece] -> poll

A dead peer's host memory stays while it is mapped here: moves to it go on to arrive, and reach nobody. What a write to
a dead process's GPU memory does is not defined: before each piece the process is looked for, and what fails
nevertheless is told by name. A GPU's memory that is shared is not freed before all that map it have unmapped it, or
have ended.
"""

import os
import queue
import threading
import traceback
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.distributed_c10d import Store

from memserve.clock import monotonic_ns, to_ns
from memserve.transfer.block_copy import as_bytes, copy_rows
from memserve.transfer.device import Device, Gpu, NoDevice
from memserve.transfer.directory import Directory, Endpoint, Memory
from memserve.transfer.liveness import started_at
from memserve.transfer.shared_memory import SharedHandle, handle_of, host_id, reserve
from memserve.transfer.transport import Arrived, Move, MoveId, Transport

_PAGE_BYTES = 4096
_PAUSE_S = 2e-3
_LEAVING_S = 5.0  # for peers that close at the same time; what they still map then is kept in the background


class PeerMemoryFailed(RuntimeError):
    """A peer's GPU memory could not be mapped or written to."""


@dataclass(frozen=True)
class _Posted:
    """written: what the source's device had been given to do before."""

    move_id: MoveId
    move: Move
    written: torch.cuda.Event | None


class Mapped(Transport):
    """One process's end. store: reached by all processes of the transport. A process attaches one endpoint.

    gpu: the number of the one on which this process's memory may lie, beside the host's.  device: another kind of
    device, in its place. Moves arrive in the order in which they were posted. `close` ends the thread; memory of a GPU
    is kept until no peer maps it.
    """

    within_host = True

    def __init__(self, store: Store, *, gpu: int | None = None, device: Device | None = None) -> None:
        self._directory = Directory(store, "mapped")
        self._device = device or (NoDevice() if gpu is None else Gpu(gpu))
        self._own: int | None = None
        self._memories: dict[int, list[torch.Tensor | None]] = {}  # of this endpoint, and of those that it writes to
        self._gone: set[int] = set()
        self._reached: set[int] = set()  # peers whose memory this device can write to
        self._visited: set[int] = set()  # peers whose GPU memory is mapped here
        self._posted: queue.SimpleQueue[_Posted | None] = queue.SimpleQueue()
        self._arrived: deque[Arrived] = deque()
        self._lock = threading.Lock()  # held while a piece is copied, and while what may be copied changes
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="mapped", daemon=True)
        self._thread.start()

    def attach(self, endpoint: int, memories: Sequence[torch.Tensor | None]) -> None:
        """Raises ValueError for memory that is not shared, and MemoryError where its pages cannot be had."""
        if self._own is not None:
            raise ValueError(f"endpoint {endpoint}: this process is endpoint {self._own} already")
        published = [self._published(endpoint, number, memory) for number, memory in enumerate(memories)]
        self._memories[endpoint] = list(memories)
        pid = os.getpid()
        self._directory.publish(endpoint, Endpoint(host_id(), pid, published, started=started_at(pid)))
        self._own = endpoint

    def prepare(self, endpoints: Sequence[int], limit_s: float) -> None:
        """Maps them: of a large memory that takes seconds. Who cannot be reached is told who posts to it."""
        assert self._own is not None, "who prepares is attached"
        until_ns, pause = monotonic_ns() + to_ns(limit_s), threading.Event()
        for endpoint in endpoints:
            while not self.knows(endpoint) and monotonic_ns() < until_ns:
                pause.wait(_PAUSE_S)
            if self.knows(endpoint):
                with suppress(ValueError):
                    self._check_reach(endpoint, self._own)
                    self._map(endpoint)

    def knows(self, endpoint: int) -> bool:
        return endpoint not in self._gone and self._directory.knows(endpoint)

    def detach(self, endpoint: int) -> None:
        with self._lock:
            self._gone.add(endpoint)
            self._unmap(endpoint)

    def post(self, move_id: MoveId, move: Move, ready_ns: int) -> None:
        """Copies as soon as the device has done what the calling thread has given it: ready_ns has passed.

        Raises ValueError for a target that is not attached, on another host or on a GPU that this one does not reach,
        for rows outside of a memory, and once this end is closed or detached.
        """
        if self._own is None or self._own in self._gone:
            raise ValueError(f"a move from endpoint {move.source[0]}: expected this process to be attached")
        self._directory.check(move, self._own)
        if move.target[0] not in self._reached:
            self._check_reach(move.target[0], self._own)
        self._posted.put(_Posted(move_id, move.expanded(), self._device.side.mark()))

    def poll(self, endpoint: int, now_ns: int) -> list[Arrived]:
        """Raises what ended the copying thread, if anything has; the death of a peer whose memory is the host's does
        not, and PeerMemoryFailed may come of the death of one on a GPU.
        """
        assert endpoint == self._own, f"endpoint {endpoint} is polled by {self._own}"
        if self._failure is not None:
            raise self._failure
        return [self._arrived.popleft().later_by(self.offset_ns) for _ in range(len(self._arrived))]

    def next_time_ns(self) -> int | None:
        """None: on the machine's own clock nobody knows."""
        return None

    def close(self) -> None:
        own = [] if self._own is None else self._memories.get(self._own, [])
        if self._own is not None:
            self.detach(self._own)
        self._posted.put(None)
        self._thread.join()
        for endpoint in list(self._visited):
            self.detach(endpoint)
        if self._own is not None and self._directory.find(self._own).is_on_device:
            keeper = threading.Thread(target=self._keep_until_unmapped, args=(own,), name="mapped keeper", daemon=True)
            keeper.start()
            keeper.join(_LEAVING_S)

    def _keep_until_unmapped(self, memories: list[torch.Tensor | None]) -> None:
        assert self._own is not None, "its memories are attached"
        pause = threading.Event()
        with suppress(RuntimeError):  # the store is gone: everybody is ending
            self._directory.shut(self._own)
            while self._directory.visitors(self._own):
                pause.wait(_PAUSE_S)
        memories.clear()

    def _check_reach(self, endpoint: int, own: int) -> None:
        peer, host = self._directory.find(endpoint), self._directory.find(own).host
        if peer.host != host:
            raise ValueError(
                f"endpoint {endpoint} is on host {peer.host!r}, this one on {host!r}: expected transport=gloo"
            )
        for memory in peer.memories:
            if memory.on_device is not None:
                try:
                    self._device.check(memory.on_device)
                except ValueError as error:
                    raise ValueError(f"endpoint {endpoint}: {error}, or transport=gloo") from error
        self._reached.add(endpoint)

    def _run(self) -> None:
        while (posted := self._posted.get()) is not None:
            begun_ns = monotonic_ns()
            try:
                self._map(posted.move.target[0])
                self._copy(posted)
            except Exception as error:  # whoever polls is told
                _forget_memories(error)
                self._failure = error
                return
            if posted.move.source[0] not in self._gone:
                self._arrived.append(Arrived(posted.move_id, begun_ns, monotonic_ns()))

    def _copy(self, posted: _Posted) -> None:
        """Piece by piece, until the last or until an end is gone."""
        rows_at_once = max(1, self._device.piece_bytes // posted.move.row_bytes)
        for start in range(0, len(posted.move.source_rows), rows_at_once):
            with self._lock:
                if not self._copy_piece(posted, slice(start, start + rows_at_once)):
                    return

    def _copy_piece(self, posted: _Posted, rows: slice) -> bool:
        """Done when it returns. False where an end is gone, or has no memory behind its rows."""
        move, peer = posted.move, posted.move.target[0]
        source, target = (
            self._memories[endpoint][memory] if endpoint in self._memories else None
            for endpoint, memory in (move.source, move.target)
        )
        if source is None or target is None or (peer in self._visited and not self._directory.is_running(peer)):
            return False
        try:
            with self._device.side.after(posted.written):
                copy_rows(source, move.source_rows[rows], target, move.target_rows[rows], move.row_bytes)
        except RuntimeError as error:
            if peer not in self._visited:
                raise
            raise self._failed(peer, error) from error
        return True

    def _map(self, endpoint: int) -> None:
        """Maps a peer's memories before the first move to it. Of one that is gone or has closed there are none."""
        if endpoint in self._memories or endpoint in self._gone:
            return
        memories = self._opened(endpoint)
        with self._lock:
            self._memories[endpoint] = memories
            if endpoint in self._gone:
                memories.clear()
                self._unmap(endpoint)

    def _unmap(self, endpoint: int) -> None:
        """The memories go with the last who knows them; then their owner is told."""
        self._memories.pop(endpoint, None)
        if endpoint in self._visited:
            assert self._own is not None, "who maps a peer's memory is attached"
            self._visited.remove(endpoint)
            with suppress(RuntimeError):  # the store is gone: everybody is ending
                self._directory.leave(endpoint, self._own)

    def _opened(self, endpoint: int) -> list[torch.Tensor | None]:
        peer = self._directory.find(endpoint)
        nothing: list[torch.Tensor | None] = [None] * len(peer.memories)
        if peer.is_on_device:
            assert self._own is not None, "who posts is attached"
            if not self._directory.enter(endpoint, self._own):
                return nothing
            self._visited.add(endpoint)
        try:
            return [self._device.open(m.on_device) if m.on_device else _attached(peer.pid, m) for m in peer.memories]
        except (FileNotFoundError, ProcessLookupError):
            return nothing
        except RuntimeError as error:
            if self._directory.is_running(endpoint):
                raise self._failed(endpoint, error) from error
            return nothing

    def _failed(self, endpoint: int, error: RuntimeError) -> PeerMemoryFailed:
        state = "runs" if self._directory.is_running(endpoint) else "has ended"
        pid = self._directory.find(endpoint).pid
        return PeerMemoryFailed(f"memory of endpoint {endpoint}, whose process {pid} {state}: {error}")

    def _published(self, endpoint: int, number: int, memory: torch.Tensor | None) -> Memory:
        """What the others need to map a memory of this process; all pages of a host's are taken now."""
        if memory is None:
            return Memory(-1)
        if not memory.numel():
            return Memory(0)
        if self._device.holds(memory):
            shared = self._device.share(memory)
            return Memory(shared.num_bytes, on_device=shared)
        handle = handle_of(memory)
        if handle is None:
            raise ValueError(
                f"memory {number} of endpoint {endpoint} on {memory.device}: expected all of a SharedMemory"
            )
        reserve(handle)
        return Memory(handle.num_bytes, handle.fd, Path(f"/dev/fd/{handle.fd}").stat().st_ino)


def _forget_memories(error: BaseException | None) -> None:
    """What was copied when it was raised is not kept by it: a peer is told once its memory is unmapped here."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__


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
