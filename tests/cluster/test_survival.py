"""Real processes killed or stopped at random moments: a few seeds of what `make survive` does with fifty."""

import pytest
from cluster.survival import survive, survive_restarts, survive_without_store

pytestmark = pytest.mark.timeout(300)  # real processes, beside whatever else the machine does


@pytest.mark.parametrize(("seed", "transport"), [(2, "mapped"), (3, "gloo"), (6, "mapped")])
def test_every_request_is_answered_or_fails_by_name_whatever_is_killed_or_stopped(seed, transport, tmp_path):
    print(survive(seed, transport, tmp_path))


@pytest.mark.parametrize(("seed", "transport"), [(0, "gloo"), (4, "mapped")])
def test_every_request_is_answered_whoever_is_killed_and_started_again(seed, transport, tmp_path):
    print(survive_restarts(seed, transport, tmp_path))


@pytest.mark.parametrize(("seed", "transport"), [(0, "mapped"), (1, "gloo")])
def test_every_request_is_answered_at_once_when_a_store_is_killed_or_stopped(seed, transport, tmp_path):
    print(survive_without_store(seed, transport, tmp_path))
