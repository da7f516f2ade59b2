"""TraceRunner: a runner without KV, for traces whose requests have only lengths. Knows positions; nothing else.

The token at a position is a function of the request's seed and the position alone, so a request answers the same
wherever and however it runs, and two requests share no generated prefix by accident.
"""

from collections.abc import Generator

import numpy as np

from memserve.request import Request, ScheduledBatch, StepOutput

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIXER = np.uint64(0xBF58476D1CE4E5B9)


class TraceRunner:
    """Returns filler tokens in [0, vocab_size)."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = np.uint64(vocab_size)

    def forward(self, batch: ScheduledBatch) -> StepOutput:
        """Next tokens, int32 [num_requests, num_steps], -1 where none."""
        token_ids = np.full((len(batch.requests), batch.num_steps), -1, dtype=np.int32)
        for row, request, samples in zip(token_ids, batch.requests, batch.samples, strict=True):
            if samples:
                row[:] = self._tokens(request, batch.num_steps)
        return StepOutput(token_ids)

    def forward_by_layer(self, batch: ScheduledBatch) -> Generator[int, None, StepOutput]:
        """The same; there is no KV, so no layer is yielded."""
        yield from ()
        return self.forward(batch)

    def _tokens(self, request: Request, count: int) -> np.ndarray:
        positions = np.arange(request.num_tokens, request.num_tokens + count, dtype=np.uint64)
        start = np.uint64(request.seed * int(_GOLDEN) & 0xFFFFFFFFFFFFFFFF)
        mixed = (positions + start) * _MIXER
        mixed ^= mixed >> np.uint64(29)
        tokens: np.ndarray = (mixed * _GOLDEN >> np.uint64(16)) % self._vocab_size
        return tokens.astype(np.int32)
