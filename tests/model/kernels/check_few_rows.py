"""Products of few rows, with all that may be around them; run by test_interpreter.py under Triton's interpreter."""

import pytest
import torch

from memserve.model.kernels.configs import ProductConfig
from memserve.model.kernels.few_rows import (
    MAX_ROWS,
    NormOf,
    few_rows_launch,
    few_rows_reference,
    num_parts,
    squares_of,
)

AROUND = {
    "alone": (False, False, False, False),
    "norm": (True, False, False, False),
    "norm and bias": (True, False, True, False),
    "norm and SwiGLU": (True, True, False, False),
    "norm, SwiGLU and bias": (True, True, True, False),
    "sum": (False, False, False, True),
    "bias and sum": (False, False, True, True),
}
BOUND = 2**-7  # of what is stored in bfloat16: the interpreter cuts off the bits that a GPU rounds


def within_nan(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Contiguous, with NaN behind its end."""
    behind = torch.full((2 * torch.Size(shape).numel() + 4096,), torch.nan, dtype=dtype)
    tensor = behind[: torch.Size(shape).numel()].view(shape)
    return tensor.copy_(torch.randn(shape))


def cut(x: torch.Tensor) -> torch.Tensor:
    """float32 as the interpreter makes bfloat16 of it."""
    return (x.view(torch.int32) & -(1 << 16)).view(torch.float32).double()


@pytest.mark.parametrize(("num_in", "num_out"), [(16, 32), (72, 33), (576, 70), (300, 8)])
@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("num_rows", [1, 8, MAX_ROWS])
def test_products_equal_those_of_float64(num_rows, around, num_in, num_out) -> None:
    norm, gated, bias, add = AROUND[around]
    num_weights = 2 * num_out if gated else num_out
    x_TI, weight_WI = within_nan(num_rows, num_in), within_nan(num_weights, num_in) / num_in**0.5
    scale_I = within_nan(num_in, dtype=torch.float32) * num_in**0.5
    bias_W = within_nan(num_weights) if bias else None
    add_TO = within_nan(num_rows, num_out) if add else None
    behind = torch.full((num_rows * num_out + 64,), 7.0, dtype=torch.bfloat16)
    y_TO = behind[: num_rows * num_out].view(num_rows, num_out)
    y_TO.fill_(torch.nan)
    normed = NormOf(scale_I, 0.01, in_parts(x_TI)) if norm else None
    few_rows_launch(x_TI, weight_WI, y_TO, normed, bias_W, add_TO).run()
    around_it = [None if t is None else t.double() for t in (bias_W, add_TO)]
    reference = few_rows_reference(
        x_TI.double(), weight_WI.double(), num_out, (scale_I.double(), 0.01) if norm else None, *around_it
    )
    size = reference.square().mean().sqrt().clamp(min=1.0)
    assert (y_TO.double() - reference).square().mean().sqrt() < 2 * BOUND * size
    if norm:  # x * scale is cut as well, before it is divided; with that, only what is stored may differ
        root_T1 = (x_TI.double().square().sum(1, keepdim=True) + 0.01).sqrt()
        reference = few_rows_reference(cut(x_TI * scale_I) / root_T1, weight_WI.double(), num_out, None, *around_it)
    torch.testing.assert_close(y_TO.double(), reference, atol=BOUND / 4, rtol=BOUND)
    assert (behind[num_rows * num_out :] == 7.0).all()


def in_parts(x_TI: torch.Tensor, num_parts: int = 3) -> torch.Tensor:
    """The squares of x as sums over some of its features each, with NaN behind them: [T, P]."""
    parts = torch.stack([x.float().square().sum(1) for x in x_TI.chunk(num_parts, 1)], 1)
    return within_nan(*parts.shape, dtype=torch.float32).copy_(parts)


@pytest.mark.parametrize("num_rows", [1, 9])
def test_a_sum_leaves_its_squares_for_the_norm_after_it(num_rows) -> None:
    y_TI, weight_WI, x_TO = within_nan(num_rows, 72), within_nan(70, 72), within_nan(num_rows, 70)
    sum_TO, squares_TP = torch.empty_like(x_TO), torch.full((num_rows, num_parts(70)), torch.nan)
    few_rows_launch(y_TI, weight_WI, sum_TO, add_TO=x_TO, squares_TP=squares_TP).run()
    assert squares_TP.shape[1] > 1
    torch.testing.assert_close(squares_TP.sum(1, keepdim=True), squares_of(sum_TO))


@pytest.mark.parametrize("config", [ProductConfig(16, 64, 4, 3), ProductConfig(64, 32, 4, 4)])
def test_other_tiles_give_the_same(config) -> None:
    x_TI, weight_WI, y_TO = within_nan(5, 72), within_nan(40, 72), within_nan(5, 40)
    few_rows_launch(x_TI, weight_WI, y_TO, config=config).run()
    torch.testing.assert_close(y_TO.double(), x_TI.double() @ weight_WI.double().T, atol=BOUND, rtol=BOUND)
