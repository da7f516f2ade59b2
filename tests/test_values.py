import math

import numpy as np
import pytest

from memserve.values import as_tuple, require_bool, require_choice, require_int, require_number, require_part


@pytest.mark.parametrize("value", [True, None, "3", 3.0, 0, -1, np.int64(0), np.float32(3.0)])
def test_what_is_no_count_is_refused_by_name(value):
    with pytest.raises(ValueError, match=r"num_turns=.*: expected an integer >= 1$"):
        require_int("num_turns", value, 1)


def test_an_integer_comes_back_as_pythons():
    assert [type(require_int("n", value, 0, 3)) for value in (3, np.int32(3), np.uint8(3))] == [int] * 3
    with pytest.raises(ValueError, match=r"n=4: expected an integer in \[0, 3\]$"):
        require_int("n", 4, 0, 3)
    with pytest.raises(ValueError, match=r"n=4: expected few$"):
        require_int("n", 4, 0, 3, allowed="few")


@pytest.mark.parametrize("value", [True, None, "1", math.nan, math.inf, -math.inf, 10**400, -1, 2.5, np.float64("nan")])
def test_what_is_no_number_of_the_range_is_refused_by_name(value):
    with pytest.raises(ValueError, match=r"share=.*: expected a share$"):
        require_number("share", value, "a share", minimum=0.0, maximum=2.0)


def test_a_number_comes_back_as_pythons_and_an_exclusive_minimum_is_none():
    values = (0, 1, 0.5, np.float32(0.5), np.int64(1))
    assert [type(require_number("x", value, "a number", minimum=0.0)) for value in values] == [float] * 5
    with pytest.raises(ValueError, match="x=0: expected a number > 0"):
        require_number("x", 0, "a number > 0", minimum=0.0, exclusive=True)


def test_words_objects_and_lists_are_refused_by_name():
    with pytest.raises(ValueError, match="end='late': expected one of free, fixed"):
        require_choice("end", "late", ("free", "fixed"))
    with pytest.raises(ValueError, match="strict=1: expected true or false"):
        require_bool("strict", 1)
    with pytest.raises(ValueError, match=r"pace=3: expected an object of str \(config: workload/pace=NAME\)"):
        require_part("workload", "pace", 3, str)
    with pytest.raises(ValueError, match="stop=3: expected a list"):
        as_tuple("stop", 3)
    assert (as_tuple("stop", None), as_tuple("stop", "x"), as_tuple("stop", ["x"])) == ((), ("x",), ("x",))
