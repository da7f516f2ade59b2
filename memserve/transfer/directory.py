"""Directory: where the processes of one transport find each other's memories, in a store that all of them reach.

Each publishes its endpoint once. Whose memory must not be freed while others map it learns here who they are:

    visitor   enter -> maps and writes -> leave
    owner     shut: nobody enters any more -> those that have entered, and have not left or ended

Knows no move; how a memory is reached is the transport's business.
"""

import math

import msgspec
import numpy as np
from torch.distributed.distributed_c10d import PrefixStore, Store

from memserve.transfer.device import DeviceHandle
from memserve.transfer.liveness import Watched
from memserve.transfer.store import append
from memserve.transfer.transport import Move


class Memory(msgspec.Struct, frozen=True):
    """num_bytes: -1 where nothing is behind the rows.  fd, inode: of shared memory; -1 where it is none.  on_device: of
    a GPU's memory that others map.
    """

    num_bytes: int
    fd: int = -1
    inode: int = -1
    on_device: DeviceHandle | None = None


class Endpoint(msgspec.Struct, frozen=True):
    """What a process tells the others.  host: see `shared_memory.host_id`.  device: that it alone may use, or "".

    started: see `liveness.started_at`.
    """

    host: str
    pid: int
    memories: list[Memory]
    device: str = ""
    started: str = ""

    @property
    def is_on_device(self) -> bool:
        """Whether others map memory of a GPU."""
        return any(memory.on_device is not None for memory in self.memories)


class Directory:
    """The endpoints under `kind`, a transport's name, in `store`."""

    def __init__(self, store: Store, kind: str) -> None:
        self._store = PrefixStore(f"memserve/{kind}", store)
        self._known: dict[int, Endpoint] = {}

    def publish(self, number: int, endpoint: Endpoint) -> None:
        """Raises ValueError for a number that was ever used, and for a device that somebody has who has not ended."""
        if self._store.add(f"taken/{number}", 1) > 1:
            raise ValueError(f"endpoint {number} is attached already: expected a number never used before")
        self._store.set(f"endpoint/{number}", msgspec.json.encode(endpoint).decode())
        assert self._store.check(
            [f"endpoint/{number}"]
        )  # a TCPStore's set returns before others see it; the next does not
        self._known[number] = endpoint
        if endpoint.device and self._others_on(endpoint.device, number):
            self.give_back_device(number)
            raise ValueError(f"endpoint {number} uses {endpoint.device}, as another does: expected a device of its own")

    def give_back_device(self, number: int) -> None:
        """An endpoint does not use its device any more."""
        self._store.set(f"given back/{number}", "")

    def _others_on(self, device: str, number: int) -> list[int]:
        """Enters `number` among those who use a device; the others, as far as they still do."""
        append(self._store, f"device/{device}", f"{number} ")
        users = {int(word) for word in self._store.get(f"device/{device}").split()} - {number}
        return [user for user in users if not self._store.check([f"given back/{user}"]) and self.is_running(user)]

    def knows(self, number: int) -> bool:
        """Whether an endpoint is attached."""
        return number in self._known or self._store.check([f"endpoint/{number}"])

    def find(self, number: int) -> Endpoint:
        """Asks the store once an endpoint. Raises ValueError for one that is not attached."""
        if number not in self._known:
            if not self.knows(number):
                raise ValueError(f"endpoint {number}: expected one that is attached")
            self._known[number] = msgspec.json.decode(self._store.get(f"endpoint/{number}"), type=Endpoint)
        return self._known[number]

    def is_running(self, number: int) -> bool:
        """Whether the process of an endpoint of this host has not ended."""
        endpoint = self.find(number)
        return not Watched(endpoint.pid, endpoint.started).is_gone

    def enter(self, number: int, own: int) -> bool:
        """Announces that `own` maps memory of `number`; False, and nothing is announced, once that has shut."""
        append(self._store, f"visitors/{number}", f"{own} ")
        if self._store.check([f"shut/{number}"]):
            self.leave(number, own)
            return False
        return True

    def leave(self, number: int, own: int) -> None:
        """Announces that `own` has unmapped it for good."""
        self._store.set(f"left/{number}/{own}", "")

    def shut(self, number: int) -> None:
        """Ends the time in which others may enter."""
        self._store.set(f"shut/{number}", "")

    def visitors(self, number: int) -> list[int]:
        """Endpoints that map memory of `number`: they have entered, and neither left nor ended."""
        if not self._store.check([f"visitors/{number}"]):
            return []
        entered = [int(word) for word in self._store.get(f"visitors/{number}").split()]
        return [v for v in entered if not self._store.check([f"left/{number}/{v}"]) and self.is_running(v)]

    def check(self, move: Move, own: int) -> None:
        """Raises ValueError for a move that `own` cannot post: by its ends, their memories, or rows outside of them."""
        source, target = move.source[0], move.target[0]
        if source != own or target == own:
            raise ValueError(f"a move from endpoint {source} to {target}: expected one from {own} to another")
        _check_calls(move)
        ends = (move.source, move.source_rows, move.source_step), (move.target, move.target_rows, move.target_step)
        for (number, memory), rows, step in ends:
            memories = self.find(number).memories
            if not 0 <= memory < len(memories):
                raise ValueError(f"memory {memory} of endpoint {number}: it has {len(memories)}")
            last = rows + (move.num_alike - 1) * step
            where = f"memory {memory} of endpoint {number}"
            _check_rows(rows, last, move.row_bytes, memories[memory].num_bytes, where)


def _check_rows(first: np.ndarray, last: np.ndarray, row_bytes: int, num_bytes: int, where: str) -> None:
    limit = math.inf if num_bytes < 0 else num_bytes // row_bytes
    if len(first) and not 0 <= int(first.min()) <= int(last.max()) < limit:
        raise ValueError(f"rows {first.min()} to {last.max()} of {row_bytes} bytes in {where}: it has {limit}")


def _check_calls(move: Move) -> None:
    """Every row is paired, and belongs to one call."""
    num_rows, starts = len(move.source_rows), move.call_starts
    if num_rows != len(move.target_rows):
        raise ValueError(f"{num_rows} source and {len(move.target_rows)} target rows: expected as many")
    if num_rows and not (
        len(starts) and starts[0] == 0 and starts[-1] < num_rows and bool((starts[1:] > starts[:-1]).all())
    ):
        raise ValueError(f"call_starts={starts.tolist()}: expected increasing rows, from 0 to below {num_rows}")
