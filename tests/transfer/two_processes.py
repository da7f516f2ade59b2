"""A transport's ends in processes of their own: one in the test, and peers that do what they are told over a pipe."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from torch.distributed import TCPStore

from memserve.clock import monotonic_ns
from memserve.transfer import Arrived, Gloo, Mapped, Move, Transport
from memserve.transfer.device import DeviceHandle, NoDevice
from memserve.transfer.mapped import PeerMemoryFailed
from memserve.transfer.shared_memory import SharedHandle, SharedMemory, handle_of, page_lock

LIMIT_S = 60  # of anything that is waited for
STAND_IN, ON_GPU = "mapped on a stand-in for a GPU", "mapped on a GPU"

MAKE: dict[str, Callable[[Any], Transport]] = {
    "mapped": Mapped,
    STAND_IN: lambda store: Mapped(store, device=StandIn()),
    ON_GPU: lambda store: Mapped(store, gpu=0),
    "gloo": Gloo,
    "gloo of 3 channels": lambda store: Gloo(store, channels=3),
}


def store_at(port: int) -> TCPStore:
    return TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=LIMIT_S))


class StandIn(NoDevice):
    """A GPU whose memory is the host's: what a GPU adds to `Mapped`, but for CUDA's own calls, without one."""

    def holds(self, memory: torch.Tensor) -> bool:
        return handle_of(memory) is not None

    def share(self, memory: torch.Tensor) -> DeviceHandle:
        handle = handle_of(memory)
        assert handle is not None
        return DeviceHandle("stand-in", f"{handle.pid} {handle.fd}".encode(), 0, handle.num_bytes, b"\xff\0", 0)

    def check(self, handle: DeviceHandle) -> None:
        assert handle.gpu == "stand-in"

    def open(self, handle: DeviceHandle) -> torch.Tensor:
        pid, fd = map(int, handle.segment.split())
        try:
            return SharedHandle(pid, fd, handle.num_bytes).attach()
        except OSError as error:  # CUDA tells no more either
            raise RuntimeError(f"no such memory: {error}") from error


class End:
    """One process's end of a transport: an endpoint with shared memories full of seeded bytes; on a GPU the first."""

    def __init__(self, kind: str, port: int, endpoint: int, sizes: list[int]) -> None:
        self.endpoint, self.transport = endpoint, MAKE[kind](store_at(port))
        self.shared = [SharedMemory(size) for size in sizes]
        self.memories = [memory.bytes for memory in self.shared]
        if kind == ON_GPU:
            self.memories[0] = self.memories[0].to("cuda:0")
            for memory in self.shared[1:]:
                page_lock(memory)
        self.fill(endpoint)
        self.transport.attach(endpoint, self.memories)

    def fill(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        for memory in self.memories:
            memory[:] = torch.from_numpy(rng.integers(0, 256, len(memory), dtype=np.uint8))

    def read(self, memory: int) -> bytes:
        return self.memories[memory].cpu().numpy().tobytes()

    def write(self, memory: int, start: int, data: bytes) -> None:
        self.memories[memory][start : start + len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)

    def post(self, moves: list[Move], ticket: int = 0) -> None:
        for part, move in enumerate(moves):
            self.transport.post((self.endpoint, ticket, part), move, monotonic_ns())

    def poll(self) -> list[Arrived]:
        return self.transport.poll(self.endpoint, monotonic_ns())

    def wait(self, count: int, limit_s: float = LIMIT_S) -> list[Arrived]:
        """Until `count` moves have arrived. Raises TimeoutError."""
        arrived, pause, end_ns = [], multiprocessing.Event(), monotonic_ns() + int(limit_s * 1e9)
        while len(arrived) < count:
            arrived += self.poll()
            if monotonic_ns() > end_ns:
                raise TimeoutError(f"{len(arrived)} of {count} moves in {limit_s} s")
            pause.wait(1e-3)
        return arrived

    def carry(self, moves: list[Move], ticket: int = 0) -> list[tuple[int, int, int]]:
        self.post(moves, ticket)
        return [arrived.move_id for arrived in self.wait(len(moves))]

    def detach(self, endpoint: int) -> None:
        self.transport.detach(endpoint)

    def close(self) -> None:
        self.transport.close()


def _serve(pipe: Any, *arguments: Any) -> None:
    torch.set_num_threads(1)
    end = End(*arguments)
    pipe.send(None)
    while (told := pipe.recv()) is not None:
        name, args = told
        try:
            pipe.send(getattr(end, name)(*args))
        except (ValueError, TimeoutError, PeerMemoryFailed) as error:
            pipe.send(error)
    end.close()
    pipe.send(None)


class Peer:
    """An `End` in another process; its methods, called there."""

    def __init__(self, *arguments: Any) -> None:
        context = multiprocessing.get_context("forkserver")  # which has imported torch once for all of them
        context.set_forkserver_preload(["torch", "memserve.transfer"])
        self._pipe, theirs = context.Pipe()
        self._leaves = False
        self.process = context.Process(target=_serve, args=(theirs, *arguments), daemon=True)
        self.process.start()
        theirs.close()

    def ready(self) -> "Peer":
        self.answer()
        return self

    def tell(self, name: str, *args: Any) -> None:
        """Calls a method without waiting for what it returns: `answer` does."""
        self._pipe.send((name, args))

    def answer(self) -> Any:
        if not self._pipe.poll(LIMIT_S):
            raise TimeoutError("no answer of the peer")
        answer = self._pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def call(self, name: str, *args: Any) -> Any:
        self.tell(name, *args)
        return self.answer()

    def signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.process.kill()
        self.process.join(LIMIT_S)

    def leave(self) -> None:
        """Tells it to close its transport and to end."""
        self._pipe.send(None)
        self._leaves = True

    def end(self) -> None:
        """Waits until it has left, which it must."""
        if self.process.is_alive():
            if not self._leaves:
                self.leave()
            self.answer()
        self.process.join(LIMIT_S)
        assert self.process.exitcode is not None


def rows_move(
    source: tuple[int, int], target: tuple[int, int], row_bytes: int, rows: Any, target_rows: Any, **options: Any
) -> Move:
    """A call a row unless `call_starts` says otherwise."""
    starts = options.pop("call_starts", np.arange(len(rows)))
    return Move(source, target, row_bytes, np.asarray(rows, np.int64), np.asarray(target_rows, np.int64), starts,
                **options)  # fmt: skip


def copied(move: Move, source: bytes, target: bytes) -> bytes:
    """What the target's bytes are after a move, row by row."""
    result = bytearray(target)
    for start, to in zip(move.source_rows.tolist(), move.target_rows.tolist(), strict=True):
        n = move.row_bytes
        result[to * n : (to + 1) * n] = source[start * n : (start + 1) * n]
    return bytes(result)
