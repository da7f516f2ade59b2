"""OperatorCostModel: a step's seconds as the sum of its operators' (section 5.3). Knows no machine; see fit.py.

    seconds = linear(T)                              projections, MLP, norms over the step's T new tokens together
            + causal_pair_s    * sum y (y + 1) / 2   attention of prompts with nothing cached (x = 0)
            + prefix_pair_s    * sum y x             attention behind a cached prefix: of what is new to what is cached
            + own_pair_s       * sum y (y + 1) / 2   of those, of what is new to itself; a kernel that computes all
                                                     pairs and masks half takes twice prefix_pair_s
            + prefix_token_s   * sum (x + y)         of those, gathering the KV of all tokens
            + decode_token_s   * sum (x + 1)         attention of requests with one new token: reading their KV
            + prefill_request_s * requests with y > 1  launches for each of them, and sampling
            + decode_request_s  * requests with y = 1
            + mixed_s if there are both              two ways of attention in each layer, and bringing them together

x cached and y new tokens of a request. Beside the paper's form, with p = x + y tokens of which a share c is cached:
its attention a p^2 c + b p^2 + c p + d has no c^2, while the pairs that are computed are p^2 (1 - c) or, unmasked,
p^2 (1 - c^2) / 2; and its profile of one operator by waves ((eta - 1) T_full + T_last) assumes that a wave takes the
same time however many there are, which a CPU's caches do not grant. `linear` is therefore a curve through measured
points, straight between them: on a GPU put points where waves begin.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from memserve.sched.cost_model.base import SWAP_BLOCK_TOKENS, CostModel, require_seconds
from memserve.values import require_int

TERMS = (
    "causal_pair_s", "prefix_pair_s", "own_pair_s", "prefix_token_s", "decode_token_s",
    "prefill_request_s", "decode_request_s", "mixed_s",
)  # fmt: skip


class OperatorCostModel(CostModel):
    """tokens, linear_s: the points of linear(T), rising in T, at least two; beyond the last it goes on straight.

    Raises ValueError for points that do not rise and for negative or infinite seconds.
    """

    def __init__(
        self,
        tokens: Sequence[int],
        linear_s: Sequence[float],
        causal_pair_s: float,
        prefix_pair_s: float,
        own_pair_s: float,
        prefix_token_s: float,
        decode_token_s: float,
        prefill_request_s: float,
        decode_request_s: float,
        mixed_s: float,
        swap_block_s: float = 0.0,
        swap_block_tokens: int = SWAP_BLOCK_TOKENS,
        swap_piece_s: float = 0.0,
    ) -> None:
        terms = (
            causal_pair_s, prefix_pair_s, own_pair_s, prefix_token_s, decode_token_s,
            prefill_request_s, decode_request_s, mixed_s,
        )  # fmt: skip
        require_seconds(**dict(zip(TERMS, terms, strict=True)))
        for name, points in (("tokens", tokens), ("linear_s", linear_s)):
            if not isinstance(points, Sequence) or isinstance(points, str):
                raise ValueError(f"cost_model.{name}={points!r}: expected a list")
        for number in tokens:
            require_int("cost_model.tokens", number, 0)
        if len(tokens) < 2 or len(tokens) != len(linear_s) or any(b <= a for a, b in pairwise(tokens)):
            raise ValueError(f"cost_model.tokens={list(tokens)}: expected two or more rising numbers, as many linear_s")
        for seconds in linear_s:
            require_seconds(linear_s=seconds)
        self._price_swaps(swap_block_s, swap_block_tokens, swap_piece_s)
        self._terms = terms
        self._tokens, self._linear_s = list(tokens), list(linear_s)
        steps = zip(pairwise(tokens), pairwise(linear_s), strict=True)
        self._slopes = [(t - s) / (b - a) for (a, b), (s, t) in steps]
        self._tokens_K, self._linear_K, self._slopes_K = map(np.array, (tokens, linear_s, self._slopes))

    def arguments(self) -> dict[str, object]:
        """What makes a fitted model again; of how many tokens a block is that was swapped, its file says."""
        terms = dict(zip(TERMS, self._terms, strict=True))
        return {"tokens": self._tokens, "linear_s": self._linear_s, **terms, "swap_block_s": self.swap_block_s}

    def _one_s(self, num_cached: int, num_new: int) -> float:
        causal, pair, own, token, decode, prefill_request, decode_request, _ = self._terms
        piece = min(max(bisect_right(self._tokens, num_new) - 1, 0), len(self._slopes) - 1)
        seconds = self._linear_s[piece] + self._slopes[piece] * (num_new - self._tokens[piece])
        if num_new == 1:
            seconds += decode_request + decode * (num_cached + 1)
        elif num_cached == 0:
            seconds += prefill_request + causal * (num_new * (num_new + 1) / 2)
        else:
            behind = pair * (num_new * num_cached) + own * (num_new * (num_new + 1) / 2)
            seconds += prefill_request + (behind + token * (num_cached + num_new))
        return max(seconds, 0.0)

    def step_time_s(self, num_cached: np.ndarray, num_new: np.ndarray, num_more: np.ndarray) -> np.ndarray:
        seconds: np.ndarray = self._linear(num_new.sum(keepdims=True)) + self._attention(num_cached, num_new).sum()
        num_decoding = np.count_nonzero(num_new == 1)
        if 0 < num_decoding < len(num_new):
            seconds = seconds + self._terms[TERMS.index("mixed_s")]
        growth = self._terms[TERMS.index("decode_token_s")] * num_decoding
        result: np.ndarray = np.maximum(seconds + growth * num_more, 0.0)
        return result

    def _column_s(self, num_cached: np.ndarray, num_new: np.ndarray) -> np.ndarray:
        seconds = self._linear(num_new) + self._attention(num_cached, num_new)
        return np.where(num_new > 0, np.maximum(seconds, 0.0), 0.0)

    def _linear(self, num_tokens: np.ndarray) -> np.ndarray:
        """The curve, straight beyond both of its ends."""
        piece = np.clip(np.searchsorted(self._tokens_K, num_tokens, "right") - 1, 0, len(self._slopes) - 1)
        result: np.ndarray = self._linear_K[piece] + self._slopes_K[piece] * (num_tokens - self._tokens_K[piece])
        return result

    def _attention(self, num_cached: np.ndarray, num_new: np.ndarray) -> np.ndarray:
        """float64 [R]: what each request adds to the linear part."""
        causal, pair, own, token, decode, prefill_request, decode_request, _ = self._terms
        total, new_pairs = num_cached + num_new, num_new * (num_new + 1) / 2
        behind = pair * (num_new * num_cached) + own * new_pairs + token * total
        prompt = prefill_request + np.where(num_cached == 0, causal * new_pairs, behind)
        result: np.ndarray = np.where(num_new == 1, decode_request + decode * total, prompt)
        return result


def operator_features(num_cached: np.ndarray, num_new: np.ndarray, tokens: Sequence[int]) -> np.ndarray:
    """float64 [len(tokens) + len(TERMS)]: what a step (int64 [R] columns) multiplies the parameters with, in order."""
    num_tokens, knots = int(num_new.sum()), list(tokens)
    piece = min(max(bisect_right(knots, num_tokens) - 1, 0), len(knots) - 2)
    share = (num_tokens - knots[piece]) / (knots[piece + 1] - knots[piece])
    linear = np.zeros(len(knots))
    linear[piece : piece + 2] = 1 - share, share
    total, new_pairs = (num_cached + num_new).astype(np.float64), num_new * (num_new + 1) / 2
    decodes, alone = num_new == 1, (num_new > 1) & (num_cached == 0)
    behind = (num_new > 1) & (num_cached > 0)
    terms = [
        new_pairs[alone].sum(),
        (num_new * num_cached)[behind].sum(),
        new_pairs[behind].sum(),
        total[behind].sum(),
        total[decodes].sum(),
        np.count_nonzero(~decodes),
        np.count_nonzero(decodes),
        float(0 < np.count_nonzero(decodes) < len(num_new)),
    ]
    return np.concatenate([linear, terms])
