from memserve.latest import Latest


def test_the_entry_that_was_set_longest_ago_is_forgotten():
    latest = Latest(2)
    latest["a"] = 1
    latest["b"] = 2
    latest["a"] = 3
    assert latest["b"] == 2  # a look makes nothing newer
    latest["c"] = 4
    assert dict(latest) == {"a": 3, "c": 4}
    latest["a"] = 5
    latest["d"] = 6
    assert dict(latest) == {"a": 5, "d": 6}
