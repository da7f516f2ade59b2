"""Random sequences of every operation on two pools and the wires between them, 10,000 steps and more, against the
brute-force models: the same ones each time.

`make fuzz MINUTES=5` runs fresh ones (fuzz.py).
"""

import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis.stateful import run_state_machine_as_test
from kvcache.pool_pair import EVICTIONS
from kvcache.wires_machine import WiresMachine

from memserve.kvcache import HashIndex, RadixIndex

STEPS_AN_EXAMPLE = 100


@pytest.mark.parametrize("eviction", EVICTIONS)
@pytest.mark.parametrize(("index", "num_examples"), [(RadixIndex, 20), (HashIndex, 8)])
def test_two_pools_agree_with_their_models_after_every_step(index, num_examples, eviction):
    machine = type("Pool", (WiresMachine,), {"indexes": (index,), "evictions": (eviction,)})
    rules = settings(
        max_examples=num_examples,
        stateful_step_count=STEPS_AN_EXAMPLE,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(seed(1)(machine), settings=rules)
