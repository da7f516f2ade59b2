"""SessionPlayer: the client. Says what to submit and when; is given the time and the answers. Moves no message itself.

A session's life:
    waiting (closed loop: for a place) -> due at its arrival -> in flight -> due again, think time after the answer
        -> in flight ... -> ended: all turns answered, a turn failed, or the next prompt would not fit the context

Nothing ends silently: `counts` says how many turns were never sent, and how many of those for want of context.
"""

import heapq
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from memserve.messages import Finished, Submit, Tokens, pack_tokens, unpack_tokens
from memserve.values import require_int
from memserve.workload.session import Session


@dataclass(frozen=True)
class PlayerCounts:
    """Turns by what became of them.

    num_turns: of all sessions. turns_over_context: turns at which a session ended because prompt and answer could
    pass the context length. turns_not_sent: turns never submitted, those over the context and all that would have
    followed a session's early end.
    """

    num_turns: int
    turns_submitted: int = 0
    turns_answered: int = 0
    turns_failed: int = 0
    turns_over_context: int = 0
    turns_not_sent: int = 0

    @property
    def turns_ended(self) -> int:
        """Turns about which nothing more will happen; equals num_turns when the player is done."""
        return self.turns_answered + self.turns_failed + self.turns_not_sent


@dataclass(eq=False)
class _Live:
    """A session in progress. prompt: int32 [num_prompt] of the current turn; output: its answer so far, in chunks."""

    session: Session
    position: int
    turn: int = 0
    prompt: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int32))
    output: list[np.ndarray] = field(default_factory=list)
    num_output: int = 0

    @property
    def request_id(self) -> str:
        return f"{self.session.session_id}/{self.turn}"

    @property
    def seen_as(self) -> str:
        """The session that the cluster takes it for."""
        return self.session.session_id if self.session.chat is None else self.session.chat

    def submit(self, arrival_ns: int) -> Submit:
        """The request of the current turn."""
        session, params = self.session, self.session.turns[self.turn].params
        tokens, priority = pack_tokens(self.prompt), session.priority or 0
        return Submit(self.request_id, self.seen_as, tokens, params, arrival_ns, priority, session.class_name)

    def add_output(self, index: int, token_ids: np.ndarray) -> None:
        """Tokens [index, index + n) of the answer; what is known already is dropped."""
        assert index <= self.num_output, f"{self.request_id}: token {index} came before token {self.num_output}"
        new = token_ids[self.num_output - index :]
        self.output.append(new)
        self.num_output += len(new)


class SessionPlayer:
    """Plays sessions against a server.

    max_context: most tokens of a prompt and its answer together; a turn that could pass it ends its session.
    concurrency: sessions in progress at a time; None starts every session at its arrival.

    Raises ValueError on two sessions with one id, or values out of range.
    """

    def __init__(self, sessions: Sequence[Session], max_context: int, concurrency: int | None = None) -> None:
        self._max_context = require_int("max_context", max_context, 1)
        self._concurrency = None if concurrency is None else require_int("concurrency", concurrency, 1)
        _require_unique([session.session_id for session in sessions])
        by_arrival = sorted(enumerate(sessions), key=lambda item: (item[1].arrival_ns, item[0]))
        self._waiting = deque(_Live(session, position) for position, session in by_arrival)
        self._num_live = 0
        self._due: list[tuple[int, int, _Live]] = []  # a heap of (time, position, session)
        self._in_flight: dict[str, _Live] = {}
        self._counts = PlayerCounts(num_turns=sum(len(session.turns) for session in sessions))
        self._start_sessions(now_ns=0)

    @property
    def done(self) -> bool:
        return not (self._waiting or self._due or self._in_flight)

    @property
    def counts(self) -> PlayerCounts:
        return self._counts

    def next_time_ns(self) -> int | None:
        """When `poll` next has something to submit; None while that depends on an answer, or when done."""
        return self._due[0][0] if self._due else None

    def poll(self, now_ns: int) -> list[Submit]:
        """Everything due by now, ordered by (time, position of the session).

        A request's arrival is when it was due, so that a client that polls late does not flatter the server.
        """
        submits = []
        while self._due and self._due[0][0] <= now_ns:
            due_ns, _, live = heapq.heappop(self._due)
            self._in_flight[live.request_id] = live
            submits.append(live.submit(due_ns))
        self._count(turns_submitted=len(submits))
        return submits

    def receive(self, message: Tokens | Finished, now_ns: int) -> None:
        """Takes part of an answer, or its end."""
        live = self._in_flight[message.request_id]
        if isinstance(message, Tokens):
            live.add_output(message.index, unpack_tokens(message.token_ids))
            return
        del self._in_flight[message.request_id]
        if message.reason.succeeded:
            self._count(turns_answered=1)
            goes_on = self._advance(live, now_ns)
        else:
            self._count(turns_failed=1)
            self._drop_turns(live, live.turn + 1)
            goes_on = False
        if not goes_on:
            self._num_live -= 1
            self._start_sessions(now_ns)

    def _advance(self, live: _Live, now_ns: int) -> bool:
        """The answer to the current turn is complete: on to the next turn. Returns whether there is one that fits."""
        turn = live.turn + 1
        if turn == len(live.session.turns):
            return False
        output = np.concatenate(live.output) if live.output else np.empty(0, dtype=np.int32)
        prompt = live.session.next_prompt(live.prompt, output, turn)
        live.turn, live.output, live.num_output = turn, [], 0
        return self._schedule(live, prompt, now_ns + live.session.turns[turn].think_time_ns)

    def _start_sessions(self, now_ns: int) -> None:
        """Starts waiting sessions while there are places; one whose first prompt does not fit takes none."""
        while self._waiting and (self._concurrency is None or self._num_live < self._concurrency):
            live = self._waiting.popleft()
            self._num_live += self._schedule(live, live.session.turns[0].tokens, max(live.session.arrival_ns, now_ns))

    def _schedule(self, live: _Live, prompt: np.ndarray, due_ns: int) -> bool:
        """Makes the current turn due, unless it could pass the context: then it drops the session's rest, counted."""
        if len(prompt) + live.session.turns[live.turn].params.max_tokens > self._max_context:
            self._count(turns_over_context=1)
            self._drop_turns(live, live.turn)
            return False
        live.prompt = prompt
        heapq.heappush(self._due, (due_ns, live.position, live))
        return True

    def _drop_turns(self, live: _Live, first: int) -> None:
        self._count(turns_not_sent=len(live.session.turns) - first)

    def _count(self, **more: int) -> None:
        self._counts = replace(self._counts, **{name: getattr(self._counts, name) + n for name, n in more.items()})


def _require_unique(session_ids: list[str]) -> None:
    repeated = [session_id for session_id, n in Counter(session_ids).items() if n > 1]
    if repeated:
        raise ValueError(f"session_id={repeated[0]!r} is used by more than one session: expected unique ids")
