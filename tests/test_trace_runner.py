"""TraceRunner: fillers are a function of (seed, position) alone, whoever shares the batch, however long it is."""

import numpy as np
import pytest

from memserve.request import Request, ScheduledBatch
from memserve.sampling_params import SamplingParams
from memserve.trace_runner import TraceRunner

VOCAB_SIZE = 1000
RUNNER = TraceRunner(VOCAB_SIZE)


def request(seed: int, num_tokens: int) -> Request:
    """One that decodes."""
    made = Request(str(seed), np.zeros(num_tokens, dtype=np.int32), SamplingParams(seed=seed))
    made.num_computed = num_tokens - 1
    return made


def tokens(requests: list[Request], num_steps: int) -> np.ndarray:
    return RUNNER.forward(ScheduledBatch(requests, [1] * len(requests), num_steps)).token_ids


def test_a_request_gets_the_same_tokens_alone_and_among_others_at_once_and_one_by_one():
    several = [(7, 5), (8, 5), (7, 90), (2**63 + 3, 1)]
    together = tokens([request(*one) for one in several], 40)
    for row, (seed, num_tokens) in zip(together, several, strict=True):
        one_by_one = [tokens([request(seed, num_tokens + step)], 1).item() for step in range(40)]
        assert row.tolist() == tokens([request(seed, num_tokens)], 40).ravel().tolist() == one_by_one
    assert together.min() >= 0 and together.max() < VOCAB_SIZE
    assert together[0, :10].tolist() != together[1, :10].tolist()


def test_no_filler_ends_an_answer_and_every_other_token_is_one():
    few = TraceRunner(7, eos_token_ids=(2, 6))
    drawn = few.forward(ScheduledBatch([request(7, 5)], [1], 200)).token_ids
    assert set(drawn.ravel().tolist()) == {0, 1, 3, 4, 5} and drawn.dtype == np.int32
    with pytest.raises(ValueError, match=r"vocab_size=2: expected a token that is none of \[0, 1\]"):
        TraceRunner(2, (0, 1))


def test_a_request_that_samples_nothing_has_no_token():
    prefilling = request(7, 5)
    prefilling.num_computed = 0
    batch = ScheduledBatch([prefilling, request(8, 5)], [2, 1])
    (nothing,), (token,) = RUNNER.forward(batch).token_ids.tolist()
    assert nothing == -1 and token == tokens([request(8, 5)], 1).item()
    assert RUNNER.forward(ScheduledBatch([prefilling], [2])).token_ids.tolist() == [[-1]]
