"""Near ties: where float32 cannot tell two tokens apart. Knows a float64 model, and what a sampler sees.

Summing in another order changes a logit in its last digits, so two correct runs may part at a token whose best two
logits almost coincide. That is the only excuse for different tokens, and a float64 forward decides whether it holds
(`find_divergence`). How many such tokens a run has in which its answers could part from another's, `NearTieCounter`
counts as they are sampled (`model.near_ties`; the report's `near_ties`).

Shape legend: R sampled rows, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from memserve.kvcache.layout import DiscreteLayout
from memserve.model.llama import Llama
from memserve.model.runner import ModelRunner, geometry
from memserve.model.sampler import Sampler, SamplingRow
from memserve.request import Request, ScheduledBatch, TokenLogprobs
from memserve.sampling_params import SamplingParams
from memserve.transfer.block_copy import to_device

NEAR_TIE = 2e-4  # of the logits' units


@dataclass(frozen=True)
class Divergence:
    """Where two answers part: at output token `index`, `first` against `second`; float64 logits differ by `gap`."""

    index: int
    first: int
    second: int
    gap: float

    @property
    def is_near_tie(self) -> bool:
        return self.gap < NEAR_TIE


def find_divergence(
    model: Llama, prompt: Sequence[int], first: Sequence[int], second: Sequence[int]
) -> Divergence | None:
    """The first place at which two greedy answers to one prompt differ, or None. `model` is in float64.

    What follows that place differs for good reason and says nothing. An answer that is shorter than the other has an
    infinite gap where it ends.
    """
    for i, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            logits = next_token_logits(model, [*prompt, *first[:i]])
            return Divergence(i, a, b, abs(float(logits[a] - logits[b])))
    if len(first) != len(second):
        return Divergence(min(len(first), len(second)), -1, -1, float("inf"))
    return None


def next_token_logits(model: Llama, tokens: Sequence[int]) -> torch.Tensor:
    """Logits [V] after `tokens`, by the reference attention in the model's dtype."""
    shape = DiscreteLayout().shape(geometry(model.config, len(tokens), model.dtype), 1)
    keeper = _LogitKeeper()
    kv = torch.zeros(shape, dtype=model.dtype, device=model.device)
    runner = ModelRunner(model, kv, len(tokens), attention="reference", sampler=keeper)
    request = Request("near-tie", np.array(tokens, dtype=np.int32), SamplingParams())
    request.block_table.append(0)
    runner.forward(ScheduledBatch([request], [len(tokens)]))
    return keeper.logits


class NearTieCounter(Sampler):
    """Samples as any other, and counts the greedy rows whose largest logit, after penalties, leads the next one by less
    than NEAR_TIE. It looks for both in each of them, which takes about as long as it takes to choose a token.
    """

    def __init__(self) -> None:
        self._counted: torch.Tensor | int = 0  # where the logits are, so that a GPU's steps do not wait for it

    @property
    def num_near_ties(self) -> int:
        return int(self._counted)

    def _look(self, logits_RV: torch.Tensor, drawn: Sequence[int]) -> None:
        if drawn:
            greedy = np.setdiff1d(np.arange(len(logits_RV)), drawn)
            logits_RV = logits_RV[to_device(greedy, logits_RV.device)]
        if len(logits_RV):
            first_R, second_R = logits_RV.topk(2, dim=-1).values.unbind(-1)
            self._counted = self._counted + (first_R - second_R < NEAR_TIE).sum()


class _LogitKeeper(Sampler):
    """Keeps the logits of the one row it is given."""

    logits: torch.Tensor

    def sample(
        self, logits_RV: torch.Tensor, rows: Sequence[SamplingRow]
    ) -> tuple[np.ndarray, list[TokenLogprobs | None] | None]:
        self.logits = logits_RV[0].clone()
        return np.zeros(1, dtype=np.int32), None
