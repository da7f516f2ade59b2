"""LinkModel: how long a move between two instances takes, for clusters that live in one process. Knows no bytes."""

import math
from dataclasses import dataclass

from memserve.clock import to_ns
from memserve.values import require_bool, require_int, require_number


@dataclass(frozen=True)
class LinkModel:
    """seconds = latency_s * network calls + bytes / (gb_per_s * 1e9), calls one after the other.

    The paper's own model has no latency term (Eq. 2), which makes every granularity cost the same.
    message_latency_s: of a control message, one way.  contention: every rank of an instance has a port out and a port
    in of that bandwidth, which moves out of it, and into it, share fairly; without it each pair of ranks has a link of
    its own, however many senders one receiver has. Raises ValueError for what is no link.
    """

    latency_s: float
    gb_per_s: float
    message_latency_s: float = 0.0
    contention: bool = True

    def __post_init__(self) -> None:
        for name in ("latency_s", "message_latency_s"):
            require_number(name, getattr(self, name), "a finite number >= 0", minimum=0.0)
        if self.gb_per_s != math.inf:
            require_number("gb_per_s", self.gb_per_s, "a number > 0", minimum=0.0, exclusive=True)
        require_bool("contention", self.contention)

    def duration_ns(self, num_calls: int, num_bytes: int) -> int:
        """Nanoseconds from the first call to the last byte."""
        return to_ns(self.latency_s * num_calls + num_bytes / (self.gb_per_s * 1e9))

    @property
    def message_ns(self) -> int:
        """Nanoseconds that a control message takes."""
        return to_ns(self.message_latency_s)


def duration_ns(link: LinkModel, num_calls: int, num_bytes: int) -> int:
    """What a move takes by a link. Raises ValueError where that, a class of somebody's own, gives no nanoseconds."""
    return require_int(f"duration_ns of {type(link).__name__}", link.duration_ns(num_calls, num_bytes), 0)
