"""Departures: what becomes of the answers that an instance decodes when it is to leave. Knows lengths; moves nothing.

A policy of one's own is one class, named in the config by `departure._target_=my_package.MyDeparture`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    """One that an instance decodes. Tokens: of its prompt, and that it may have at most. arrival_s: at the client, on
    the cluster's clock.  priority: smaller is more urgent.

    How many it has so far is known late where several steps are one event (macro_steps): no choice is to depend on it.
    """

    num_prompt: int
    max_tokens: int
    arrival_s: float
    priority: int = 0


class Departure(ABC):
    """Asked of each answer when its instance begins to drain, or when it begins to decode there."""

    @abstractmethod
    def moves(self, answer: Answer) -> bool:
        """Whether it goes on at another instance of the role, with its KV, rather than end where it is."""


class EndThere(Departure):
    """An instance leaves when all that it decodes has ended there. The baseline."""

    def moves(self, answer: Answer) -> bool:
        return False


class Migrate(Departure):
    """Every answer goes on elsewhere, token for token the same: request migration is a transfer (Table 3)."""

    def moves(self, answer: Answer) -> bool:
        return True
