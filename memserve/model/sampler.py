"""Sampler: chooses the next token of every row of logits. Knows no model and no request; randomness is passed in.

A token drawn at random takes one uniform number, a function of (seed, position) alone, and reads the token off the
cumulative distribution in vocabulary order. What else is in the batch, and in which order, changes nothing.

Shape legend: R sampled rows, V vocabulary, N largest values of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from memserve.mixing import GOLDEN64, MASK64, mix64
from memserve.model.penalties import History, penalised
from memserve.request import TokenLogprobs
from memserve.sampling_params import SamplingParams
from memserve.transfer.block_copy import to_device

NUCLEUS_GUESS = 1024  # most nuclei are smaller; a larger one costs its row a second look, and a full sort
CACHED_LOGITS = 65_536  # 256 KiB of float32
_TEMPERATURES = (1e-30, 1e30)  # that float32 divides by safely; beyond them a choice is greedy, or of any token alike


class InvalidLogits(RuntimeError):
    """A row of logits has NaN in it, or no finite largest value; the message names the row and whose it is."""


@dataclass(frozen=True)
class SamplingRow:
    """How to choose one token: seed >= 0 of the request (64 bits count), position of the new token in it.

    history: the tokens before it, where params penalise some.  request_id: whose it is, for messages.
    """

    params: SamplingParams
    seed: int
    position: int
    history: History | None = None
    request_id: str = ""


class Sampler:
    """Penalties; then greedy, or temperature, top-k, top-p and min-p, in that order; each row by its own parameters."""

    @property
    def num_near_ties(self) -> int | None:
        """Greedy rows so far that rounding alone might have decided; None: nobody counts them."""
        return None

    def sample(
        self, logits_RV: torch.Tensor, rows: Sequence[SamplingRow]
    ) -> tuple[np.ndarray, list[TokenLogprobs | None] | None]:
        """Tokens int32 [R], and for each row its logprobs or None; None for all where no row asks for any.

        logits_RV: any float dtype and device, finite or -inf. A greedy batch is one argmax. Raises InvalidLogits.
        """
        assert logits_RV.shape[0] == len(rows)
        given_RV = logits_RV
        logits_RV = penalised(given_RV, [row.params for row in rows], [row.history for row in rows])
        tokens_R = logits_RV.argmax(-1)
        largest_R = logits_RV.gather(1, tokens_R[:, None])[:, 0]
        known_R = torch.ones_like(tokens_R)
        drawn = [i for i, row in enumerate(rows) if not row.params.greedy]
        self._look(logits_RV, drawn)
        at_once = _rows_at_once(logits_RV)
        for start in range(0, len(drawn), at_once):
            some = drawn[start : start + at_once]
            index = to_device(np.array(some), logits_RV.device)
            tokens_R[index], known_R[index] = _draw(logits_RV[index].float(), [rows[i] for i in some])
        # one copy: on a GPU it is all that this waits for, but for rare rows and those that ask for logprobs
        tokens, finite, known = torch.stack((tokens_R, largest_R.isfinite().to(torch.int64), known_R)).cpu().numpy()
        _check_finite(finite, largest_R, rows)
        for i in np.flatnonzero(known == 0).tolist():
            tokens_R[i : i + 1] = _draw(logits_RV[i : i + 1].float(), [rows[i]], logits_RV.shape[1])[0]
            tokens[i] = int(tokens_R[i])
        return tokens.astype(np.int32), _logprobs(given_RV, tokens_R, rows)

    def _look(self, logits_RV: torch.Tensor, drawn: Sequence[int]) -> None:
        """Is shown what tokens are chosen from, penalties taken off. drawn: the rows that are not greedy."""


def uniform(seed: int, position: int) -> float:
    """The random number of a token: in [0, 1), 53 bits, from the splitmix64 mix of (seed, position)."""
    return (_mix(_mix(seed) + position) >> 11) * 2.0**-53


def kept_floor(
    logits_RV: torch.Tensor, params: Sequence[SamplingParams], num_largest: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [R]: the smallest logit that top-k, top-p and min-p keep, -inf where they keep all. And bool [R]: where
    that is known; it is not where a nucleus has more than the `num_largest` values that are looked at (None: as many
    as nearly all have; V: all there are).

    logits_RV: float32, divided by the temperature. top-p counts what top-k has left: its set is the smallest whose
    probability reaches top_p. Tokens that tie with the last one kept are kept.
    """
    num_tokens = logits_RV.shape[1]
    top_k = [p.top_k if 0 < p.top_k < num_tokens else num_tokens for p in params]
    top_p = [p.top_p for p in params]
    if num_largest is None:
        num_largest = max((k for k in top_k if k < num_tokens), default=1)
        if any(p < 1.0 and k == num_tokens for p, k in zip(top_p, top_k, strict=True)):
            num_largest = min(max(num_largest, NUCLEUS_GUESS), num_tokens)
    floor_R, is_known_R = _floor_among_largest(logits_RV, top_k, top_p, num_largest)
    if any(p.min_p for p in params):
        share_R = to_device(np.array([p.min_p for p in params], dtype=np.float32), logits_RV.device)
        floor_R = torch.maximum(floor_R, logits_RV.amax(-1) + share_R.log())
    return floor_R, is_known_R


