"""Admission: which requests an instance can serve at all. A request that can never fit is refused by name, at once."""

from dataclasses import dataclass

import numpy as np

from memserve.request import SamplingParams


class RequestRefused(ValueError):
    """The request can never be served here; the message names the value and what is allowed."""


@dataclass(frozen=True)
class Limits:
    """What an instance can serve. `max_context`: most tokens of prompt and answer together."""

    max_context: int
    vocab_size: int
    num_blocks: int
    block_size: int

    def max_tokens(self, num_prompt: int, params: SamplingParams) -> int:
        """Tokens the answer may have: its own limit, or what the context has left."""
        return min(params.max_tokens, self.max_context - num_prompt)

    def check(self, prompt: np.ndarray, params: SamplingParams) -> None:
        """Raises RequestRefused for a prompt (int32 [n]) that cannot be served, whatever the load."""
        if not len(prompt):
            raise RequestRefused("empty prompt: expected at least 1 token")
        if len(prompt) >= self.max_context:
            raise RequestRefused(
                f"prompt of {len(prompt)} tokens: the context of {self.max_context} tokens must hold it and 1 more"
            )
        bad = prompt[(prompt < 0) | (prompt >= self.vocab_size)]
        if len(bad):
            raise RequestRefused(f"prompt token {bad[0]}: expected 0 to {self.vocab_size - 1}")
        beyond = [token for token in params.stop_token_ids if token >= self.vocab_size]
        if beyond:
            raise RequestRefused(f"stop_token_ids={beyond}: expected 0 to {self.vocab_size - 1}")
        num_kv = len(prompt) + self.max_tokens(len(prompt), params) - 1  # the last token's KV never exists
        needed = -(-num_kv // self.block_size)
        if needed > self.num_blocks:
            raise RequestRefused(
                f"prompt of {len(prompt)} tokens and max_tokens={params.max_tokens} need {needed} blocks of "
                f"{self.block_size} tokens: the pool has {self.num_blocks}"
            )


def usable_prefix(num_tokens: int) -> int:
    """Tokens of a prompt that may come from the cache: all but one, since the last one's logits must be computed."""
    return max(num_tokens - 1, 0)
