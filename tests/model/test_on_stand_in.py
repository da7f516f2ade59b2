"""The model's code for a GPU on a stand-in for one, in processes that start with it (tests/stand_in/)."""

import pytest
from child_process import needs_triton, run_on_stand_in

CHECKS = {
    "rules, and memory": [
        "tests/stand_in/check_rules.py", "tests/model/test_gpu.py", "tests/transfer/test_device.py",
        "-k", "check_rules or rows_are_copied_gathered or part_of_a_storage or does_not_see",
    ],
    "steps, captured and not": ["tests/model/test_gpu_steps.py"],
}  # fmt: skip


@needs_triton
@pytest.mark.timeout(600)  # a minute on a free machine; the interpreter is slow beside other work
@pytest.mark.parametrize("what", CHECKS)
def test_code_for_a_gpu_runs_on_the_stand_in_as_on_a_cpu(what) -> None:
    run_on_stand_in(*CHECKS[what])
