"""TraceRunner: a runner without KV, for traces whose requests have only lengths. Knows positions; nothing else.

The token at a position is a function of the request's seed and the position alone, so a request answers the same
wherever and however it runs, and two requests share no generated prefix by accident. None ends an answer: how long
those are is the workload's to say.
"""

from collections.abc import Collection, Generator

import numpy as np

from memserve.mixing import GOLDEN64, MASK64
from memserve.request import Request, ScheduledBatch, StepOutput

_GOLDEN = np.uint64(GOLDEN64)
_MIXER = np.uint64(0xBF58476D1CE4E5B9)


class TraceRunner:
    """Returns filler tokens in [0, vocab_size), but for eos_token_ids. Raises ValueError where those are all."""

    num_near_ties = 0  # it has no logits

    def __init__(self, vocab_size: int, eos_token_ids: Collection[int] = ()) -> None:
        self._fillers = np.setdiff1d(np.arange(vocab_size, dtype=np.int32), np.array([*eos_token_ids], dtype=np.int32))
        if not len(self._fillers):
            raise ValueError(f"vocab_size={vocab_size}: expected a token that is none of {sorted(eos_token_ids)}")

    def forward(self, batch: ScheduledBatch) -> StepOutput:
        """Next tokens, int32 [num_requests, num_steps], -1 where none."""
        rows = [row for row, samples in enumerate(batch.samples) if samples]
        token_ids = np.full((len(batch.requests), batch.num_steps), -1, dtype=np.int32)
        if rows:
            token_ids[rows] = self._tokens([batch.requests[row] for row in rows], batch.num_steps)
        return StepOutput(token_ids)

    def forward_by_layer(self, batch: ScheduledBatch) -> Generator[int, None, StepOutput]:
        """The same; there is no KV, so no layer is yielded."""
        yield from ()
        return self.forward(batch)

    def _tokens(self, requests: list[Request], num_steps: int) -> np.ndarray:
        """int32 [num_requests, num_steps]: of all at once, since a call of NumPy takes longer than a token."""
        firsts = [(r.num_tokens + r.seed * GOLDEN64) & MASK64 for r in requests]
        mixed: np.ndarray = np.array(firsts, dtype=np.uint64)[:, None] + np.arange(num_steps, dtype=np.uint64)
        mixed *= _MIXER
        mixed ^= mixed >> np.uint64(29)
        tokens: np.ndarray = self._fillers[(mixed * _GOLDEN >> np.uint64(16)) % np.uint64(len(self._fillers))]
        return tokens
