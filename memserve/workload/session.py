"""Session: a client's conversation as token ids, and Workload: where sessions come from. Knows no server and no clock.

History is token ids (never text that is tokenised again), so that a later prompt starts with exactly the tokens whose
KV the earlier turns left in a cache:

    # prompt k+1 = [prompt k | output k | rest of the suffix that closes an assistant turn | new tokens of turn k+1]
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from memserve.clock import MAX_NS
from memserve.request import require_priority
from memserve.sampling_params import SamplingParams
from memserve.values import require_int
from memserve.workload.classes import RequestClass, drawn

CLIENT_S = 0.1  # from an answer to the next turn: our assumption of what a client takes for text, tokens and HTTP
ChatMessages = Sequence[Mapping[str, str]]  # each {"role": ..., "content": ...}


class ChatTokenizer(Protocol):
    """What workloads ask of a tokenizer. Token ids are int32 arrays [n]."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def token_is(self) -> str:
        """What a token of text is where it is no model's; else ""."""

    @property
    def eos_token_ids(self) -> Collection[int]: ...

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
    think_time_ns: from the end of the previous answer to this turn's submission; 0 in turn 0. Raises ValueError for
    other tokens, and for a time that is no integer from 0 on.
    """

    tokens: np.ndarray
    params: SamplingParams
    think_time_ns: int = 0

    def __post_init__(self) -> None:
        _require_tokens("tokens of a turn", self.tokens)
        require_int("think_time_ns", self.think_time_ns, 0)


@dataclass(frozen=True)
class Session:
    """The turns of one conversation, in order. The answers between them are the model's own.

    arrival_ns: when its first turn is submitted, in open loop.
    suffix: int32 [n], the tokens that close an answer.  eos_token_ids: those that an answer can end with by itself.
    chat: what policies and the report take it for, with others of that chat: a trace's, each at its own time; None: for
    one of its own.
    class_name: one of the workload's `classes`; "" is drawn.  priority: of its requests; None: that of its class, or 0.
    Raises ValueError when there is no turn, or when it goes on for longer than a clock can tell; for an arrival that is
    no integer from 0 on, a session_id or a chat that is no string, a priority that is none, and another suffix.
    """

    session_id: str
    arrival_ns: int
    turns: tuple[Turn, ...]
    suffix: np.ndarray
    eos_token_ids: Collection[int] = ()
    chat: str | None = None
    class_name: str = ""
    priority: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.session_id, str):
            raise ValueError(f"session_id={self.session_id!r}: expected a string")
        if self.chat is not None and not isinstance(self.chat, str):
            raise ValueError(f"chat={self.chat!r} of session {self.session_id!r}: expected a string, or None")
        if self.priority is not None:
            require_priority(f"priority of session {self.session_id!r}", self.priority)
        if not self.turns:
            raise ValueError(f"session {self.session_id!r} has no turns: expected at least one")
        _require_tokens(f"suffix of session {self.session_id!r}", self.suffix)
        require_int(f"arrival_ns of session {self.session_id!r}", self.arrival_ns, 0)
        if self.arrival_ns + sum(turn.think_time_ns for turn in self.turns) > MAX_NS:
            raise ValueError(f"session {self.session_id!r} of {len(self.turns)} turns: its arrival and think_time_s "
                             "together are beyond 146 years, expected less")  # fmt: skip

    def next_prompt(self, prompt: np.ndarray, output: np.ndarray, turn: int) -> np.ndarray:
        """The prompt of `turn` (>= 1), from the prompt and output of the turn before it.

        prompt, output: int32 [num_prompt], [num_output]. Returns int32 [n], beginning with both.
        """
        parts = (prompt, output, self._rest_of_suffix(output), self.turns[turn].tokens)
        return np.concatenate(parts).astype(np.int32, copy=False)

    def _rest_of_suffix(self, output: np.ndarray) -> np.ndarray:
        """The suffix after the end-of-sequence token that the answer generated itself, if it did; else all of it."""
        if len(output) == 0 or output[-1] not in self.eos_token_ids:
            return self.suffix
        found = np.flatnonzero(self.suffix == output[-1])
        return self.suffix[found[0] + 1 :] if len(found) else self.suffix


def _require_tokens(name: str, value: Any) -> None:
    if not isinstance(value, np.ndarray) or value.dtype != np.int32 or value.ndim != 1:
        said = getattr(value, "dtype", type(value).__name__)
        raise ValueError(f"{name} of {said}, shape {np.shape(value)}: expected an array, int32 [n]")


class Workload(ABC):
    """A source of sessions.

    concurrency: sessions in progress at a time (closed loop), or None (open loop: sessions start when they arrive).
    figures: what the report has under `workload`: of the sessions given last, how they were understood, what was left
    out.  classes: that sessions are drawn to be of, as `request_classes` makes them.
    """

    concurrency: int | None = None
    classes: tuple[RequestClass, ...] = ()
    figures: Mapping[str, str | float | None] = MappingProxyType({})

    @abstractmethod
    def sessions(self, tokenizer: ChatTokenizer, seed: int) -> list[Session]:
        """The sessions in order of arrival. Equal arguments give equal sessions."""


def figures_of_text(tokenizer: ChatTokenizer) -> dict[str, str | float | None]:
    """What a workload of text says of its tokens in `figures`; nothing where they are a model's."""
    return {"token": tokenizer.token_is} if tokenizer.token_is else {}


def sessions_of(workload: Workload, tokenizer: ChatTokenizer, seed: int) -> list[Session]:
    """A workload's sessions, each of one of its classes, if it has any. Raises ValueError where it has no session, or
    something else, or one of a class that it does not have; and for figures that a report cannot have.
    """
    given, name = workload.sessions(tokenizer, seed), type(workload).__name__
    sessions = list(given) if isinstance(given, Iterable) else []
    if not sessions:
        raise ValueError(f"{name}.sessions gave {given!r}: expected a list of sessions, at least one")
    for session in sessions:
        if not isinstance(session, Session):
            raise ValueError(f"{name}.sessions gave {session!r}: expected a Session")
    _require_figures(name, workload.figures)
    return _classed(sessions, workload.classes, seed)


def _require_figures(name: str, figures: object) -> None:
    """Before the run: a report that cannot be written would be missed after it."""
    try:
        is_written = isinstance(figures, Mapping) and bool(json.dumps(dict(figures), allow_nan=False))
    except (TypeError, ValueError):
        is_written = False
    if not is_written:
        raise ValueError(f"{name}.figures={figures!r}: expected a mapping of what JSON can tell: text, numbers, null")


def _classed(sessions: list[Session], classes: Sequence[RequestClass], seed: int) -> list[Session]:
    """Each with its class: what it says itself, or that of its chat's first one, or what is drawn for it."""
    known, of_chat = {each.name: each for each in classes}, dict[str, RequestClass]()
    for session in sessions:
        if session.class_name and session.class_name not in known:
            expected = f"one of workload.classes: {', '.join(known)}" if known else "workload.classes with its name"
            raise ValueError(f"class={session.class_name!r} of session {session.session_id!r}: expected {expected}")
    if not classes:
        return sessions
    found = []
    for session, own in zip(sessions, drawn(classes, len(sessions), seed), strict=True):
        theirs = own if session.chat is None else of_chat.setdefault(session.chat, own)
        found.append(_of_class(session, known.get(session.class_name, theirs)))
    return found


def _of_class(session: Session, own: RequestClass) -> Session:
    priority = own.priority if session.priority is None else session.priority
    return replace(session, class_name=own.name, priority=priority)
