"""The other kernels, and a whole model, against plain torch; run by test_interpreter.py under Triton's interpreter."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from kernels.interpreted import LAYOUTS, TOLERANCE, paged
from mini_engine import MiniEngine, logits_of
from small_models import SMALL, five_prompts, random_model

from memserve.model.kernels.kv_write import kv_write_launch, kv_write_reference
from memserve.model.kernels.norm import norm_launch, norm_reference
from memserve.model.kernels.swiglu import swiglu_launch, swiglu_reference
from memserve.transfer.row_kernel import row_copy_launch


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("num_features", [16, 80, 1500])
def test_norm_with_and_without_the_residual(dtype, num_features) -> None:
    x_TE, delta_TE = torch.randn(2, 5, num_features).to(dtype)
    scale_E = torch.randn(num_features)
    bound = {"atol": 4 * TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    y_TE, sum_TE = torch.full((2, 5, num_features), torch.nan, dtype=dtype)
    norm_launch(x_TE, None, None, y_TE, scale_E, 0.01).run()
    torch.testing.assert_close(y_TE.double(), norm_reference(x_TE.double(), scale_E.double(), 0.01), **bound)
    norm_launch(x_TE, delta_TE, sum_TE, y_TE, scale_E, 0.01).run()
    torch.testing.assert_close(sum_TE.double(), x_TE.double() + delta_TE.double(), **bound)
    torch.testing.assert_close(y_TE.double(), norm_reference(sum_TE.double(), scale_E.double(), 0.01), **bound)


def test_norm_of_heads_takes_a_scale_for_each_and_rows_with_gaps() -> None:
    x_TWE = torch.randn(3, 9, 24)[:, :7]
    scale_WE = torch.randn(7, 24)
    y_TWE = torch.full((3, 7, 24), torch.nan)
    norm_launch(x_TWE, None, None, y_TWE, scale_WE, 0.01).run()
    torch.testing.assert_close(y_TWE, norm_reference(x_TWE, scale_WE, 0.01))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_swiglu(dtype) -> None:
    gate_up_TO = torch.randn(3, 2 * 1300).to(dtype)
    out_TF = torch.full((3, 1300), torch.nan, dtype=dtype)
    swiglu_launch(gate_up_TO, out_TF).run()
    expected = swiglu_reference(gate_up_TO.double())
    torch.testing.assert_close(out_TF.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [(torch.float32, 80), (torch.float32, 96), (torch.float16, 64), (torch.float16, 256), (torch.bfloat16, 24),
     (torch.bfloat16, 128)],
)  # fmt: skip
def test_kv_write_rotates_and_touches_the_slots_of_its_tokens_alone(dtype, head_dim, layout) -> None:
    num_heads, num_kv_heads = 6, 2
    kv_2NBKD = paged([(0, 20)], dtype, num_kv_heads, head_dim=head_dim, block_size=5, layout=layout).kv_2NBKD
    kv_2NBKD.fill_(7.0)
    qkv_THD = torch.randn(4, num_heads + 2 * num_kv_heads, head_dim).to(dtype)
    qk_THD, v_TKD = qkv_THD.split((num_heads + num_kv_heads, num_kv_heads), 1)
    cos, sin = torch.randn(2, 4, 1, 1, head_dim // 2).to(dtype)
    cos, sin = cos.repeat(1, 1, 2, 1), torch.cat((-sin, sin), 2)
    slots_T = torch.tensor([13, -1, 4, 20])  # the second is a padding row
    q_THD = torch.full((4, num_heads, head_dim), torch.nan, dtype=dtype)
    expected = kv_2NBKD.double()
    expected_q = kv_write_reference(qk_THD.double(), v_TKD.double(), cos.double(), sin.double(), expected, slots_T)
    kv_write_launch(qk_THD, v_TKD, cos, sin, q_THD, kv_2NBKD, slots_T).run()
    bound = TOLERANCE[dtype]
    torch.testing.assert_close(q_THD.double(), expected_q, atol=bound, rtol=bound)
    torch.testing.assert_close(kv_2NBKD.double(), expected, atol=bound, rtol=bound)
    assert (kv_2NBKD == 7.0).all((0, 3, 4)).sum() == kv_2NBKD[0, :, :, 0, 0].numel() - 3


@pytest.mark.parametrize("row_bytes", [8, 12, 6, 5, 8200])
def test_rows_are_copied_and_no_other_byte(row_bytes) -> None:
    source, target = torch.randint(0, 255, (2, 9 * row_bytes), dtype=torch.uint8)
    expected = target.clone().view(9, row_bytes)
    source_rows, target_rows = torch.tensor([8, 0, 3, 3]), torch.tensor([1, 7, 2, 0])
    expected[target_rows] = source.view(9, row_bytes)[source_rows]
    row_copy_launch(source, source_rows, target, target_rows, row_bytes).run()
    assert torch.equal(target.view(9, row_bytes), expected)


def test_rows_wider_than_a_grid_is_high_are_one_launch() -> None:
    """CUDA takes 65,535 programs in any dimension of a grid but the first."""
    memory, rows = torch.empty(1 << 40, dtype=torch.uint8, device="meta"), torch.empty(8, dtype=torch.int64)
    launch = row_copy_launch(memory, rows, memory, rows, 1 << 32)
    assert max(launch.grid[1:], default=1) < 1 << 16
    assert np.prod(launch.grid) * launch.constants["BLOCK_WORDS"] * 8 == len(rows) << 32


def test_a_whole_model_gives_the_logits_and_tokens_of_plain_torch() -> None:
    model = random_model(replace(SMALL, num_layers=2), seed=3)
    prompt = np.random.default_rng(0).integers(0, SMALL.vocab_size, 12).tolist()
    torch.testing.assert_close(logits_of(model, prompt, "triton", 6), logits_of(model, prompt, "reference", 6))
    prompts = [p[:16] for p in five_prompts(SMALL.vocab_size)[:3]]
    torch_tokens, kernel_tokens = (
        MiniEngine(model, 5, "aggregated", attention, scatter=True).generate(prompts, 3, chunk=13)
        for attention in ("reference", "triton")
    )
    assert kernel_tokens == torch_tokens


def test_kv_write_reaches_kv_heads_past_two_to_the_31st_element() -> None:
    memory = torch.empty(2 * 2**30 + 4096, dtype=torch.float16)  # never touched but where the heads lie
    kv_2NBKD = memory.as_strided((2, 1, 4, 3, 16), (2048, 64, 16, 2**30, 1)).fill_(7.0)
    qk_THD, v_TKD = torch.randn(1, 4, 16).half(), torch.randn(1, 3, 16).half()
    cos, sin = torch.ones(1, 1, 2, 8).half(), torch.zeros(1, 1, 2, 8).half()
    q_THD = torch.empty(1, 1, 16).half()
    kv_write_launch(qk_THD, v_TKD, cos, sin, q_THD, kv_2NBKD, torch.tensor([2])).run()
    assert torch.equal(kv_2NBKD[0, 0, 2], qk_THD[0, 1:]) and torch.equal(kv_2NBKD[1, 0, 2], v_TKD[0])
    assert (kv_2NBKD[:, :, [0, 1, 3]] == 7.0).all()
