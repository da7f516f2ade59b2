"""Faults: a double of the wires that loses, delays, repeats and reorders messages, and of a transport whose writers
stall. For tests and for experiments on what failures cost; decides by a seeded generator, knows no message's meaning.
"""

from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np

from memserve.transfer.in_process import InProcess
from memserve.transfer.link import LinkModel
from memserve.transfer.transport import Move, MoveId


@dataclass
class MessageFaults:
    """What happens to messages between instances. drop, repeat, delay: probabilities of each, independent.

    delay_ns: longest extra time of a message that is delayed, so that it is overtaken.  kinds: names of the messages
    that are touched; None touches all.  limit: most messages touched, so that what is repeated arrives in the end.
    """

    rng: np.random.Generator
    drop: float = 0.0
    repeat: float = 0.0
    delay: float = 0.0
    delay_ns: int = 0
    kinds: Collection[str] | None = None
    limit: int | None = None
    num_touched: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        for name in ("drop", "repeat", "delay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected a probability from 0 to 1")

    def times_ns(self, kind: str, due_ns: int) -> list[int]:
        """When a message that is due at due_ns arrives: never, once, or twice."""
        if (self.kinds is not None and kind not in self.kinds) or self.num_touched == self.limit:
            return [due_ns]
        dropped, repeated, delayed = self.rng.random(3) < (self.drop, self.repeat, self.delay)
        self.num_touched += int(dropped or repeated or delayed)
        if delayed:
            due_ns += int(self.rng.integers(0, self.delay_ns + 1))
        times = [] if dropped else [due_ns]
        return [*times, due_ns + int(self.rng.integers(0, self.delay_ns + 1))] if repeated else times


class StallingTransport(InProcess):
    """Moves of some writers arrive no sooner than told: a writer that was given up and still writes."""

    def __init__(self, link: LinkModel) -> None:
        super().__init__(link)
        self._stalled_until_ns: dict[int, int] = {}

    def stall(self, endpoint: int, until_ns: int) -> None:
        """What `endpoint` posts from now on arrives at until_ns or later."""
        self._stalled_until_ns[endpoint] = until_ns

    def post(self, move_id: MoveId, move: Move, ready_ns: int) -> None:
        super().post(move_id, move, max(ready_ns, self._stalled_until_ns.get(move_id[0], 0)))
