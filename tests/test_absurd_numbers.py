"""Numbers that nobody can mean: each is served, or refused in one line that names the option and its value.

Every numeric argument of every class behind a config's word is tried; what only a whole configuration knows, by words.
"""

import inspect
import math

import numpy as np
import pytest

from memserve import LocalCluster, load_config
from memserve.config.errors import ConfigError
from memserve.sched.cost_model.fixed import FixedCostModel
from memserve.sched.cost_model.operator import OperatorCostModel
from memserve.sched.prediction import BiasedPrediction
from memserve.sched.prefix_routing import BalancedPrefix, CostBased, PromptTree
from memserve.sched.prompt_tree import Optimistic
from memserve.sched.rejection import EarlyRejection
from memserve.workload import AgentWorkload, ChatWorkload, ClosedLoop, DocumentQA, Gamma, Poisson, SyntheticWorkload
from memserve.workload.lengths import LogNormal, Uniform

ABSURD = (-1, 0, math.nan, math.inf, 1e300, 1e-300, 5e-324, 10**21, True, "x")
COSTS = {"step_s": 0.01, "prefill_token_s": 1e-5, "decode_token_s": 1e-4}
TERMS = dict.fromkeys(
    ("causal_pair_s", "prefix_pair_s", "own_pair_s", "prefix_token_s", "decode_token_s", "prefill_request_s",
     "decode_request_s", "mixed_s"), 1e-9,
)  # fmt: skip
SMALL = {"num_sessions": 2, "max_output_tokens": 3}
MAKERS = {  # what is made, with arguments that it needs
    ChatWorkload: SMALL,
    SyntheticWorkload: SMALL | {"prefix_tokens": 4, "num_turns": 2},
    AgentWorkload: SMALL,
    DocumentQA: SMALL,
    Gamma: {},
    ClosedLoop: {},
    LogNormal: {},
    Uniform: {},
    Optimistic: {"num_rows": 2, "block_size": 4},
    PromptTree: {},
    BalancedPrefix: {"abs_bound": 4, "rel_bound": 1.5, "min_share": 0.5},
    CostBased: {"cost_model": FixedCostModel(**COSTS)},
    BiasedPrediction: {"seed": 0},
    EarlyRejection: {"cost_model": FixedCostModel(**COSTS), "ttft_s": 1.0},
    FixedCostModel: COSTS,
    OperatorCostModel: {"tokens": [1, 100], "linear_s": [0.001, 0.01], **TERMS},
}
GIVEN = {"num_rows", "block_size", "seed"}  # not from a config


class CountingTokenizer:
    """As many tokens as a text has words."""

    vocab_size, token_is = 100, ""
    eos_token_ids = (1,)
    turn_suffix = np.array([1], dtype=np.int32)

    def encode(self, text):
        return np.arange(len(text.split()), dtype=np.int32) % 100

    def chat_prompt(self, messages):
        return self.encode(" ".join(message["content"] for message in messages))

    next_turn = chat_prompt


def use(made):
    """What a run asks of it."""
    if hasattr(made, "sessions"):
        sessions = made.sessions(CountingTokenizer(), 0)
        assert all(0 <= s.arrival_ns < 2**62 for s in sessions)
    elif hasattr(made, "times_ns"):
        times_ns = made.times_ns(3, None if isinstance(made, ClosedLoop) else 1.0, np.random.default_rng(0))
        assert times_ns.min() >= 0
    elif hasattr(made, "draw"):
        assert made.draw(10.0, 3, np.random.default_rng(0)).min() >= 1


@pytest.mark.parametrize("kind", MAKERS, ids=lambda kind: kind.__name__)
def test_an_absurd_number_is_served_or_refused_by_name(kind):
    annotated = inspect.signature(kind).parameters.values()
    numeric = [p.name for p in annotated if any(word in str(p.annotation) for word in ("int", "float"))]
    tried = [name for name in numeric if name not in GIVEN]
    assert tried
    for name in tried:
        for value in ABSURD:
            try:
                use(kind(**{**MAKERS[kind], name: value}))
            except ValueError as error:
                assert name in str(error) and "expected" in str(error), f"{name}={value!r}: {error}"
                assert "\n" not in str(error)
            else:
                assert not isinstance(value, str) and value == value, f"{name}={value!r} was taken"


@pytest.mark.parametrize("arrivals", [Poisson(), Gamma(cv=0.001), Gamma(cv=1000.0)])
@pytest.mark.parametrize("rate", [5e-324, 1e-310, 1e-300, 1e300, 1.7e308])
def test_a_rate_is_too_low_or_its_arrivals_are_times(arrivals, rate):
    arrivals.check_rate(rate)
    try:
        times_ns = arrivals.times_ns(50, rate, np.random.default_rng(0))
    except ValueError as error:
        assert str(error).startswith(f"rate={rate!r}: 50 sessions do not arrive within 146 years")
    else:
        assert np.all(np.diff(times_ns) >= 0) and times_ns[0] >= 0


SIMULATED = ["exec=simulated", "workload=synthetic", "workload.num_sessions=3", "workload.max_output_tokens=4"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["link.latency_s=1e300"], r"link.latency_s=1e\+300: expected a number in \[0, 3600\]"),
        (["link.message_latency_s=inf"], "link.message_latency_s=inf: expected a number in"),
        (["link.gb_per_s=1e-300"], "link.gb_per_s=1e-300: expected a number in"),
        (["transfer.retry_s=1e-300"], "transfer.retry_s=1e-300: expected seconds in"),
        (["transfer.patience_s=1e300"], r"transfer.patience_s=1e\+300: expected seconds in"),
        (["cluster.silence_s=nan"], "cluster.silence_s=nan: expected seconds in"),
    ],
)
def test_a_configuration_with_an_absurd_number_is_refused_by_name(words, message):
    with pytest.raises(ConfigError, match=message):
        load_config([*SIMULATED, *words])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["cost_model.step_s=9e8", "workload.max_output_tokens=20"],
            "a step ends .* after the run began, by its",
        ),
        (["cost_model.prefill_token_s=9e8"], "FixedCostModel._one_s gave .*, and at most 146 years"),
        (["workload.think_time_s=9e8", "workload.num_turns=9"], "9 turns: its arrival and think_time_s together are"),
    ],
)
def test_what_goes_on_for_longer_than_a_clock_can_tell_is_refused(words, message):
    with pytest.raises(ValueError, match=message):
        LocalCluster(load_config([*SIMULATED, *words])).run()
