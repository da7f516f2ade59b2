"""The kernels under Triton's interpreter, in processes that start with it; and where they cannot run at all."""

from pathlib import Path

import pytest
import torch
from child_process import needs_triton, run_child, run_interpreted

from memserve.model.attention import attention_backend

HERE = Path(__file__).parent


@needs_triton
@pytest.mark.timeout(600)  # seconds on a free machine; the interpreter is slow beside other work
def test_interpreted_kernels_equal_plain_torch() -> None:
    run_interpreted(*map(str, sorted(HERE.glob("check_*.py"))))


def test_triton_on_a_cpu_is_refused_with_the_alternative_named() -> None:
    with pytest.raises(ValueError, match=r"attention='triton' on cpu: expected a CUDA device .* attention='sdpa'"):
        attention_backend("triton").check(torch.device("cpu"), torch.float32)


def test_without_triton_every_kernel_imports_and_is_refused_by_name() -> None:
    said = run_child(
        ["-c", "import sys; sys.modules['triton'] = None\n"
         "import torch\nfrom memserve.model.attention import attention_backend\n"
         "try: attention_backend('triton').check(torch.device('cuda'), torch.float32)\n"
         "except ValueError as error: print(error)"]
    )  # fmt: skip
    assert "the package triton" in said and "attention='sdpa'" in said
