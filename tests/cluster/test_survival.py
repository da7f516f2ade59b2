"""Real processes killed or stopped at random moments: three seeds of what `make survive` does with fifty."""

import pytest
from cluster.survival import survive

pytestmark = pytest.mark.timeout(300)  # real processes, beside whatever else the machine does


@pytest.mark.parametrize(("seed", "transport"), [(2, "mapped"), (3, "gloo"), (6, "mapped")])
def test_every_request_is_answered_or_fails_by_name_whatever_is_killed_or_stopped(seed, transport, tmp_path):
    print(survive(seed, transport, tmp_path))
