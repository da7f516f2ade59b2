"""A padded decode step, as CUDA graphs record it; run by test_interpreter.py under Triton's interpreter."""

from dataclasses import replace

import torch
from mini_engine import MiniEngine, RecordingSampler
from small_models import SMALL, random_model

from memserve.model.batch import build_forward_batch
from memserve.model.captured_decode import StaticInputs, decode_step
from memserve.request import ScheduledBatch


def test_padding_rows_write_nowhere_and_change_no_answer() -> None:
    model = random_model(replace(SMALL, num_layers=1), seed=1)
    sampler = RecordingSampler()
    engine = MiniEngine(model, 4, attention="reference", num_blocks=8, scatter=True, sampler=sampler)
    requests = [engine.request(prompt, max_tokens=4) for prompt in ([5, 6, 7], [8, 9, 3, 1, 2])]
    engine.step(requests, [3, 5])
    batch = build_forward_batch(ScheduledBatch(requests, [1, 1]), 4, torch.device("cpu"))
    kv = engine.kv.clone()
    inputs = StaticInputs(4, max_blocks=8, device=torch.device("cpu"))
    inputs.fill(batch)
    logits_RV = decode_step(model, inputs, kv.unbind(0))
    engine.step(requests, [1, 1])
    torch.testing.assert_close(logits_RV[:2], sampler.logits[-1])
    torch.testing.assert_close(kv, engine.kv, equal_nan=True)
