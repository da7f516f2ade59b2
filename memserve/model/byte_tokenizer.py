"""ByteTokenizer: UTF-8 bytes and four special tokens, for models without a tokenizer. Knows no file and no library.

# [0, 256) bytes | 256 end of turn | 257 system | 258 user | 259 assistant
"""

from collections.abc import Sequence

import numpy as np

from memserve.model.chat_format import Message, check_messages
from memserve.model.tokenizer import Tokenizer, as_utf8

END = 256
ROLES = {"system": 257, "user": 258, "assistant": 259}
VOCAB_SIZE = 260


class ByteTokenizer(Tokenizer):
    """A message is its role's token, its bytes, and END; an answer begins after the assistant's token."""

    eos_token_ids = (END,)
    vocab_size = VOCAB_SIZE
    token_is = "a byte"

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(as_utf8(text), dtype=np.uint8).astype(np.int32)

    def decode(self, ids: np.ndarray | Sequence[int]) -> str:
        """As in Tokenizer; an id past the vocabulary, which a larger model may generate, is U+FFFD too."""
        values = np.asarray(ids, dtype=np.int32).reshape(-1)
        values = values[(values < END) | (values >= VOCAB_SIZE)]
        return np.where(values < END, values, 0xFF).astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def chat_prompt(self, messages: Sequence[Message]) -> np.ndarray:
        turns = [self._turn(message) for message in check_messages(messages)]
        return np.concatenate([*turns, np.array([ROLES["assistant"]], dtype=np.int32)])

    @property
    def turn_suffix(self) -> np.ndarray:
        return np.array([END], dtype=np.int32)

    def next_turn(self, messages: Sequence[Message]) -> np.ndarray:
        return self.chat_prompt(messages)

    def _turn(self, message: Message) -> np.ndarray:
        if message["role"] not in ROLES:
            raise ValueError(f"role {message['role']!r}: the byte tokenizer's chat format has {', '.join(ROLES)} alone")
        if message.get("tool_calls"):
            raise ValueError("messages with tool_calls: the byte tokenizer has no way to write them")
        role = np.array([ROLES[message["role"]]], dtype=np.int32)
        return np.concatenate([role, self.encode(message["content"]), self.turn_suffix])
