"""Wire: the process groups that carry one directed pair's moves, and what is said on them. Knows no thread.

A pair is a sender (rank 0) and a receiver (rank 1). What announces a move, and what acknowledges it, goes over a gloo
group of its own; its bytes go over `channels` others, call after call in turn:

    sender   -> announcement (seq, memory, rows, calls) -> calls, in order -> ... acknowledgement (seq)
    receiver <- announcement <- calls into the rows that it names <- ... acknowledgement, once all bytes are in place
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol, cast

import numpy as np
import torch
from torch.distributed.distributed_c10d import PrefixStore, ProcessGroupGloo, Store, Work

from memserve.transfer.block_copy import are_neighbours, as_bytes
from memserve.transfer.transport import Move

SENDER, RECEIVER = 0, 1
NO_LIMIT = timedelta(days=20)  # gloo and the store count milliseconds in 32 bits; a limit that passes closes a pair
_AT_ONCE = timedelta(milliseconds=1)
_ANNOUNCE, _ROWS, _CALL, _ACKNOWLEDGE, _NEVER_SENT = range(5)  # tags
_HEADER = 6  # seq, memory, row_bytes, rows, calls, packed
_INLINE = 512 - _HEADER  # int64 that fit into an announcement; more follow in a message of their own
PIECE_BYTES = 1 << 20  # of a packed call, so that gathering, the wire and scattering overlap


class CallGroup(Protocol):
    """What is used of a process group. c10d's own stubs do not say that its backends have these."""

    def send(self, tensors: list[torch.Tensor], peer: int, tag: int) -> Work: ...

    def recv(self, tensors: list[torch.Tensor], peer: int, tag: int) -> Work: ...


class WireBroken(Exception):
    """The pair was closed at one of its ends, or the other end's process is gone."""


@contextmanager
def _breaking() -> Iterator[None]:
    """c10d tells no more than a RuntimeError; around its calls alone that means a broken wire."""
    try:
        yield
    except RuntimeError as error:
        raise WireBroken(str(error)) from error


