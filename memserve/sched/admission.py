"""Admission: which requests an instance can serve at all, and what of one is cached there. A request that can never
fit is refused by name, at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from memserve.kvcache.block_pool import BlockPool
from memserve.kvcache.index import Match
from memserve.request import Request
from memserve.sampling_params import SamplingParams
from memserve.values import wrong_return


class RequestRefused(ValueError):
    """The request can never be served here; the message names the value and what is allowed."""


@dataclass(frozen=True)
class Limits:
    """What an instance can serve. max_context: most tokens of prompt and answer together.

    num_blocks: of its pool.  decode_blocks: of another one's that decodes what this one has prefilled, and which alone
    needs room for the answer then; None: it decodes itself.
    """

    max_context: int
    vocab_size: int
    num_blocks: int
    block_size: int
    decode_blocks: int | None = None

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
        self._check_room(len(prompt), params)

    def _check_room(self, num_prompt: int, params: SamplingParams) -> None:
        num_kv = num_prompt + self.max_tokens(num_prompt, params) - 1  # the last token's KV never exists
        both = f"prompt of {num_prompt} tokens and max_tokens={params.max_tokens}"
        if self.decode_blocks is None:
            self._check_blocks(both, num_kv, self.num_blocks, "the pool")
        else:
            self._check_blocks(f"the prompt's {num_prompt} tokens", num_prompt, self.num_blocks, "the pool")
            self._check_blocks(both, num_kv, self.decode_blocks, "the pool of an instance that decodes")

    def _check_blocks(self, what: str, num_tokens: int, num_blocks: int, whose: str) -> None:
        needed = -(-num_tokens // self.block_size)
        if needed > num_blocks:
            raise RequestRefused(f"{what} need {needed} blocks of {self.block_size} tokens: {whose} has {num_blocks}")


def usable_prefix(num_tokens: int) -> int:
    """Tokens of a prompt that may come from the cache: all but one, since the last one's logits must be computed."""
    return max(num_tokens - 1, 0)


def cached_prefix(pool: BlockPool, tokens: np.ndarray) -> Match:
    """What may come from a pool's cache of a request's tokens, int32 [n], as its index says; marks nothing used.

    Raises ValueError where the index gives no Match of so many tokens, or blocks that nobody holds.
    """
    limit = usable_prefix(len(tokens))
    found = pool.index.peek(tokens, limit)
    if not isinstance(found, Match) or not _are_cached(found, pool, limit):
        expected = f"a Match of int32 blocks that are cached, of {pool.block_size} tokens each, at most {limit} in all"
        raise wrong_return(pool.index, "peek", found, expected)
    return found


def keep_cached(pool: BlockPool, upcoming: Sequence[Request]) -> None:
    """Makes what is cached of requests that wait the youngest in the index, the first one's the very last to go, before
    somebody is given room: AttentionStore's look-ahead window (arXiv 2403.19708). Counts as no use.
    """
    for request in reversed(upcoming):
        found = cached_prefix(pool, request.tokens.view)
        if found.num_tokens:
            pool.index.insert(request.tokens.view[: found.num_tokens], found.blocks)


def _are_cached(found: Match, pool: BlockPool, limit: int) -> bool:
    blocks, num_tokens = found
    if not isinstance(blocks, np.ndarray) or blocks.dtype != np.int32:
        return False
    if len(blocks) * pool.block_size != num_tokens or num_tokens > limit:
        return False
    try:
        return bool(pool.allocator.refcounts[blocks].all())
    except IndexError:
        return False
