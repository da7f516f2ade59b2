"""Fresh random sequences of pool operations until the time is up: `make fuzz MINUTES=5`.

    PYTHONPATH=tests python -m kvcache.fuzz --minutes 5
    PYTHONPATH=tests python -m kvcache.fuzz --seed 1234        # one round, as a failed run named it

Prints each round's seed before it runs; a failure prints the shortest sequence of steps that shows it.
"""

import argparse
import random
import time

from hypothesis import HealthCheck, seed, settings
from hypothesis.stateful import run_state_machine_as_test
from kvcache.wires_machine import WiresMachine

STEPS_A_ROUND = 2_000
STEPS_AN_EXAMPLE = 100


def run_round(number):
    """One round of STEPS_A_ROUND steps with this seed. Raises what the machine found."""
    rules = settings(
        max_examples=STEPS_A_ROUND // STEPS_AN_EXAMPLE,
        stateful_step_count=STEPS_AN_EXAMPLE,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(seed(number)(type("Fuzzed", (WiresMachine,), {})), settings=rules)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, help="run one round with this seed")
    args = parser.parse_args()
    if args.seed is not None:
        return run_round(args.seed)
    deadline_s, rounds = time.monotonic() + 60 * args.minutes, 0
    while time.monotonic() < deadline_s:
        number = random.SystemRandom().randrange(2**32)
        print(f"seed {number}", flush=True)
        run_round(number)
        rounds += 1
    print(f"{rounds * STEPS_A_ROUND} steps, nothing found")


if __name__ == "__main__":
    main()
