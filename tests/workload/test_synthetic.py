import math
from types import SimpleNamespace

import numpy as np
import pytest

from memserve.workload.lengths import Fixed, LogNormal, Uniform
from memserve.workload.synthetic import SyntheticWorkload

VOCABULARY = SimpleNamespace(vocab_size=512)


def sessions(seed: int = 0, **options):
    return SyntheticWorkload(**options).sessions(VOCABULARY, seed)


@pytest.mark.parametrize("lengths", [Fixed(), Uniform(spread=0.5), Uniform(spread=1.0), LogNormal(cv=0.7)])
def test_lengths_have_the_asked_mean_and_are_at_least_one(lengths):
    drawn = lengths.draw(80, 50_000, np.random.default_rng(0))
    assert drawn.mean() == pytest.approx(80, rel=0.02)
    assert drawn.min() >= 1 and drawn.dtype == np.int64


def test_lengths_have_the_asked_spread():
    uniform = Uniform(spread=0.25).draw(80, 50_000, np.random.default_rng(0))
    assert (uniform.min(), uniform.max()) == (60, 100)
    lognormal = LogNormal(cv=0.7).draw(80, 50_000, np.random.default_rng(0))
    assert lognormal.std() / lognormal.mean() == pytest.approx(0.7, rel=0.05)


def test_fixed_lengths_are_exact_and_answers_ignore_the_end_of_sequence():
    (session,) = sessions(num_sessions=1, num_turns=3, prompt_tokens=20, turn_tokens=5, prefix_tokens=7)
    assert [len(turn.tokens) for turn in session.turns] == [27, 5, 5]
    assert all(turn.params.max_tokens == 32 and turn.params.ignore_eos for turn in session.turns)
    assert all(turn.tokens.dtype == np.int32 for turn in session.turns)
    assert len(session.suffix) == 0


def test_share_ratio_sessions_share_each_prefix_and_nothing_else():
    made = sessions(num_sessions=12, prefix_tokens=40, share_ratio=3, prompt_tokens=30)
    prefixes = [session.turns[0].tokens[:40].tobytes() for session in made]
    assert sorted(prefixes.count(prefix) for prefix in set(prefixes)) == [3, 3, 3, 3]
    assert len({session.turns[0].tokens[40:].tobytes() for session in made}) == 12


def test_a_session_stays_the_same_when_others_are_added():
    few, many = sessions(num_sessions=3, lengths=LogNormal()), sessions(num_sessions=9, lengths=LogNormal())
    for a, b in zip(few, many, strict=False):
        assert a.turns[0].tokens.tolist() == b.turns[0].tokens.tolist()


def test_equal_seeds_give_equal_sessions_and_other_seeds_other_ones():
    def content(seed: int) -> list:
        return [(s.arrival_ns, s.turns[0].tokens.tolist()) for s in sessions(seed, lengths=Uniform())]

    assert content(1) == content(1) != content(2)


def test_tokens_stay_inside_the_vocabulary():
    made = SyntheticWorkload(num_sessions=4, prompt_tokens=500).sessions(SimpleNamespace(vocab_size=3), seed=0)
    assert {int(t) for session in made for t in session.turns[0].tokens} == {0, 1, 2}


def test_drawn_answers_are_cut_at_the_most_allowed():
    made = sessions(num_sessions=200, output_tokens=30, max_output_tokens=40, lengths=LogNormal())
    lengths = [session.turns[0].params.max_tokens for session in made]
    assert max(lengths) == 40 and min(lengths) < 20


def test_answers_may_spread_another_way_than_prompts():
    words = {"num_sessions": 50, "output_tokens": 30, "max_output_tokens": 1000, "lengths": Fixed()}
    made, alike = sessions(**words, output_lengths=LogNormal(cv=0.7)), sessions(**words)
    assert {len(session.turns[0].tokens) for session in made} == {256}
    assert len({session.turns[0].params.max_tokens for session in made}) > 20
    assert {session.turns[0].params.max_tokens for session in alike} == {30}
    with pytest.raises(ValueError, match="output_lengths=5: expected null, or an object of Lengths"):
        sessions(output_lengths=5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_sessions": 0}, "num_sessions=0"),
        ({"num_turns": 0}, "num_turns=0"),
        ({"prompt_tokens": 0}, "prompt_tokens=0"),
        ({"turn_tokens": math.nan}, "turn_tokens=nan"),
        ({"output_tokens": -3}, "output_tokens=-3"),
        ({"max_output_tokens": 0}, "max_output_tokens=0"),
        ({"prefix_tokens": -1}, "prefix_tokens=-1"),
        ({"share_ratio": 2}, "share_ratio=2 with prefix_tokens=0"),
        ({"rate": 0}, "rate=0"),
        ({"think_time_s": math.inf}, "think_time_s=inf"),
        ({"lengths": "uniform"}, "lengths='uniform': expected an object of Lengths"),
        ({"temperature": -1}, "temperature=-1"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        SyntheticWorkload(**options)


@pytest.mark.parametrize(("make", "value"), [(Uniform, 1.5), (Uniform, -0.1), (LogNormal, 0), (LogNormal, math.nan)])
def test_a_bad_spread_is_refused(make, value):
    with pytest.raises(ValueError, match="expected a"):
        make(value)
