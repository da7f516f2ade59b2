"""Random sequences of every operation, 10,000 steps of them, against the brute-force model: the same ones each time.

`make fuzz MINUTES=5` runs fresh ones (fuzz.py).
"""

from hypothesis import HealthCheck, settings
from kvcache.pool_machine import PoolMachine

settings_of_ci = settings(
    max_examples=100,
    stateful_step_count=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)

TestPool = PoolMachine.TestCase
TestPool.settings = settings_of_ci
