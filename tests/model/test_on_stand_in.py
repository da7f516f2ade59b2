"""The model's code for a GPU on a stand-in for one, in a process that starts with it (tests/stand_in/)."""

import pytest
from child_process import needs_triton, run_on_stand_in

FILES = (
    "tests/stand_in/check_rules.py",
    "tests/model/test_gpu_steps.py",
    "tests/model/test_gpu.py",
    "tests/transfer/test_device.py",
)
FEW_OF_THE_LAST = "check_rules or gpu_steps or rows_are_copied_gathered or part_of_a_storage or does_not_see"


@needs_triton
@pytest.mark.timeout(600)  # half a minute on a free machine; the interpreter is slow beside other work
def test_code_for_a_gpu_runs_on_the_stand_in_as_on_a_cpu() -> None:
    run_on_stand_in(*FILES, "-k", FEW_OF_THE_LAST)
