"""Building blocks against torch's own, at every number of rows that takes another path."""

import pytest
import torch
from torch.nn import functional

from memserve.model.layers import Linear, RMSNorm, swiglu


@pytest.mark.parametrize("num_rows", [0, 1, 2, 4, 5, 31, 128, 129, 200])
@pytest.mark.parametrize(("num_out", "num_in"), [(96, 40), (97, 40), (160, 33)])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_equals_torch_at_any_number_of_rows(num_rows, num_out, num_in, bias) -> None:
    torch.manual_seed(0)
    weight, b = torch.randn(num_out, num_in), torch.randn(num_out) if bias else None
    x = torch.randn(num_rows, num_in)
    torch.testing.assert_close(Linear(weight, b)(x), functional.linear(x, weight, b), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rms_norm_equals_torch(dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(5, 40, dtype=dtype), torch.randn(40, dtype=dtype)
    expected = functional.rms_norm(x.double(), (40,), weight.double(), 1e-5).to(dtype)
    torch.testing.assert_close(RMSNorm(weight, 1e-5)(x), expected)


def test_rms_norm_takes_a_weight_of_its_own_for_each_head() -> None:
    x, weight = torch.randn(5, 3, 16), torch.randn(3, 16)
    expected = torch.stack([functional.rms_norm(x[:, h], (16,), weight[h], 1e-6) for h in range(3)], 1)
    torch.testing.assert_close(RMSNorm(weight, 1e-6)(x), expected)


def test_rms_norm_of_nothing_is_nothing() -> None:
    assert torch.equal(RMSNorm(torch.ones(8), 1e-6)(torch.zeros(1, 8)), torch.zeros(1, 8))


def test_swiglu_gates_with_the_first_half() -> None:
    gate, up = torch.randn(2, 4, 6)
    torch.testing.assert_close(swiglu(torch.cat((gate, up), -1)), functional.silu(gate) * up)
