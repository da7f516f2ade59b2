import numpy as np
import pytest

from memserve.sampling_params import SamplingParams
from memserve.workload.session import Session, Turn


def ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def next_prompt(output: np.ndarray, suffix: np.ndarray) -> np.ndarray:
    params = SamplingParams()
    turns = (Turn(ids(1, 2), params), Turn(ids(7, 8), params))
    return Session("s", 0, turns, suffix, eos_token_ids=(257, 300)).next_prompt(ids(1, 2), output, 1)


def test_the_next_prompt_is_history_then_the_suffix_then_the_new_turn():
    prompt = next_prompt(ids(3, 4), suffix=ids(257, 10))
    assert prompt.tolist() == [1, 2, 3, 4, 257, 10, 7, 8]
    assert prompt.dtype == np.int32 and prompt.flags.c_contiguous


@pytest.mark.parametrize(
    ("output", "suffix", "between"),
    [
        (ids(5, 257), ids(257, 10), [5, 257, 10]),
        (ids(5, 257), ids(10, 257, 11), [5, 257, 11]),
        (ids(257, 5), ids(257, 10), [257, 5, 257, 10]),
        (ids(5, 10), ids(10, 257), [5, 10, 10, 257]),  # what the answer says is not part of the template
        (ids(5, 300), ids(257, 10), [5, 300, 257, 10]),
        (ids(), ids(257, 10), [257, 10]),
        (ids(5, 257), ids(), [5, 257]),
    ],
)
def test_an_end_token_that_the_answer_generated_is_not_doubled(output, suffix, between):
    assert next_prompt(output, suffix).tolist() == [1, 2, *between, 7, 8]


def test_a_session_without_turns_is_refused():
    with pytest.raises(ValueError, match="chat=7 of session 's': expected a string, or None"):
        Session("s", 0, (), np.empty(0, np.int32), chat=7)
    with pytest.raises(ValueError, match="session 's' has no turns"):
        Session("s", 0, (), suffix=ids())
