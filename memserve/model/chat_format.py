"""ChatFormat: what a chat template writes around the turns of a conversation. Knows text, no token.

A conversation's history is kept as the token ids that were computed, so a new prompt is the old one with text appended:

    prompt            rendered once, ends where the answer begins
    answer            what the model generated
    turn_suffix       what the template writes to close the answer
    next_turn         the new messages, up to where the next answer begins

A template fits this picture if rendering a longer conversation only ever appends. It is tried on a small dialog, with
recognisable words as content; one that rewrites what it rendered before (drops reasoning, moves the system prompt) is
refused.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from memserve.values import as_text

Message = Mapping[str, Any]  # role and content; an assistant's may have tool_calls, and then needs no content
Render = Callable[[Sequence[Message], bool], str]

_FIRST: Message = {"role": "user", "content": "Question-one"}
_SECOND: Message = {"role": "user", "content": "Question-two"}
_THIRD: Message = {"role": "user", "content": "Question-three"}
_SYSTEM: Message = {"role": "system", "content": "System-prompt"}
_ANSWER = "Answer-one"
_REASONED = "<think>\nReason-one\n</think>\n\nAnswer-one"


class ChatTemplateError(ValueError):
    """The chat template cannot render these messages, or rewrites history; the message says which and where."""


class ChatFormat:
    """One template. `render(messages, with_generation_prompt)` gives text; `name` is for error messages."""

    def __init__(self, render: Render, name: str) -> None:
        self._render = render
        self._name = name

    def prompt(self, messages: Sequence[Message]) -> str:
        """The conversation so far, up to where the assistant's answer begins."""
        return self._render(self._with_calls(check_messages(messages)), True)

    def next_turn(self, messages: Sequence[Message]) -> str:
        """What follows `turn_suffix`: the new messages, up to where the next answer begins."""
        before = self._answered + self.turn_suffix
        dialog = [_FIRST, _assistant(_ANSWER), *self._with_calls(check_messages(messages))]
        return self._after(before, self._render(dialog, True))

    def _with_calls(self, messages: Sequence[Message]) -> Sequence[Message]:
        """The same. Raises ChatTemplateError if they have tool calls that the template does not write."""
        if not any(message.get("tool_calls") for message in messages):
            return messages
        filled = [{**message, "content": message.get("content") or ""} for message in messages]
        plain = [{key: value for key, value in message.items() if key != "tool_calls"} for message in filled]
        if self._render(filled, True) == self._render(plain, True):
            raise ChatTemplateError(f"messages with tool_calls: the chat template of {self._name} leaves them out")
        return messages

    @cached_property
    def turn_suffix(self) -> str:
        """What closes an assistant's turn. Raises ChatTemplateError if the template rewrites history."""
        leads = [[_SYSTEM, _FIRST], [_FIRST]] if self._accepts([_SYSTEM, _FIRST]) else [[_FIRST]]
        for lead in leads:
            self._probe(lead, _REASONED)
        return self._probe([_FIRST], _ANSWER)

    @property
    def _answered(self) -> str:
        """The probe's first prompt and answer; the white space some templates put between is the model's to write."""
        return self._with_answer(
            self._render([_FIRST], True), self._render([_FIRST, _assistant(_ANSWER)], False), _ANSWER
        )

    def _accepts(self, messages: Sequence[Message]) -> bool:
        try:
            self._render(messages, True)
        except ChatTemplateError:
            return False
        return True

    def _probe(self, lead: list[Message], answer: str) -> str:
        """The suffix of a turn that answers `answer`, once the dialog around it is seen to grow at its end only."""
        one = [*lead, _assistant(answer)]
        two = [*one, _SECOND]
        three = [*two, _assistant("Answer-two"), _THIRD]
        closed = self._render(one, False)
        answered = self._with_answer(self._render(lead, True), closed, answer)
        second = self._render(two, True)
        self._after(closed, second)
        self._with_answer(second, self._render(three, True), "Answer-two")
        return closed[len(answered) :]

    def _with_answer(self, prompt: str, longer: str, answer: str) -> str:
        """The part of `longer` that ends with the answer to `prompt`."""
        rest = self._after(prompt, longer)
        space = rest[: len(rest) - len(rest.lstrip())]
        return prompt + space + self._answer_of(rest[len(space) :], answer)

    def _answer_of(self, rest: str, answer: str) -> str:
        if not rest.startswith(answer):
            raise self._rewrites(answer, rest)
        return answer

    def _after(self, shorter: str, longer: str) -> str:
        if not longer.startswith(shorter):
            raise self._rewrites(shorter, longer)
        return longer[len(shorter) :]

    def _rewrites(self, expected: str, got: str) -> ChatTemplateError:
        return ChatTemplateError(
            f"the chat template of {self._name} rewrites history: where a probe dialog had {expected[-80:]!r} it later "
            f"has {got[:160]!r}. Conversations of several turns need a template that only appends"
        )


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def check_messages(messages: Sequence[Message]) -> Sequence[Message]:
    """The messages, if they are a non-empty sequence of {"role": str, "content": str}; else ValueError.

    As in OpenAI's format an assistant's with `tool_calls` may have no content, or None, and content may be a list of
    parts of type text, which become one string.
    """
    if isinstance(messages, str | Mapping) or not messages:
        raise ValueError(f"messages={messages!r}: expected a non-empty list of {{'role': ..., 'content': ...}}")
    return [_checked(message) for message in messages]


def _checked(message: Message) -> Message:
    if isinstance(message, Mapping) and isinstance(message.get("content"), list):
        message = {**message, "content": as_text(message["content"])}
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or not _has_content(message):
        raise ValueError(f"message {message!r}: expected {{'role': str, 'content': str}}")
    return message


def _has_content(message: Message) -> bool:
    calls = message["role"] == "assistant" and bool(message.get("tool_calls"))
    return isinstance(message.get("content"), str) or (calls and message.get("content") is None)
