import numpy as np
import pytest

from memserve.request import SamplingParams
from memserve.workload.session import Session, Turn, num_overlapping


def ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


@pytest.mark.parametrize(
    ("output", "suffix", "expected"),
    [
        (ids(5, 6), ids(257, 10), 0),
        (ids(5, 257), ids(257, 10), 1),
        (ids(5, 257, 10), ids(257, 10), 2),
        (ids(257, 10, 5), ids(257, 10), 0),
        (ids(10), ids(257, 10), 0),
        (ids(), ids(257, 10), 0),
        (ids(5, 257), ids(), 0),
        (ids(1, 1), ids(1, 1, 2), 2),
    ],
)
def test_the_part_of_the_suffix_that_was_generated_is_found(output, suffix, expected):
    assert num_overlapping(output, suffix) == expected


def test_the_next_prompt_is_history_then_the_rest_of_the_suffix_then_the_new_turn():
    params = SamplingParams()
    session = Session("s", 0, (Turn(ids(1, 2), params), Turn(ids(7, 8), params)), suffix=ids(257, 10))
    assert session.next_prompt(ids(1, 2), ids(3, 4), 1).tolist() == [1, 2, 3, 4, 257, 10, 7, 8]
    closed = session.next_prompt(ids(1, 2), ids(3, 257), 1)
    assert closed.tolist() == [1, 2, 3, 257, 10, 7, 8]
    assert closed.dtype == np.int32 and closed.flags.c_contiguous


def test_a_session_without_turns_is_refused():
    with pytest.raises(ValueError, match="session 's' has no turns"):
        Session("s", 0, (), suffix=ids())
