"""IndexFeed: index events of emulated instances on their way to the global scheduler, a message's time late."""

from collections.abc import Callable

from memserve.cluster.emulated_node import Node
from memserve.kvcache.events import IndexEvent
from memserve.sched.global_scheduler import GlobalScheduler

CallAt = Callable[[int, Callable[[], None]], None]


class IndexFeed:
    """delay_ns: of a message.  call_at: calls back at a moment of virtual time. Idle unless the scheduler follows."""

    def __init__(self, scheduler: GlobalScheduler, delay_ns: int, call_at: CallAt) -> None:
        self._scheduler, self._delay_ns, self._call_at = scheduler, delay_ns, call_at

    def follow(self, node: Node) -> None:
        """A node is there, with nothing in its index."""
        if self._scheduler.groups.follow_events:
            node.instance.pool.follow()

    def send(self, node: Node, now_ns: int) -> None:
        """Puts what has changed in a node's index on the wire."""
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
