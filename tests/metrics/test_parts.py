"""What each instance of a request did: parts of what all of them did together."""

import pytest
from msgspec.structs import replace

from memserve.metrics.parts import instances_of, part_of
from memserve.request_stats import RequestStats, Stint

STATS = RequestStats(
    "prefill-0", 0, 1, 2, num_prompt=10, num_cached_local=4, num_computed=6, num_generated=20, num_preemptions=3,
    num_computed_on_decode=5, num_preemptions_on_decode=2,
    stints=(Stint("decode-1", 7, 5, 1), Stint("decode-2", 8, 0, 1)),
)  # fmt: skip


def generated_by(decode_instance, num_generated):
    stats = replace(STATS, decode_instance=decode_instance, num_generated=num_generated)
    parts = {label: part_of(label, stats) for label in instances_of(stats)}
    for name in ("num_prompt", "num_computed", "num_generated", "num_preemptions", "num_computed_on_decode"):
        assert sum(getattr(part, name) for part in parts.values()) == getattr(stats, name), name
    return {label: part.num_generated for label, part in parts.items()}


def test_an_answer_that_migrated_counts_where_each_token_was_generated():
    assert generated_by("decode-3", 20) == {"prefill-0": 1, "decode-1": 7, "decode-2": 8, "decode-3": 4}


@pytest.mark.parametrize("moved_on", [False, True])
def test_an_answer_given_up_as_it_came_to_its_next_instance_counts_nothing_there(moved_on):
    """Who says so had no part in it, or was named by then and generated nothing."""
    last = {"decode-3": 0} if moved_on else {}
    assert generated_by("decode-3" if moved_on else "decode-2", 16) == {
        "prefill-0": 1, "decode-1": 7, "decode-2": 8, **last,
    }  # fmt: skip
