"""Tokenizer: text to token ids and back, and conversations as token ids. Knows no model.

History is never tokenised twice: `continue_chat` appends to the ids that were computed, so that the next turn's prompt
begins with exactly the tokens whose KV is cached (the template's side of this is in chat_format.py).
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from memserve.model.chat_format import ChatFormat, ChatTemplateError, Message

PLAIN_CHAT_TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] + '\n' }}{% endfor %}"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
logger = logging.getLogger(__name__)


def as_utf8(text: str) -> bytes:
    """Raises ValueError for what is no text."""
    if not isinstance(text, str):
        raise ValueError(f"text={text!r}: expected a string")
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"text={text!r}: expected what UTF-8 can hold: {error}") from error


class Tokenizer(ABC):
    """What everyone asks of a tokenizer. Token ids are int32 arrays [num_tokens].

    eos_token_ids: any of them ends an answer.  vocab_size: ids are below it.  token_is: what a token of text is, where
    that is no model's; a report says so.
    """

    eos_token_ids: tuple[int, ...]
    vocab_size: int
    token_is: str = ""

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Ids of a prompt, with the begin-of-sequence token if the model wants one."""

    @abstractmethod
    def decode(self, ids: np.ndarray | Sequence[int]) -> str:
        """Text of the ids without special tokens; bytes that are no UTF-8 become U+FFFD."""

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """The tokens that `decode` leaves out wherever they stand, by how they are written."""
        return {}

    def is_silent(self, token_id: int) -> bool:
        """Whether `decode` leaves a token out wherever it stands."""
        return False

    @abstractmethod
    def chat_prompt(self, messages: Sequence[Message]) -> np.ndarray:
        """Ids of a conversation up to where the assistant's answer begins. Raises ValueError on malformed messages."""

    @property
    @abstractmethod
    def turn_suffix(self) -> np.ndarray:
        """Ids that close an assistant's turn. Raises ChatTemplateError if the template rewrites history."""

    @abstractmethod
    def next_turn(self, messages: Sequence[Message]) -> np.ndarray:
        """Ids of new messages and the generation prompt, to be appended after `turn_suffix`."""

    def close_turn(self, output: np.ndarray) -> np.ndarray:
        """The part of `turn_suffix` that generated ids lack: an answer that ended by itself has its end token."""
        suffix = self.turn_suffix
        if len(output) and output[-1] in self.eos_token_ids:
            at = np.flatnonzero(suffix == output[-1])
            return suffix[at[0] + 1 :] if len(at) else suffix
        return suffix

    def continue_chat(self, prompt: np.ndarray, output: np.ndarray, messages: Sequence[Message]) -> np.ndarray:
        """The next prompt: `prompt`, the generated `output`, the end of that turn, and the new messages."""
        parts = (prompt, output, self.close_turn(output), self.next_turn(messages))
        return np.concatenate(parts).astype(np.int32, copy=False)


class HFTokenizer(Tokenizer):
    """A tokenizer of transformers.

    backend: a `transformers.PreTrainedTokenizerBase`, any fast one.  eos_token_ids: the model's; () takes the
    tokenizer's own.  name: for messages.
    A model without a chat template is a base model: its turns are joined by line ends, and a warning says so.
    """

    def __init__(self, backend: Any, eos_token_ids: tuple[int, ...] = (), name: str = "") -> None:
        self._backend = backend
        own = () if backend.eos_token_id is None else (backend.eos_token_id,)
        self.eos_token_ids = eos_token_ids or own
        self.vocab_size = len(backend)
        self._name = name or str(backend.name_or_path)

    @classmethod
    def from_directory(cls, directory: Path, eos_token_ids: tuple[int, ...] = ()) -> "HFTokenizer":
        """From a Hugging Face directory; runs no code out of it. Raises ValueError if its files cannot be read."""
        import transformers  # noqa: PLC0415  # takes a second, and every process imports this module for its names

        try:
            backend = transformers.AutoTokenizer.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # tokenizers raises nothing more special, and transformers whatever it stumbles over
            raise ValueError(f"{directory}: the tokenizer cannot be read: {' '.join(str(error).split())}") from error
        return cls(backend, eos_token_ids, str(directory))

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations follow the model's own template; else turns are joined by line ends."""
        return self._backend.chat_template is not None

    def encode(self, text: str) -> np.ndarray:
        return self._ids(text, add_special_tokens=True)

    def decode(self, ids: np.ndarray | Sequence[int]) -> str:
        ids = ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
        return str(self._backend.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def is_silent(self, token_id: int) -> bool:
        return token_id in self._silent

    @cached_property
    def special_tokens(self) -> Mapping[str, int]:
        added = self._backend.added_tokens_decoder.items()
        return {token.content: number for number, token in added if token.special and not self.decode([number])}

    @cached_property
    def _silent(self) -> frozenset[int]:
        return frozenset(self.special_tokens.values())

    def chat_prompt(self, messages: Sequence[Message]) -> np.ndarray:
        return self._ids(self._format.prompt(messages))

    @cached_property
    def turn_suffix(self) -> np.ndarray:
        return self._following("x", self._format.turn_suffix)

    def next_turn(self, messages: Sequence[Message]) -> np.ndarray:
        text = self._format.next_turn(messages)
        return self._following("x" + self._format.turn_suffix, text)

    @cached_property
    def _format(self) -> ChatFormat:
        if not self.has_chat_template:
            logger.warning("%s has no chat template: turns are joined by line ends", self._name)
        return ChatFormat(self._render, self._name)

    def _render(self, messages: Sequence[Message], with_generation_prompt: bool) -> str:
        template = None if self.has_chat_template else PLAIN_CHAT_TEMPLATE
        dialog = [dict(message) for message in messages]
        try:
            return str(
                self._backend.apply_chat_template(
                    dialog, chat_template=template, tokenize=False, add_generation_prompt=with_generation_prompt
                )
            )
        except (jinja2.TemplateError, TypeError) as error:  # TypeError: text and something else are joined
            raise ChatTemplateError(f"the chat template of {self._name} refuses these messages: {error}") from error

    def _ids(self, text: str, add_special_tokens: bool = False) -> np.ndarray:
        as_utf8(text)
        return np.array(self._backend.encode(text, add_special_tokens=add_special_tokens), dtype=np.int32)

    def _following(self, before: str, text: str) -> np.ndarray:
        """Ids of `text` as it is tokenised after `before` (sentencepiece puts a space before a text of its own).

        Where the border would fall inside a token, the two are tokenised apart.
        """
        head, both = self._ids(before), self._ids(before + text)
        return both[len(head) :] if np.array_equal(both[: len(head)], head) else self._ids(text)
