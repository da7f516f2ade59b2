"""Wire: the process groups that carry one directed pair's moves, and what is said on them. Knows no thread.

A pair is a sender (rank 0) and a receiver (rank 1). What announces a move, and what acknowledges it, goes over a gloo
group of its own; its bytes go over `channels` others, call after call in turn:

    sender   -> announcement (seq, memory, rows, calls) -> calls, in order -> ... acknowledgement (seq)
    receiver <- announcement <- calls into the rows that it names <- ... acknowledgement, once all bytes are in place
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch.distributed.distributed_c10d import PrefixStore, ProcessGroupGloo, Store, Work

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

    def bounds(self) -> np.ndarray:
        """int64 [n + 1]: call i has rows [bounds[i], bounds[i + 1]), at both ends; a packed one goes in pieces."""
        num_rows = len(self.target_rows)
        starts = self.call_starts if num_rows else self.call_starts[:0]
        if self.packed:
            starts = np.arange(0, num_rows, max(1, PIECE_BYTES // self.row_bytes))
        return np.append(starts, num_rows)


def call_offsets(rows: np.ndarray, bounds: np.ndarray, row_bytes: int) -> list[int]:
    """Where each call's bytes begin among rows (int64 [n]) of one end; -1 if its rows are no neighbours there."""
    if len(bounds) < 2:
        return []
    num_gaps_before = np.concatenate([[0], np.cumsum(np.diff(rows) != 1)])
    first, last = bounds[:-1], bounds[1:] - 1
    side_by_side = num_gaps_before[first] == num_gaps_before[last]
    offsets: list[int] = np.where(side_by_side, rows[first] * row_bytes, -1).tolist()
    return offsets


class GlooCarrier:
    """Makes and ends groups of the kind that carries bytes.  device: of the tensors that they take.

    host: this machine's address, by which the other rank reaches it; "" for what its host name stands for.
    """

    device: torch.device = torch.device("cpu")

    def __init__(self, host: str = "") -> None:
        self.host = host

    def open(self, store: Store, rank: int, patience: timedelta) -> CallGroup:
        """Waits for the other rank. Raises WireBroken when it does not come in time, RuntimeError for no such host."""
        gloo = cast(Any, ProcessGroupGloo)  # torch's stubs leave its options out
        options = gloo._Options()
        options._timeout = patience
        options._devices = [gloo.create_device(hostname=self.host) if self.host else gloo.create_default_device()]
        try:
            return cast(CallGroup, gloo(store, rank, 2, options))
        except RuntimeError as error:
            raise WireBroken(str(error)) from error

    def send(self, group: CallGroup, data: torch.Tensor, peer: int, tag: int) -> Work:
        """Begins a call. data: contiguous, unchanged until the call is finished. Raises WireBroken."""
        try:
            return group.send([data], peer, tag)
        except RuntimeError as error:
            raise WireBroken(str(error)) from error

    def receive(self, group: CallGroup, data: torch.Tensor, peer: int, tag: int) -> Work:
        """Begins the other half of a call. Raises WireBroken."""
        try:
            return group.recv([data], peer, tag)
        except RuntimeError as error:
            raise WireBroken(str(error)) from error

    def finish(self, work: Work) -> None:
        """Waits until a call is complete. Raises WireBroken."""
        try:
            work.wait(NO_LIMIT)
        except RuntimeError as error:  # c10d tells no more than that; around its calls alone it means a broken wire
            raise WireBroken(str(error)) from error

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
        self._gloo = GlooCarrier(carrier.host)
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

    def _say(self, words: np.ndarray, tag: int) -> None:
        self._gloo.finish(self._gloo.send(self._control, torch.from_numpy(words), self._peer, tag))

    def _listen(self, num_words: int, tag: int) -> np.ndarray:
        words = torch.empty(num_words, dtype=torch.int64)
        self._gloo.finish(self._gloo.receive(self._control, words, self._peer, tag))
        heard: np.ndarray = words.numpy()
        return heard
