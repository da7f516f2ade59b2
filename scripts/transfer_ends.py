"""The two processes of bench_transfer.py: this one sends, another receives; and what is timed between them.

Knows no figure. Both ends have one memory of the same size; the receiver's threads do all it has to, and what it is
told over a pipe concerns the raw process group alone.
"""

import multiprocessing
import threading
from collections import deque
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from torch.distributed import TCPStore
from torch.distributed.distributed_c10d import PrefixStore, ProcessGroupGloo, Store

from memserve.clock import monotonic_ns
from memserve.transfer import Gloo, Mapped, Move, Transport
from memserve.transfer.shared_memory import SharedMemory

SENDER, RECEIVER = 0, 1
PATIENCE = timedelta(seconds=120)
MESSAGES_AHEAD = 64  # of the raw group: as many as the transport's calls
PAUSE_S = 2e-3  # between polls: seldom, since who polls takes a core from who sends


class Ends:
    """The sender's end, and the receiver's process. memory, scratch: uint8 [num_bytes], of this process.

    device: of the memory at both ends; "cuda" means one GPU.
    """

    def __init__(self, num_bytes: int, device: str = "cpu") -> None:
        self.device = device
        self._server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=PATIENCE)
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_receive, args=(theirs, self._server.port, num_bytes, device), daemon=True
        )
        self._process.start()
        (self._shared, self.memory), (self._scratch, self.scratch) = (_memory(num_bytes, device, 1) for _ in range(2))
        self._senders: dict[str, tuple[int, Transport]] = {}
        self._raw = _raw_group(self._server, SENDER)
        self._answer()

    def sender(self, word: str, channels: int = 1) -> tuple[int, Transport]:
        """(endpoint, transport) of this process, by `mapped` or `gloo`."""
        name = f"{word} {channels}"
        if name not in self._senders:
            transport = (
                _mapped(self._server, self.device) if word == "mapped" else Gloo(self._server, channels=channels)
            )
            endpoint = SENDER if word == "mapped" else RECEIVER + channels
            transport.attach(endpoint, [self.memory])
            self._senders[name] = endpoint, transport
        return self._senders[name]

    def carry_s(self, sender: tuple[int, Transport], moves: list[Move]) -> float:
        """Seconds until the last of `moves`, posted one after the other, has arrived."""
        endpoint, transport = sender
        pause, arrived = threading.Event(), []
        start_ns = monotonic_ns()
        for part, move in enumerate(moves):
            transport.post((endpoint, 0, part), move, start_ns)
        while len(arrived) < len(moves):
            pause.wait(PAUSE_S)
            arrived += transport.poll(endpoint, monotonic_ns())
        return (arrived[-1].ended_ns - start_ns) / 1e9

    def raw_s(self, message_bytes: int, count: int) -> float:
        """Seconds of `count` messages on a bare process group, side by side in both memories, and a word back."""
        self._pipe.send((message_bytes, count))
        self._answer()
        under_way: deque[Any] = deque()
        start_ns = monotonic_ns()
        for i in range(count):
            if len(under_way) == MESSAGES_AHEAD:
                under_way.popleft().wait()
            under_way.append(self._raw.send([self.memory[i * message_bytes : (i + 1) * message_bytes]], RECEIVER, 0))
        word = torch.empty(1, dtype=torch.uint8)
        self._raw.recv([word], RECEIVER, 1).wait()
        return (monotonic_ns() - start_ns) / 1e9

    def copy_s(self, message_bytes: int, rows: np.ndarray, target_rows: np.ndarray) -> float:
        """Seconds of as many copies within this process, one after the other, each a plain copy of bytes."""
        source, target = self.memory.numpy(), self.scratch.numpy()
        start_ns = monotonic_ns()
        for here, there in zip((rows * message_bytes).tolist(), (target_rows * message_bytes).tolist(), strict=True):
            target[there : there + message_bytes] = source[here : here + message_bytes]
        return (monotonic_ns() - start_ns) / 1e9

    def one_copy_s(self, num_bytes: int) -> float:
        """Seconds of one plain copy within this process, or within the GPU."""
        start_ns = monotonic_ns()
        self.scratch[:num_bytes].copy_(self.memory[:num_bytes])
        if self.memory.is_cuda:
            torch.cuda.synchronize()
        return (monotonic_ns() - start_ns) / 1e9

    def close(self) -> None:
        for _, transport in self._senders.values():
            transport.close()
        self._pipe.send(None)
        self._process.join(PATIENCE.seconds)

    def _answer(self) -> None:
        if not self._pipe.poll(PATIENCE.seconds):
            raise TimeoutError(f"the receiver did not answer in {PATIENCE}")
        self._pipe.recv()


def _memory(num_bytes: int, device: str, value: int) -> tuple[SharedMemory | None, torch.Tensor]:
    """Of the kind that arenas are, with whoever keeps it."""
    if device != "cpu":
        return None, torch.full((num_bytes,), value, dtype=torch.uint8, device=device)
    shared = SharedMemory(num_bytes)
    return shared, shared.bytes.fill_(value)


def _mapped(store: Store, device: str) -> Mapped:
    return Mapped(store, gpu=None if device == "cpu" else torch.cuda.current_device())


def _receive(pipe: Connection, port: int, num_bytes: int, device: str) -> None:
    """The receiver's process."""
    torch.set_num_threads(1)
    store = TCPStore("127.0.0.1", port, is_master=False, timeout=PATIENCE)
    transports = _mapped(store, device), Gloo(store)
    _keeper, memory = _memory(num_bytes, device, 2)
    for transport in transports:
        transport.attach(RECEIVER, [memory])
    raw = _raw_group(store, RECEIVER)
    pipe.send("ready")
    while (told := pipe.recv()) is not None:
        message_bytes, count = told
        _take_raw(pipe, raw, memory, message_bytes, count)
    for transport in transports:
        transport.close()


def _take_raw(pipe: Connection, raw: Any, memory: torch.Tensor, message_bytes: int, count: int) -> None:
    under_way: deque[Any] = deque()
    for i in range(count):
        if len(under_way) == MESSAGES_AHEAD:
            under_way.popleft().wait()
        under_way.append(raw.recv([memory[i * message_bytes : (i + 1) * message_bytes]], SENDER, 0))
        if i == min(count, MESSAGES_AHEAD) - 1:
            pipe.send("ready")
    while under_way:
        under_way.popleft().wait()
    raw.send([torch.ones(1, dtype=torch.uint8)], SENDER, 1).wait()


def _raw_group(store: Any, rank: int) -> Any:
    return ProcessGroupGloo(PrefixStore("raw", store), rank, 2, PATIENCE)
