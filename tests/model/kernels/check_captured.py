"""A padded decode step, as CUDA graphs record it; run by test_interpreter.py under Triton's interpreter."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from mini_engine import MiniEngine, RecordingSampler
from small_models import SMALL, random_model

from memserve.jit import KernelLaunch
from memserve.model.batch import build_forward_batch
from memserve.model.captured_decode import StaticInputs, decode_step
from memserve.model.llama import Llama
from memserve.request import Request, ScheduledBatch

CPU = torch.device("cpu")
ONE_LAYER = replace(SMALL, num_layers=1)
BIASED = replace(ONE_LAYER, qk_norm=False, o_bias=True, mlp_bias=True)


class Decoding:
    """Two requests whose prompts are computed, about to take a step among padding rows."""

    def __init__(self, model: Llama) -> None:
        self.model, self._sampler = model, RecordingSampler()
        self.engine = MiniEngine(model, 4, attention="reference", num_blocks=8, scatter=True, sampler=self._sampler)
        self.requests: list[Request] = [
            self.engine.request(prompt, max_tokens=4) for prompt in ([5, 6, 7], [8, 9, 3, 1, 2])
        ]
        self.engine.step(self.requests, [3, 5])

    def captured(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The step's logits of every row, and the cache after it; the engine stays as it is."""
        inputs = StaticInputs(4, max_blocks=8, device=CPU)
        inputs.fill(build_forward_batch(ScheduledBatch(self.requests, [1, 1]), 4, CPU))
        kv = self.engine.kv.clone()
        return decode_step(self.model, inputs, kv.unbind(0)), kv

    def step(self) -> torch.Tensor:
        """The same by plain torch: the logits of the two."""
        self.engine.step(self.requests, [1, 1])
        return self._sampler.logits[-1]


def test_padding_rows_write_nowhere_and_change_no_answer() -> None:
    decoding = Decoding(random_model(ONE_LAYER, seed=1))
    logits_RV, kv = decoding.captured()
    torch.testing.assert_close(logits_RV[:2], decoding.step())
    torch.testing.assert_close(kv, decoding.engine.kv, equal_nan=True)


@pytest.mark.parametrize("fused_rows", [0, 4])
def test_kernels_that_are_launched_early_are_all_of_ours_and_compute_the_same(fused_rows, monkeypatch) -> None:
    decoding = Decoding(random_model(ONE_LAYER, 1, torch.bfloat16))
    decoding.model.fused_rows = fused_rows
    expected_RV, early, run = decoding.captured()[0], [], KernelLaunch.run

    def watched(launch: KernelLaunch) -> None:
        early.append(launch.early)
        run(launch)

    monkeypatch.setattr(KernelLaunch, "run", watched)
    decoding.model.early_launches = True
    torch.testing.assert_close(decoding.captured()[0], expected_RV, atol=0, rtol=0, equal_nan=True)
    assert early and all(early)


@pytest.mark.parametrize("config", [ONE_LAYER, BIASED], ids=["norms of heads", "biases"])
def test_fused_products_are_as_near_to_float64_as_those_they_replace(config, monkeypatch) -> None:
    exact, decoding = (Decoding(random_model(config, 1, dtype)) for dtype in (torch.float64, torch.bfloat16))
    decoding.requests = exact.requests  # the same tokens, should a draw differ
    (apart_RV, _), launched = decoding.captured(), Counter()
    run = KernelLaunch.run

    def counted(launch: KernelLaunch) -> None:
        launched[launch.kernel.fn.__name__] += 1
        run(launch)

    monkeypatch.setattr(KernelLaunch, "run", counted)
    decoding.model.fused_rows = 4
    fused_RV, fused_kv = decoding.captured()
    expected_RV = exact.step()
    assert launched["_few_rows_kernel"] == 5 and launched["_norm_kernel"] == config.qk_norm
    assert launched.total() == 8 + config.qk_norm
    errors = [(logits_RV[:2].double() - expected_RV).abs().max() for logits_RV in (fused_RV, apart_RV)]
    assert errors[0] < 1.5 * errors[1] < 0.1
    torch.testing.assert_close(fused_kv.double(), exact.engine.kv, atol=0.05, rtol=0.05, equal_nan=True)
