"""scripts/tune_kernels.py: which candidates may stand in the table. That it runs is seen with gpu_check.sh."""

from types import SimpleNamespace

import pytest
import torch
from child_process import needs_triton

from memserve.jit import RowConfig

OWN, SAME, OTHER = RowConfig(1, 4), RowConfig(2, 4), RowConfig(3, 4)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_candidate_that_computes_something_else_is_dropped(script, dtype) -> None:
    """Values as small as the mean of two thousand: the bound is a share of their spread."""
    values = torch.randn(4096) / 45
    written = {OWN: values, SAME: values, OTHER: values + values.roll(1) / 4}
    output = torch.empty(4096, dtype=dtype)
    case = SimpleNamespace(
        what="made up", config=OWN, output=output, run=lambda config: lambda: output.copy_(written[config])
    )
    assert script("tune_kernels")._agrees(case, SAME)
    assert not script("tune_kernels")._agrees(case, OTHER)