@dataclass(frozen=True)
class Announcement:
    """What the receiver needs of a move. target_rows, call_starts: int64, as in Move."""

    seq: int
    memory: int
    row_bytes: int
    target_rows: np.ndarray
    call_starts: np.ndarray
    packed: bool

    @staticmethod
    def of(seq: int, move: Move) -> "Announcement":
        return Announcement(seq, move.target[1], move.row_bytes, move.target_rows, move.call_starts, move.packed)

    def calls(self) -> Iterator[slice]:
        """The rows of each call, the same at both ends; a packed one in pieces."""
        num_rows = len(self.target_rows)
        starts = self.call_starts.tolist()
        if self.packed:
            starts = list(range(0, num_rows, max(1, PIECE_BYTES // self.row_bytes)))
        if num_rows:
            yield from map(slice, starts, [*starts[1:], num_rows])


class GlooCarrier:
    """Makes and ends groups of the kind that carries bytes.  device: of the tensors that they take."""

    device = torch.device("cpu")

    def open(self, store: Store, rank: int, patience: timedelta) -> CallGroup:
        """Waits for the other rank. Raises WireBroken when it does not come in time."""
        with _breaking():
            return cast(CallGroup, ProcessGroupGloo(store, rank, 2, patience))

    def send(self, group: CallGroup, data: torch.Tensor, peer: int, tag: int) -> Work:
        """Begins a call. data: contiguous, unchanged until the call is finished. Raises WireBroken."""
        with _breaking():
            return group.send([data], peer, tag)

    def receive(self, group: CallGroup, data: torch.Tensor, peer: int, tag: int) -> Work:
        """Begins the other half of a call. Raises WireBroken."""
        with _breaking():
            return group.recv([data], peer, tag)

    def finish(self, work: Work) -> None:
        """Waits until a call is complete. Raises WireBroken."""
        with _breaking():
            work.wait(NO_LIMIT)

    def close(self, group: CallGroup, rank: int) -> None:
        """Ends a group at once and at both ends, whoever waits in it: a limit that passes is how gloo does that."""
        try:
            group.recv([torch.empty(1, dtype=torch.uint8)], 1 - rank, _NEVER_SENT).wait(_AT_ONCE)
        except RuntimeError:
            return
        raise AssertionError("nobody sends with this tag")


class Wire:
    """One end of a directed pair. Calls wait without a limit; each raises WireBroken once the pair is closed."""

    def __init__(
        self, carrier: GlooCarrier, store: Store, name: str, rank: int, channels: int, patience: timedelta
    ) -> None:
        self.carrier = carrier
        self._rank, self._peer = rank, 1 - rank
        self._gloo = GlooCarrier()
        self._data: list[CallGroup] = []
        self._control = self._gloo.open(PrefixStore(f"{name}/control", store), rank, patience)
        try:
            for channel in range(channels):
                self._data.append(carrier.open(PrefixStore(f"{name}/{channel}", store), rank, patience))
        except WireBroken:
            self.close()
            raise

    def close(self) -> None:
        """Ends the pair for both of its ends; nothing is read or written here by it from now on."""
        for group in self._data:
            self.carrier.close(group, self._rank)
        self._gloo.close(self._control, self._rank)

    def announce(self, said: Announcement) -> None:
        """Sends an announcement."""
        per_row = len(said.call_starts) == len(said.target_rows)  # the receiver knows where those calls begin
        rest = np.concatenate([said.target_rows, *([] if per_row else [said.call_starts])]).astype(np.int64)
        message = np.zeros(_HEADER + _INLINE, np.int64)
        message[:_HEADER] = (
            said.seq, said.memory, said.row_bytes, len(said.target_rows), len(said.call_starts), said.packed
        )  # fmt: skip
        message[_HEADER : _HEADER + min(len(rest), _INLINE)] = rest[:_INLINE]
        self._say(message, _ANNOUNCE)
        if len(rest) > _INLINE:
            self._say(rest[_INLINE:], _ROWS)

    def hear(self) -> Announcement:
        """Waits for the next announcement."""
        message = self._listen(_HEADER + _INLINE, _ANNOUNCE)
        seq, memory, row_bytes, num_rows, num_calls, packed = message[:_HEADER].tolist()
        length = num_rows + (0 if num_calls == num_rows else num_calls)
        rest = message[_HEADER:][:length]
        if length > _INLINE:
            rest = np.concatenate([rest, self._listen(length - _INLINE, _ROWS)])
        starts = np.arange(num_rows) if num_calls == num_rows else rest[num_rows:]
        return Announcement(seq, memory, row_bytes, rest[:num_rows], starts, bool(packed))

    def acknowledge(self, seq: int) -> None:
        self._say(np.array([seq]), _ACKNOWLEDGE)

    def await_acknowledgement(self) -> int:
        """The number of the move whose bytes are all in place."""
        return int(self._listen(1, _ACKNOWLEDGE)[0])

    def send(self, call: int, data: torch.Tensor) -> Work:
        """Begins the move's call number `call`. data: uint8 [n] on the carrier's device."""
        return self.carrier.send(self._data[call % len(self._data)], data, self._peer, _CALL)

    def receive(self, call: int, data: torch.Tensor) -> Work:
        """Begins to take the move's call number `call` into `data`, as `send` has it."""
        return self.carrier.receive(self._data[call % len(self._data)], data, self._peer, _CALL)

    def in_place(self, memory: torch.Tensor, rows: np.ndarray, row_bytes: int) -> torch.Tensor | None:
        """The bytes of rows that lie side by side where the carrier takes them; None for those to be staged."""
        if memory.device.type != self.carrier.device.type or not are_neighbours(rows):
            return None
        return as_bytes(memory)[int(rows[0]) * row_bytes : (int(rows[0]) + len(rows)) * row_bytes]

    def staging(self, memory: torch.Tensor, num_bytes: int) -> torch.Tensor:
        """A buffer that the carrier takes, uint8 [num_bytes]; page-locked between a device and the host."""
        pinned = self.carrier.device.type == "cpu" and memory.device.type == "cuda"
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.carrier.device, pin_memory=pinned)

    def _say(self, words: np.ndarray, tag: int) -> None:
        self._gloo.finish(self._gloo.send(self._control, torch.from_numpy(words), self._peer, tag))

    def _listen(self, num_words: int, tag: int) -> np.ndarray:
        words = torch.empty(num_words, dtype=torch.int64)
        self._gloo.finish(self._gloo.receive(self._control, words, self._peer, tag))
        heard: np.ndarray = words.numpy()
        return heard
