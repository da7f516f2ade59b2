"""One mixer for numbers and arrays: splitmix64's."""

import numpy as np

from memserve.mixing import GOLDEN64, MASK64, mix64


def test_it_is_splitmix64_s():
    """The first numbers of that generator from state 0, as they are published with it."""
    states = [(i * GOLDEN64) & MASK64 for i in (1, 2, 3)]
    assert [mix64(state) for state in states] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_an_array_is_mixed_as_its_numbers_are():
    words = [0, 1, 2**31, 2**63, MASK64]
    mixed = mix64(np.array(words, dtype=np.uint64))
    assert mixed.dtype == np.uint64 and mixed.tolist() == [mix64(word) for word in words]
