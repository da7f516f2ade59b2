"""Peer mail: what the nodes of an emulated cluster send each other, in virtual time: messages, and moves on the wires.

Reads no message. A move that begins or ends is nobody's event unless the instance that sends it waits for that end
(`Node.wants`); the others are told when they are looked at anyway.
"""

from collections.abc import Mapping

from memserve.cluster.emulated_node import Node
from memserve.cluster.event_queue import PEER, EventQueue
from memserve.transfer.faults import MessageFaults
from memserve.transfer.in_process import InProcess


class PeerMail:
    """transport: None where nobody sends KV, nor anything else.  nodes: by incarnation."""

    def __init__(self, transport: InProcess | None, nodes: Mapping[int, Node], queue: EventQueue) -> None:
        self._transport, self._nodes, self._queue = transport, nodes, queue

    def send(self, node: Node, faults: MessageFaults | None, now_ns: int) -> None:
        """Puts a node's messages on the wire."""
        if self._transport is None:
            return
        for peer, message in node.instance.drain_peer_outbox():
            due_ns = now_ns + self._transport.link.message_ns
            times = [due_ns] if faults is None else faults.times_ns(type(message).__name__, due_ns)
            if (receiver := self._nodes.get(peer)) is not None:
                for time_ns in times:
                    self._queue.push(time_ns, PEER, receiver, (node.incarnation, message))
        self._run(self._transport, now_ns)

    @property
    def next_move_ns(self) -> int | None:
        """When the next move begins or ends."""
        return None if self._transport is None else self._transport.next_time_ns()

    def run_moves(self, before_ns: int | None) -> tuple[int, Node] | None:
        """Moves begin and end, as long as nothing else comes first, until somebody waits for an end. Of those that do
        at this nanosecond, who has sent what ends first is returned, to be looked at before the others.
        """
        transport = self._transport
        while transport is not None and (event := transport.next_event) is not None:
            time_ns, sender = event[0], self._nodes.get(event[1])
            if not self._queue.is_after(time_ns) or (before_ns is not None and time_ns >= before_ns):
                return None
            self._run(transport, time_ns)
            if sender is not None and sender.timer_ns == time_ns and not sender.is_stopped:
                sender.timer_ns = None
                return time_ns, sender
        return None

    def next_time_ns(self, node: Node) -> int | None:
        """When a swap or a transfer of a node wants to be looked at; at once where it was not told of all its moves."""
        has_arrived = self._transport is not None and self._transport.has_arrived(node.incarnation)
        return 0 if has_arrived else node.next_time_ns

    def _run(self, transport: InProcess, now_ns: int) -> None:
        """Who waits for the end of a move that is over is to be looked at now."""
        transport.run(now_ns)
        for arrived in transport.drain_over():
            node = self._nodes.get(arrived.move_id[0])
            if node is not None and node.wants(arrived):
                self._queue.set_timer(node, now_ns, now_ns)
