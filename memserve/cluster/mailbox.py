"""Mailbox: typed messages between the ranks of a distributed cluster, over ZeroMQ. Knows no message's meaning.

Every rank binds one socket and tells its address in the store that torchrun gives; a connection is made when the first
message goes out. Messages from one rank to another stay in order, and wait while the other is busy or stopped.
"""

import socket
import struct
import threading
from datetime import timedelta

import msgspec
import zmq
from torch.distributed.distributed_c10d import Store

from memserve.cluster.node_messages import NodeMessage
from memserve.messages import Message

AnyMessage = Message | NodeMessage
PATIENCE = timedelta(minutes=15)  # for another rank to come: it may be loading
_SENDER = struct.Struct("<ii")  # rank and birth
_LINGER_MS = 2000  # for what was sent last, when a mailbox closes; a stopped peer would take it never


class Mailbox:
    """One rank's. store: of all ranks, for addresses alone.  host: by which the others reach this one.  birth: how many
    processes were this rank before.

    Raises OSError where no port can be had.
    """

    def __init__(self, rank: int, store: Store, host: str, birth: int = 0) -> None:
        self.rank = rank
        self._store, self._sender = store, _SENDER.pack(rank, birth)
        self._births: dict[int, int] = {}  # of ranks, the latest that was heard of
        self._addresses: dict[int, str] = {}
        self._context = zmq.Context()
        self._encoder, self._decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(AnyMessage)
        self._beating = threading.Event()  # set: to end
        self._beats: list[threading.Thread] = []
        self._outgoing: dict[int, zmq.Socket[bytes]] = {}
        self._incoming: zmq.Socket[bytes] = self._context.socket(zmq.PULL)
        self._incoming.set_hwm(0)
        try:
            port = self._incoming.bind_to_random_port(f"tcp://{host}")
        except zmq.ZMQError as error:
            self._context.destroy()
            raise OSError(f"rank {rank} binds no port on {host}: {error}") from error
        store.set(_address(rank), f"tcp://{host}:{port}")

    def send(self, rank: int, message: AnyMessage) -> None:
        """Leaves a message for another rank; never waits for it."""
        if rank not in self._outgoing:
            self._outgoing[rank] = self._connected(rank)
        self._outgoing[rank].send_multipart([self._sender, self._encoder.encode(message)])

    def reaches(self, rank: int) -> bool:
        """Whether a rank has a mailbox by now; `send` waits until it has."""
        return rank in self._outgoing or self._store.check([_address(rank)])

    def reconnect_all(self) -> None:
        """As `reconnect`, for every rank that something was sent to."""
        for rank in list(self._outgoing):
            self.reconnect(rank)

    def reconnect(self, rank: int) -> None:
        """Another process may be this rank by now: what is sent from now on goes there, and only that one is heard."""
        self._births[rank] = max(self._births.get(rank, 0), self._store.add(births_of(rank), 0) - 1)
        if rank in self._outgoing and self._store.get(_address(rank)).decode() != self._addresses[rank]:
            self._outgoing.pop(rank).close(linger=0)

    def receive(self, timeout_ms: int) -> list[tuple[int, AnyMessage]]:
        """(sender, message) of everything that is here; waits up to timeout_ms for the first."""
        received: list[tuple[int, AnyMessage]] = []
        if not self._incoming.poll(timeout_ms):
            return received
        while True:
            try:
                sender, data = self._incoming.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return received
            rank, birth = _SENDER.unpack(sender)
            if birth >= self._births.get(rank, 0):
                self._births[rank] = birth
                received.append((rank, self._decoder.decode(data)))

    def beat(self, rank: int, message: AnyMessage, interval_s: float) -> None:
        """Sends a message again and again from a thread of its own, until the mailbox closes; the first call counts."""
        if self._beats:
            return
        outgoing = self._connected(rank)  # a socket belongs to one thread
        parts = [self._sender, self._encoder.encode(message)]

        def run() -> None:
            while not self._beating.wait(interval_s):
                outgoing.send_multipart(parts)
            outgoing.close()

        self._beats.append(threading.Thread(target=run, name="heartbeat", daemon=True))
        self._beats[-1].start()

    def close(self) -> None:
        """Sends what was left to send, for a moment, and ends."""
        self._beating.set()
        for thread in self._beats:
            thread.join()
        self._context.destroy()

    def _connected(self, rank: int) -> "zmq.Socket[bytes]":
        self._store.wait([_address(rank)], PATIENCE)
        self._addresses[rank] = self._store.get(_address(rank)).decode()
        outgoing: zmq.Socket[bytes] = self._context.socket(zmq.PUSH)
        outgoing.set_hwm(0)
        outgoing.setsockopt(zmq.LINGER, _LINGER_MS)
        outgoing.connect(self._addresses[rank])
        return outgoing


def births_of(rank: int) -> str:
    """The key under which the store counts the processes that are or were a rank."""
    return f"births/{rank}"


def _address(rank: int) -> str:
    """The key under which a rank's address is in the store."""
    return f"mailbox/{rank}"


def own_host(towards: str, port: int) -> str:
    """This machine's address as another sees it that it reaches at `towards`."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((towards, port))
        host: str = probe.getsockname()[0]
    return host
