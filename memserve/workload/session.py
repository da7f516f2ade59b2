"""Session: a client's conversation as token ids, and Workload: where sessions come from. Knows no server and no clock.

History is token ids (never text that is tokenised again), so that a later prompt starts with exactly the tokens whose
KV the earlier turns left in a cache:

    # prompt k+1 = [prompt k | output k | rest of the suffix that closes an assistant turn | new tokens of turn k+1]
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from memserve.request import SamplingParams

ChatMessages = Sequence[Mapping[str, str]]  # each {"role": ..., "content": ...}


class ChatTokenizer(Protocol):
    """What workloads ask of a tokenizer. Token ids are int32 arrays [n]."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def turn_suffix(self) -> np.ndarray:
        """The tokens that close an assistant's turn."""

    def encode(self, text: str) -> np.ndarray: ...

    def chat_prompt(self, messages: ChatMessages) -> np.ndarray:
        """A conversation's first prompt, up to where the assistant's answer begins."""

    def next_turn(self, messages: ChatMessages) -> np.ndarray:
        """What follows a closed assistant turn: the new messages, up to where the next answer begins."""


@dataclass(frozen=True)
class Turn:
    """One request of a session.

    tokens: int32 [n]. In turn 0 the whole prompt; later what follows the assistant turn that was closed.
    think_time_ns: from the end of the previous answer to this turn's submission; 0 in turn 0.
    """

    tokens: np.ndarray
    params: SamplingParams
    think_time_ns: int = 0


@dataclass(frozen=True)
class Session:
    """The turns of one conversation, in order. The answers between them are the model's own.

    arrival_ns: when its first turn is submitted, in open loop.  suffix: int32 [n], the tokens that close an answer.
    Raises ValueError when there is no turn.
    """

    session_id: str
    arrival_ns: int
    turns: tuple[Turn, ...]
    suffix: np.ndarray

    def __post_init__(self) -> None:
        if not self.turns:
            raise ValueError(f"session {self.session_id!r} has no turns: expected at least one")

    def next_prompt(self, prompt: np.ndarray, output: np.ndarray, turn: int) -> np.ndarray:
        """The prompt of `turn` (>= 1), from the prompt and output of the turn before it.

        prompt, output: int32 [num_prompt], [num_output]. Returns int32 [n], beginning with both.
        """
        rest = self.suffix[num_overlapping(output, self.suffix) :]
        return np.concatenate([prompt, output, rest, self.turns[turn].tokens]).astype(np.int32, copy=False)


def num_overlapping(output: np.ndarray, suffix: np.ndarray) -> int:
    """How many of the suffix's first tokens the output already ends with: an end-of-turn token it generated, mostly."""
    for n in range(min(len(output), len(suffix)), 0, -1):
        if np.array_equal(output[-n:], suffix[:n]):
            return n
    return 0


class Workload(ABC):
    """A source of sessions.

    concurrency: sessions in progress at a time (closed loop), or None (open loop: sessions start when they arrive).
    """

    concurrency: int | None = None

    @abstractmethod
    def sessions(self, tokenizer: ChatTokenizer, seed: int) -> list[Session]:
        """The sessions in order of arrival. Equal arguments give equal sessions."""
