"""ChatWorkload: multi-turn conversations, from our own packaged set or a file. The model's own answers become history.

What a file says for the assistant is not sent; it can only set how long each answer may be (as the paper does with
ShareGPT: section 8.1 replaces its responses by generated ones).
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from memserve.clock import to_ns
from memserve.sampling_params import SamplingParams
from memserve.values import require_bool, require_choice, require_duration, require_int, require_part
from memserve.workload.arrivals import Arrivals, Poisson, arrival_times_ns
from memserve.workload.classes import request_classes
from memserve.workload.conversations import BadConversation, ChatMessage, Conversation, iter_conversations, named_by
from memserve.workload.records import require_enough
from memserve.workload.session import CLIENT_S, ChatTokenizer, Session, Turn, Workload, figures_of_text

PACKAGED_CONVERSATIONS = Path(__file__).parent / "data" / "conversations.jsonl"

_logger = logging.getLogger(__name__)
_DEFAULT_ARRIVALS = Poisson()


class ChatWorkload(Workload):
    """Chat sessions. Every constructor argument is a config option under `workload`.

    path: a ShareGPT or OpenAI-messages file (JSON lines or array); None is the packaged set.
    num_sessions: the first so many conversations; None is all. More than the file holds is an error.
    rate: sessions a second over the whole cluster; None in closed loop.
    think_time_s: from the end of an answer to the next turn, what a client takes.
    max_output_tokens: most tokens of an answer.
    max_turns: the first so many turns of each conversation; None is all.
    output_length: "free" lets the model end its answer; "from_file" gives each answer the token count of the file's
        own (at most max_output_tokens).
    tool_role: the role under which tool results reach the chat template; "user" works with every template.
    skip_invalid: leave out conversations that cannot be played, say how many in the log and in the report, and go on,
        instead of raising.
    temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty: see SamplingParams.
    ignore_eos: an answer ends at its length alone; None: with output_length="from_file".
    classes: kinds of requests, with shares, priorities and objectives: see `request_classes`.

    Raises ValueError naming option, value and what is allowed.
    """

    def __init__(
        self,
        path: str | None = None,
        num_sessions: int | None = None,
        rate: float | None = 1.0,
        arrivals: Arrivals = _DEFAULT_ARRIVALS,
        think_time_s: float = CLIENT_S,
        max_output_tokens: int = 128,
        max_turns: int | None = None,
        output_length: str = "free",
        tool_role: str = "user",
        skip_invalid: bool = False,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        ignore_eos: bool | None = None,
        classes: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self.classes = request_classes(classes)
        self._path = PACKAGED_CONVERSATIONS if path is None else Path(path)
        self._num_sessions = None if num_sessions is None else require_int("num_sessions", num_sessions, 1)
        require_part("workload", "arrivals", arrivals, Arrivals)
        arrivals.check_rate(rate)
        self._arrivals, self._rate, self.concurrency = arrivals, rate, arrivals.concurrency
        self._think_time_ns = to_ns(require_duration("think_time_s", think_time_s))
        self._max_turns = None if max_turns is None else require_int("max_turns", max_turns, 1)
        self._from_file = require_choice("output_length", output_length, ("free", "from_file")) == "from_file"
        self._tool_role = require_choice("tool_role", tool_role, ("user", "tool"))
        self._skip_invalid = require_bool("skip_invalid", skip_invalid)
        self._params = SamplingParams(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            ignore_eos=self._from_file if ignore_eos is None else ignore_eos,
            max_tokens=require_int("max_output_tokens", max_output_tokens, 1),
        )

    def sessions(self, tokenizer: ChatTokenizer, seed: int) -> list[Session]:
        """See Workload. Raises BadConversation with file and line, ValueError when the file holds too few."""
        conversations = list(self._conversations())
        self.figures = {**self.figures, **figures_of_text(tokenizer)}
        rng = np.random.default_rng(require_int("seed", seed, 0))
        arrivals_ns = arrival_times_ns(self._arrivals, len(conversations), self._rate, rng)
        return [self._session(c, int(t), tokenizer) for c, t in zip(conversations, arrivals_ns, strict=True)]

    def _conversations(self) -> Iterator[Conversation]:
        """The conversations to play. Reads the file only as far as it must."""
        num_good, errors = 0, list[BadConversation]()
        for conversation in map(self._checked, iter_conversations(self._path)):
            if num_good == self._num_sessions:
                break
            if isinstance(conversation, Conversation):
                num_good += 1
                yield conversation
            elif self._skip_invalid:
                errors.append(conversation)
            else:
                raise conversation
        self.figures = {"skipped_invalid": len(errors)} if self._skip_invalid else {}
        if errors:
            _logger.warning("%d conversations skipped, %d kept; the first: %s", len(errors), num_good, errors[0])
        held = f"{self._path} holds {num_good} conversations ({len(errors)} skipped)"
        require_enough(self._num_sessions, num_good, held)

    def _checked(self, conversation: Conversation | BadConversation) -> Conversation | BadConversation:
        """The same; one of a class that is no name is a bad one. So is, where lengths are the file's, one that lacks
        the answer of a turn to play.
        """
        if not isinstance(conversation, Conversation):
            return conversation
        try:
            named_by(conversation.where, conversation.names, self.classes)
        except BadConversation as error:
            return error
        if self._from_file:
            for number, turn in enumerate(conversation.turns[: self._max_turns], start=1):
                if turn.answer is None:
                    where = f"{conversation.where}, turn {number}"
                    return BadConversation(f"{where}: no answer to take the length from; expected output_length=free")
        return conversation

    def _session(self, conversation: Conversation, arrival_ns: int, tokenizer: ChatTokenizer) -> Session:
        turns = []
        for number, turn in enumerate(conversation.turns[: self._max_turns]):
            tokens = self._tokens(turn.messages, tokenizer.next_turn if number else tokenizer.chat_prompt)
            params = self._params_for(turn.answer, tokenizer)
            turns.append(Turn(tokens, params, self._think_time_ns if number else 0))
        suffix, eos_token_ids = tokenizer.turn_suffix, tokenizer.eos_token_ids
        named = named_by(conversation.where, conversation.names, self.classes)
        return Session(conversation.conversation_id, arrival_ns, tuple(turns), suffix, eos_token_ids, **named)

    def _tokens(
        self, messages: tuple[ChatMessage, ...], tokens_of: Callable[[list[dict[str, str]]], np.ndarray]
    ) -> np.ndarray:
        """What a turn says. Raises ValueError naming tool_role where it is that which the chat format does not have."""
        try:
            return tokens_of(_to_template(messages, self._tool_role))
        except ValueError as error:
            if self._tool_role != "tool" or messages[0].role != "tool":
                raise
            tokens_of(_to_template(messages, "user"))  # raises what the role has nothing to do with
            raise ValueError(f"workload.tool_role=tool: {error}; expected user, which every one has") from error

    def _params_for(self, answer: str | None, tokenizer: ChatTokenizer) -> SamplingParams:
        if not self._from_file:
            return self._params
        assert answer is not None, "checked as the file was read"
        num_tokens = len(tokenizer.encode(answer)) - len(tokenizer.encode(""))  # without a begin-of-sequence token
        return msgspec.structs.replace(self._params, max_tokens=min(max(num_tokens, 1), self._params.max_tokens))


def _to_template(messages: tuple[ChatMessage, ...], tool_role: str) -> list[dict[str, str]]:
    """The messages as a chat template takes them. Tool results that become the user's are joined into one message."""
    if tool_role == "user" and messages[0].role == "tool":
        return [{"role": "user", "content": "\n\n".join(message.content for message in messages)}]
    return [{"role": message.role, "content": message.content} for message in messages]
