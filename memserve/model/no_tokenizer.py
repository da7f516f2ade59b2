"""NoTokenizer: stands in where a model brings no tokenizer. Token ids go in and out; text is refused by name."""

from collections.abc import Sequence
from typing import NoReturn

import numpy as np

from memserve.model.chat_format import Message
from memserve.model.tokenizer import Tokenizer


class NoTokenizer(Tokenizer):
    """Decodes everything to no text, and raises ValueError for whatever needs text."""

    def __init__(self, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self.vocab_size = vocab_size
        self.eos_token_ids = eos_token_ids

    def encode(self, text: str) -> np.ndarray:
        self._refuse(f"prompt {text[:40]!r}")

    def decode(self, ids: np.ndarray | Sequence[int]) -> str:
        return ""

    def chat_prompt(self, messages: Sequence[Message]) -> np.ndarray:
        self._refuse("a chat")

    @property
    def turn_suffix(self) -> np.ndarray:
        return np.empty(0, dtype=np.int32)

    def next_turn(self, messages: Sequence[Message]) -> np.ndarray:
        self._refuse("a chat")

    def _refuse(self, what: str) -> NoReturn:
        raise ValueError(f"{what}: this model has no tokenizer files; expected token ids")
