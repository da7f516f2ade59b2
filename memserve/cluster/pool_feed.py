"""PoolFeed: what emulated instances tell the global scheduler of their pools.

Index events come a message's time late, how much is free as soon as other messages do.
"""

from memserve.cluster.control import CallAt, ControlPlane
from memserve.cluster.emulated_node import Node
from memserve.kvcache.events import IndexEvent
from memserve.sched.global_scheduler import GlobalScheduler


class PoolFeed:
    """delay_ns: of an index event, if the scheduler follows them.  call_at: calls back at a moment of virtual time."""

    def __init__(self, scheduler: GlobalScheduler, control: ControlPlane, delay_ns: int, call_at: CallAt) -> None:
        self._scheduler, self._control, self._delay_ns, self._call_at = scheduler, control, delay_ns, call_at

    def follow(self, node: Node) -> None:
        """A node is there, with nothing in its index."""
        if self._scheduler.groups.follow_events:
            node.instance.pool.follow()

    def evict(self, node: Node, now_ns: int) -> None:
        """A step of a node's macro-step begins now, and evicts."""
        node.catch_up(now_ns + 1)
        self.send(node, now_ns)

    def send(self, node: Node, now_ns: int) -> None:
        """Puts what has changed in a node's pool on the wire."""
        if (room := node.instance.drain_room()) is not None:
            label, scheduler = node.instance.label, self._scheduler
            self._control.notice(lambda then_ns: scheduler.has_room(label, room, now_ns, then_ns), now_ns)
        if events := node.instance.pool.drain_events():
            due_ns = now_ns + self._delay_ns
            self._call_at(due_ns, lambda: self._arrive(node, events, due_ns))

    def _arrive(self, node: Node, events: list[IndexEvent], now_ns: int) -> None:
        """If the scheduler has missed something, it asks for all, which takes a message each way."""
        if node.is_gone or self._scheduler.groups.index_changed(node.instance.label, events):
            return
        self._call_at(now_ns + self._delay_ns, lambda: self._snapshot(node, now_ns + self._delay_ns))

    def _snapshot(self, node: Node, now_ns: int) -> None:
        if not node.is_gone:
            label, snapshot = node.instance.label, node.instance.pool.follow()
            self._call_at(now_ns + self._delay_ns, lambda: self._scheduler.groups.index_snapshot(label, snapshot))
