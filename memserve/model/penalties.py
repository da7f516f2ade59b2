"""Penalties: logits that depend on the tokens before them. Knows rows of logits and token ids, no model and no request.

Shape legend: R rows, V vocabulary, P places: the tokens that were there before, of all penalised rows together.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from memserve.sampling_params import SamplingParams
from memserve.transfer.block_copy import to_device


class History(NamedTuple):
    """The tokens before the one to choose: int32 [n] of the prompt, int32 [m] of the answer."""

    prompt: np.ndarray
    answer: np.ndarray


def penalised(
    logits_RV: torch.Tensor, params: Sequence[SamplingParams], histories: Sequence[History | None]
) -> torch.Tensor:
    """float32 [R, V], `logits_RV` with the penalties of the rows that have some; itself where none has.

    histories: of rows whose params penalise; None does for the others.
    """
    rows = [i for i, row_params in enumerate(params) if row_params.penalises]
    if not rows:
        return logits_RV
    places = [_places(params[i], histories[i]) for i in rows]
    num_tokens = logits_RV.shape[1]
    where = np.concatenate([i * num_tokens + seen for i, (seen, _, _) in zip(rows, places, strict=True)])
    where_P = to_device(where, logits_RV.device)
    factor_P = to_device(np.concatenate([factor for _, factor, _ in places]), logits_RV.device)
    taken_off_P = to_device(np.concatenate([taken_off for _, _, taken_off in places]), logits_RV.device)
    flat = logits_RV.float().flatten().clone()
    before_P = flat[where_P]
    flat[where_P] = torch.where(before_P > 0, before_P / factor_P, before_P * factor_P) - taken_off_P
    return flat.view(logits_RV.shape)


def _places(params: SamplingParams, history: History | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The tokens that one row has seen, int64 [n], and of each what divides its logit and what is taken off it, float32
    [n].
    """
    assert history is not None, "a row that penalises brings the tokens before it"
    seen, number = np.unique(np.concatenate([history.prompt, history.answer]), return_inverse=True)
    times = np.bincount(number[len(history.prompt) :], minlength=len(seen))
    factor = np.full(len(seen), params.repetition_penalty, dtype=np.float32)
    taken_off = params.presence_penalty * (times > 0) + params.frequency_penalty * times
    return seen.astype(np.int64), factor, taken_off.astype(np.float32)
