"""Pair: the two ends of the moves from one endpoint to another, each with threads of its own. Knows no KV.

    Outlet (sender)    post -> queue -> [thread: announce, send the calls] ; [thread: acknowledgements -> arrived]
    Inlet  (receiver)  [thread: hear, receive the calls into the rows, acknowledge]

On a GPU each end has a stream of its own: its copies run beside what computes, and the sender's begin when everything
has ended that the poster's stream had been given before. The receiver's rows are idle when they are granted.

A receiver that does not come in time is asked again. Once the two have met, a pair ends when it is closed or when its
wire breaks, which only the death of the peer does; then nothing is retried.
"""

import queue
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.distributed.distributed_c10d import Work

from memserve.clock import monotonic_ns
from memserve.transfer.block_copy import as_bytes, gather_rows, scatter_rows
from memserve.transfer.side_stream import beside
from memserve.transfer.transport import Arrived, Move, MoveId
from memserve.transfer.wire import PIECE_BYTES, Announcement, Wire, WireBroken, call_offsets

_CALLS_AHEAD = 64  # calls under way whose bytes go to or from their rows
_PIECES_AHEAD = 4  # calls under way through buffers
_PAUSE_S = 0.1  # between two attempts to meet

Memories = Sequence[torch.Tensor | None]


class Staging:
    """Buffers that a carrier takes, used in turn: `_PIECES_AHEAD` of them, so that they stay in the processor's cache.

    A buffer is free again once fewer than `_PIECES_AHEAD` calls are under way.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: deque[torch.Tensor] = deque(maxlen=_PIECES_AHEAD)

    def next(self, memory: torch.Tensor, num_bytes: int) -> torch.Tensor:
        """uint8 [num_bytes]; page-locked between a device and the host."""
        full = len(self._buffers) == _PIECES_AHEAD
        if not full or self._buffers[0].numel() < num_bytes:
            pinned = self._device.type == "cpu" and memory.device.type == "cuda"
            size = max(num_bytes, PIECE_BYTES)
            self._buffers.append(torch.empty(size, dtype=torch.uint8, device=self._device, pin_memory=pinned))
        else:
            self._buffers.rotate(-1)
        return self._buffers[-1][:num_bytes]


class PairEnd(ABC):
    """What both ends share. open_wire: waits for the other end; called in this end's thread.

    memories: this endpoint's.  failure: what ended a thread, other than a broken wire.
    """

    def __init__(self, name: str, open_wire: Callable[[], Wire], memories: Memories) -> None:
        self.failure: Exception | None = None
        self._name, self._open_wire, self._memories = name, open_wire, memories
        devices = (memory.device for memory in memories if memory is not None)
        self._side = beside(next((d for d in devices if d.type == "cuda"), torch.device("cpu")))
        self._lock = threading.Lock()
        self._wire: Wire | None = None
        self._closed = threading.Event()
        self._threads: list[threading.Thread] = []
        self._start(self._run)

    def close(self) -> None:
        """Ends the pair; nothing is written to this end's rows once this returns."""
        with self._lock:
            self._closed.set()
        if self._wire is not None:
            self._wire.close()

    def join(self, limit_s: float) -> None:
        """Waits for the threads of a closed end."""
        for thread in self._threads:
            thread.join(limit_s)

    def _start(self, work: Callable[[], None]) -> None:
        self._threads.append(threading.Thread(target=self._guarded, args=(work,), name=self._name, daemon=True))
        self._threads[-1].start()

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except WireBroken:
            return
        except Exception as error:  # whoever polls is told
            self.failure = error

    def _run(self) -> None:
        wire = self._opened()
        self._staging = Staging(wire.carrier.device)
        with self._lock:
            self._wire = wire
            closed = self._closed.is_set()
        if closed:
            wire.close()
        else:
            self._serve(wire)

    def _opened(self) -> Wire:
        """Raises WireBroken where the other end does not come."""
        return self._open_wire()

    def _calls(
        self, wire: Wire, said: Announcement, memory: int, rows: np.ndarray
    ) -> Iterator[tuple[torch.Tensor | None, np.ndarray]]:
        """(bytes of the call in place, its rows) for each call; None for bytes that go through a buffer."""
        bounds = said.bounds()
        if len(bounds) < 2:
            return
        tensor = self._memory(memory)
        in_place = tensor.device.type == wire.carrier.device.type
        offsets = call_offsets(rows, bounds, said.row_bytes)
        whole_N, edges = as_bytes(tensor), bounds.tolist()  # N bytes
        for start, stop, offset in zip(edges, edges[1:], offsets, strict=False):
            direct = in_place and offset >= 0
            yield whole_N[offset : offset + (stop - start) * said.row_bytes] if direct else None, rows[start:stop]

    def _memory(self, number: int) -> torch.Tensor:
        memory = self._memories[number]
        assert memory is not None, "moves of no bytes have no calls"
        return memory

    @abstractmethod
    def _serve(self, wire: Wire) -> None:
        """The thread's work, until the wire breaks."""


