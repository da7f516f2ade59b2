"""The Triton backend and CUDA graphs on a GPU; what is claimed of them without one is in tests/model/kernels."""

import numpy as np
import pytest
import torch
from mini_engine import LAYOUTS, MiniEngine, logits_of
from small_models import SMALL, five_prompts, random_model

from memserve.model.llama import Llama, load_model
from memserve.model.random_weights import RandomWeights
from memserve.transfer.block_copy import copy_rows, gather_rows, scatter_rows

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU here: run scripts/gpu_check.sh on a machine with one"
)
SEED, NUM_OUTPUT = 3, 12
# Of logits around 1, over three layers: a few units in the last of the dtype's bits. float32 products are not TF32.
LOGIT_BOUND = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1.5e-1}


def on_gpu(dtype: torch.dtype) -> Llama:
    return load_model(SMALL, RandomWeights(SMALL, SEED), dtype, torch.device("cuda"))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("block_size", [5, 16])
def test_greedy_tokens_in_float32_equal_those_of_the_cpu(layout, compiled, block_size) -> None:
    prompts = five_prompts(SMALL.vocab_size)
    expected = MiniEngine(random_model(SMALL, SEED), attention="reference").generate(prompts, NUM_OUTPUT)
    model = on_gpu(torch.float32)
    if compiled:
        model.compile()
    for num_steps in (1, 4):
        engine = MiniEngine(model, block_size, layout, "triton", num_blocks=256, scatter=True)
        assert engine.generate(prompts, NUM_OUTPUT, chunk=31, num_steps=num_steps) == expected


@pytest.mark.parametrize("dtype", LOGIT_BOUND)
def test_logits_are_within_their_bounds(dtype) -> None:
    prompt = five_prompts(SMALL.vocab_size)[4]
    expected = logits_of(random_model(SMALL, SEED, torch.float64), prompt, "reference", 9)
    actual = logits_of(on_gpu(dtype), prompt, "triton", 9).cpu().double()
    torch.testing.assert_close(actual, expected, atol=LOGIT_BOUND[dtype], rtol=LOGIT_BOUND[dtype])


@pytest.mark.parametrize("row_bytes", [48, 4096, 20])
def test_rows_are_copied_gathered_and_scattered(row_bytes) -> None:
    source, target = torch.randint(0, 255, (2, 64 * row_bytes), dtype=torch.uint8)
    rows = np.array([3, 60, 4, 17])
    expected = target.view(64, row_bytes).clone()
    expected[rows[::-1].copy()] = source.view(64, row_bytes)[rows]
    on_device = target.cuda()
    copy_rows(source.cuda(), rows, on_device, rows[::-1].copy(), row_bytes)
    assert torch.equal(on_device.cpu().view(64, row_bytes), expected)
    buffer = torch.empty(4 * row_bytes, dtype=torch.uint8, device="cuda")
    gather_rows(source.cuda(), rows, buffer, row_bytes)
    assert torch.equal(buffer.cpu().view(4, row_bytes), source.view(64, row_bytes)[rows])
    scatter_rows(buffer, on_device.zero_(), rows, row_bytes)
    assert torch.equal(on_device.cpu().view(64, row_bytes)[rows], source.view(64, row_bytes)[rows])
