"""Peer mail: what the nodes of an emulated cluster send each other, in virtual time. Reads none of it."""

from collections.abc import Mapping

from memserve.cluster.emulated_node import Node
from memserve.cluster.event_queue import PEER, EventQueue
from memserve.transfer.faults import MessageFaults
from memserve.transfer.in_process import InProcess


def send_to_peers(
    node: Node,
    nodes: Mapping[int, Node],
    transport: InProcess,
    faults: MessageFaults | None,
    queue: EventQueue,
    now_ns: int,
) -> None:
    """Puts a node's messages on the wire, and notes when anybody's moves want attention next. nodes: by incarnation."""
    for peer, message in node.instance.drain_peer_outbox():
        due_ns = now_ns + transport.link.message_ns
        times = [due_ns] if faults is None else faults.times_ns(type(message).__name__, due_ns)
        if (receiver := nodes.get(peer)) is not None:
            for time_ns in times:
                queue.push(time_ns, PEER, receiver, (node.incarnation, message))
    transport.run(now_ns)
    for endpoint, due_ns in transport.due_ns().items():
        queue.set_timer(nodes[endpoint], due_ns, now_ns)


def next_time_ns(node: Node, transport: InProcess | None) -> int | None:
    """When a swap, a transfer or a move of a node wants to be looked at."""
    arrives_ns = None if transport is None else transport.due_ns().get(node.incarnation)
    return min((time_ns for time_ns in (node.next_time_ns, arrives_ns) if time_ns is not None), default=None)