@dataclass
class _Posted:
    """written: what the poster's stream had been given before."""

    move_id: MoveId
    move: Move
    begun_ns: int
    written: torch.cuda.Event | None


class Outlet(PairEnd):
    """The sender's end. arrived: where moves are told, in order, once the receiver has acknowledged them."""

    def __init__(self, name: str, open_wire: Callable[[], Wire], memories: Memories, arrived: deque[Arrived]) -> None:
        self._queue: queue.SimpleQueue[_Posted | None] = queue.SimpleQueue()
        self._unfinished: deque[_Posted] = deque()
        self._arrived = arrived
        self._under_way: deque[tuple[Work, torch.Tensor]] = deque()  # the tensors live until their calls are complete
        super().__init__(name, open_wire, memories)

    def post(self, move_id: MoveId, move: Move) -> None:
        """Queues a move. On a broken pair it stays unfinished until `abandon`."""
        posted = _Posted(move_id, move, monotonic_ns(), self._side.mark())
        self._unfinished.append(posted)
        self._queue.put(posted)

    def close(self) -> None:
        super().close()
        self._queue.put(None)

    def abandon(self) -> None:
        """After `close`: tells what was not acknowledged as over."""
        while self._unfinished:
            posted = self._unfinished.popleft()
            self._arrived.append(Arrived(posted.move_id, posted.begun_ns, monotonic_ns()))

    def _opened(self) -> Wire:
        """Asks the receiver anew until it comes: it may be stopped, and nothing was announced to it so far."""
        while True:
            try:
                return self._open_wire()
            except WireBroken:
                if self._closed.wait(_PAUSE_S):
                    raise

    def _serve(self, wire: Wire) -> None:
        self._start(lambda: self._hear_acknowledgements(wire))
        seq = 0
        while (posted := self._queue.get()) is not None:
            posted.begun_ns = monotonic_ns()
            with self._side.after(posted.written):
                self._send(wire, seq, posted.move)
            seq += 1

    def _send(self, wire: Wire, seq: int, move: Move) -> None:
        said = Announcement.of(seq, move)
        wire.announce(said)
        for number, (data, rows) in enumerate(self._calls(wire, said, move.source[1], move.source_rows)):
            self._let_finish(wire, _PIECES_AHEAD if data is None else _CALLS_AHEAD)
            if data is None:
                memory = self._memory(move.source[1])
                data = self._staging.next(memory, len(rows) * move.row_bytes)
                gather_rows(memory, rows, data, move.row_bytes)
            self._under_way.append((wire.send(number, data), data))

    def _let_finish(self, wire: Wire, limit: int) -> None:
        """Waits until fewer than `limit` calls are under way."""
        while len(self._under_way) >= limit:
            wire.carrier.finish(self._under_way.popleft()[0])

    def _hear_acknowledgements(self, wire: Wire) -> None:
        while True:
            wire.await_acknowledgement()
            with self._lock:
                if self._closed.is_set():
                    return
                posted = self._unfinished.popleft()
                self._arrived.append(Arrived(posted.move_id, posted.begun_ns, monotonic_ns()))


class Inlet(PairEnd):
    """The receiver's end. It takes what the sender announces, in that order, and acknowledges it."""

    def _serve(self, wire: Wire) -> None:
        while True:
            said = wire.hear()
            with self._side.after(None):
                self._receive(wire, said)
            wire.acknowledge(said.seq)

    def _receive(self, wire: Wire, said: Announcement) -> None:
        under_way: deque[tuple[Work, torch.Tensor | None, np.ndarray]] = deque()
        for number, (data, rows) in enumerate(self._calls(wire, said, said.memory, said.target_rows)):
            while len(under_way) >= (_PIECES_AHEAD if data is None else _CALLS_AHEAD):
                self._finish(wire, said, *under_way.popleft())
            staged = None
            if data is None:
                data = staged = self._staging.next(self._memory(said.memory), len(rows) * said.row_bytes)
            under_way.append((wire.receive(number, data), staged, rows))
        while under_way:
            self._finish(wire, said, *under_way.popleft())

    def _finish(
        self, wire: Wire, said: Announcement, work: Work, staged: torch.Tensor | None, rows: np.ndarray
    ) -> None:
        """Waits for a call, and puts what came through a buffer into its rows."""
        wire.carrier.finish(work)
        if staged is None:
            return
        with self._lock:
            if self._closed.is_set():
                raise WireBroken("closed at this end")
            scatter_rows(staged, self._memory(said.memory), rows, said.row_bytes)
