"""A toy tokenizer for workload tests: UTF-8 bytes, 256 begins a message, 257 ends one, 258 + n names its role."""

import numpy as np
import pytest

ROLES = ("system", "user", "assistant", "tool")


class ToyTokenizer:
    token_is = ""
    vocab_size = 262
    eos_token_ids = (257,)
    turn_suffix = np.array([257, 10], dtype=np.int32)

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int32)

    def chat_prompt(self, messages) -> np.ndarray:
        return self.next_turn(messages)

    def next_turn(self, messages) -> np.ndarray:
        parts = [self._message(message) for message in messages]
        return np.concatenate([*parts, np.array([256, 258 + ROLES.index("assistant")], dtype=np.int32)])

    def _message(self, message) -> np.ndarray:
        opening = np.array([256, 258 + ROLES.index(message["role"])], dtype=np.int32)
        return np.concatenate([opening, self.encode(message["content"]), self.turn_suffix])


@pytest.fixture
def tokenizer() -> ToyTokenizer:
    return ToyTokenizer()