def _rows_at_once(logits_RV: torch.Tensor) -> int:
    """All of them on a GPU; on the CPU so many that the copies of their logits stay in the cache."""
    num_rows, num_tokens = logits_RV.shape
    return max(CACHED_LOGITS // num_tokens, 1) if logits_RV.device.type == "cpu" else max(num_rows, 1)


def _draw(
    logits_RV: torch.Tensor, rows: Sequence[SamplingRow], num_largest: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 [R]: inverse transform sampling with one uniform number a row. And int64 [R]: 1 where `kept_floor` is known
    of so many; else the token means nothing.
    """
    params, device = [row.params for row in rows], logits_RV.device
    temperature_R = to_device(np.clip([p.temperature for p in params], *_TEMPERATURES).astype(np.float32), device)
    scaled_RV = (logits_RV - logits_RV.amax(-1, keepdim=True)) / temperature_R[:, None]
    weights_RV = scaled_RV.exp()
    if any(p.top_k or p.top_p < 1.0 or p.min_p for p in params):
        floor_R, is_known_R = kept_floor(scaled_RV, params, num_largest)
        weights_RV *= torch.ge(scaled_RV, floor_R[:, None], out=torch.empty_like(scaled_RV))
        known_R = is_known_R.to(torch.int64)
    else:
        known_R = torch.ones(len(rows), dtype=torch.int64, device=device)
    cumulative_RV = weights_RV.cumsum(-1, dtype=torch.float64)
    uniform_R = to_device(np.array([uniform(row.seed, row.position) for row in rows]), device)
    total_R = cumulative_RV[:, -1]
    # below the total even after rounding, so that the token found has a probability above zero
    at_R = torch.minimum(uniform_R * total_R, torch.nextafter(total_R, torch.zeros_like(total_R)))
    return torch.searchsorted(cumulative_RV, at_R[:, None], right=True)[:, 0], known_R


def _floor_among_largest(
    logits_RV: torch.Tensor, top_k: Sequence[int], top_p: Sequence[float], num_largest: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `kept_floor`; top_k is V where it keeps all, else at most num_largest."""
    num_tokens = logits_RV.shape[1]
    values_RN = _largest(logits_RV, num_largest)
    largest_R1 = values_RN[:, :1]
    reached_RN = (values_RN - largest_R1).exp_().cumsum(-1, dtype=torch.float64)
    top_k_R = to_device(np.array(top_k), logits_RV.device)
    top_p_R = to_device(np.array(top_p), logits_RV.device)
    total_R = reached_RN.gather(1, top_k_R.clamp(max=num_largest)[:, None] - 1)[:, 0]
    if num_tokens in top_k and num_largest < num_tokens:
        all_R = (logits_RV - largest_R1).exp_().sum(-1, dtype=torch.float64)
        total_R = torch.where(top_k_R == num_tokens, all_R, total_R)
    nucleus_R = 1 + (reached_RN < (top_p_R * total_R)[:, None]).sum(-1)
    num_kept_R = torch.where(top_p_R < 1.0, torch.minimum(nucleus_R, top_k_R), top_k_R)
    floor_R = values_RN.gather(1, num_kept_R.clamp(max=num_largest)[:, None] - 1)[:, 0]
    keeps_all_R = num_kept_R == num_tokens
    return floor_R.masked_fill_(keeps_all_R, -torch.inf), keeps_all_R | (num_kept_R <= num_largest)


def _largest(logits_RV: torch.Tensor, n: int) -> torch.Tensor:
    """float32 [R, n]: the n largest values of each row, largest first. On the CPU NumPy is the faster of the two."""
    if logits_RV.device.type != "cpu":
        return logits_RV.topk(n).values
    values = logits_RV.numpy()
    if n < values.shape[1]:
        values = np.partition(values, values.shape[1] - n, axis=-1)[:, values.shape[1] - n :]
    return torch.from_numpy(np.sort(values, axis=-1)).flip(-1)


def _check_finite(finite: np.ndarray, largest_R: torch.Tensor, rows: Sequence[SamplingRow]) -> None:
    """NaN counts as the largest value, so one look at each row's largest finds it. finite: of each row, 0 or 1."""
    if not finite.all():
        row = int(np.argmin(finite))
        whose = f" (request {rows[row].request_id}, position {rows[row].position})" if rows[row].request_id else ""
        raise InvalidLogits(f"row {row} of {len(finite)}{whose}: the largest logit is {float(largest_R[row])} in "
                            f"{largest_R.dtype}, expected a finite number")  # fmt: skip


def _logprobs(
    logits_RV: torch.Tensor, tokens_R: torch.Tensor, rows: Sequence[SamplingRow]
) -> list[TokenLogprobs | None] | None:
    if all(row.params.logprobs is None for row in rows):
        return None
    return [
        None if row.params.logprobs is None else _token_logprobs(logits_V, int(token), row.params.logprobs)
        for logits_V, token, row in zip(logits_RV, tokens_R, rows, strict=True)
    ]


def _token_logprobs(logits_V: torch.Tensor, token_id: int, num_top: int) -> TokenLogprobs:
    logprobs_V = torch.log_softmax(logits_V.float(), -1)
    values, ids = logprobs_V.topk(min(num_top, len(logprobs_V)))
    return TokenLogprobs(token_id, float(logprobs_V[token_id]), dict(zip(ids.tolist(), values.tolist(), strict=True)))


def _mix(value: int) -> int:
    """One step of splitmix64: 64 bits that depend on every bit of `value`."""
    return mix64((value + GOLDEN64) & MASK64)
