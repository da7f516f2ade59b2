"""Clusters with a GPU on a stand-in for one, in a process that starts with it (tests/stand_in/)."""

import pytest
from child_process import needs_triton, run_on_stand_in


@needs_triton
@pytest.mark.timeout(600)  # a minute and a half on a free machine; the interpreter is slow beside other work
def test_clusters_on_the_stand_in_answer_as_on_a_cpu() -> None:
    run_on_stand_in("tests/cluster/check_on_stand_in.py")
