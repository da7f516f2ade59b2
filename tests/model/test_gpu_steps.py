"""What a step asks of a GPU: when it waits, what a captured one replays, and that its answers are a CPU's.

Small enough for the stand-in of a GPU (tests/stand_in), on which these run where there is no other.
"""

import gc
import warnings
from dataclasses import replace

import pytest
import torch
from mini_engine import MiniEngine, RecordingSampler
from small_models import SMALL, random_model

from memserve.model import captured_decode
from memserve.model.llama import Llama, load_model
from memserve.model.random_weights import RandomWeights

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU here: run scripts/gpu_check.sh on a machine with one"
)
SEED, BLOCK_SIZE = 3, 4
ONE_LAYER = replace(SMALL, num_layers=1)
PROMPTS = [[5], [7, 8, 9], [3, 1, 4, 1], [2, 7, 1, 8, 2], [1, 6, 1, 8, 0, 3, 3, 9, 8]]
WAYS_TO_SAMPLE = {
    "greedy": {},
    "temperature": {"temperature": 0.7, "seed": 1},
    "top_k": {"temperature": 0.7, "top_k": 5, "seed": 1},
    "top_p": {"temperature": 0.7, "top_p": 0.6, "seed": 1},
    "penalties": {"temperature": 0.7, "min_p": 0.1, "repetition_penalty": 1.3, "frequency_penalty": 0.5, "seed": 1},
}


def engine_on_gpu(*, compiled: bool, layout: str = "discrete") -> MiniEngine:
    model = load_model(ONE_LAYER, RandomWeights(ONE_LAYER, SEED), torch.float32, torch.device("cuda", 0))
    if compiled:
        model.compile()
    return MiniEngine(model, BLOCK_SIZE, layout, "triton", num_blocks=64, scatter=True)


def engine_on_cpu() -> MiniEngine:
    model = random_model(ONE_LAYER, SEED)
    return MiniEngine(model, BLOCK_SIZE, attention="reference", num_blocks=64)


@pytest.fixture
def waits():
    """A function: how often the host has waited since it was called last."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")  # which warns that it is a prototype

        def since_last() -> int:
            found = [w for w in said if "called a synchronizing CUDA operation" in str(w.message)]
            said.clear()
            return len(found)

        try:
            yield since_last
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("way", "compiled"), [*((way, False) for way in WAYS_TO_SAMPLE), ("greedy", True)])
def test_a_step_waits_for_its_tokens_and_for_nothing_else(way, compiled, waits) -> None:
    engine = engine_on_gpu(compiled=compiled)
    requests = [engine.request(PROMPTS[i], max_tokens=9, **params) for i, params in ((2, WAYS_TO_SAMPLE[way]), (4, {}))]
    waits()
    engine.step(requests, [4, 9])
    assert waits() == 1, "prompts"
    engine.step(requests, [1] * 2)
    assert waits() == 1, "a decode step"
    engine.step(requests, [1] * 2, num_steps=2)
    assert waits() == 2, "two steps in a row"
    engine.step([*requests, engine.request([1, 2, 3], max_tokens=2)], [1, 1, 3])
    assert waits() == 1, "both kinds in one step"


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "captured"])
def test_a_step_that_samples_nothing_waits_at_most_for_its_end(compiled, waits) -> None:
    engine = engine_on_gpu(compiled=compiled)
    request = engine.request(PROMPTS[4], max_tokens=9)
    for num_new in (4, 1, 3):
        waits()
        engine.step([request], [num_new])
        assert waits() <= 1


@pytest.mark.parametrize(("compiled", "layout"), [(False, "aggregated"), (True, "discrete")])
def test_requests_that_come_and_go_are_answered_as_on_a_cpu(compiled, layout) -> None:
    """Batches of one to five requests, so that buckets are full and partly empty, and blocks begin in every step."""

    def answers(engine: MiniEngine) -> list[list[int]]:
        requests = [engine.request(prompt, max_tokens=3 + 2 * i) for i, prompt in enumerate(PROMPTS)]
        for i, request in enumerate(requests):
            running = requests[: i + 1]
            engine.step(running, [1] * i + [request.num_tokens])
            engine.step(running, [1] * (i + 1))
        return engine.finish(requests, num_steps=2)

    assert answers(engine_on_gpu(compiled=compiled, layout=layout)) == answers(engine_on_cpu())


def test_no_garbage_is_collected_while_graphs_are_recorded(monkeypatch) -> None:
    """An engine of before, with its graphs, may be a part of it: they would end within the recording."""
    collects, step = set(), captured_decode.decode_step

    def watched(*args):
        collects.add(gc.isenabled())
        return step(*args)

    monkeypatch.setattr(captured_decode, "decode_step", watched)
    assert gc.isenabled()
    engine_on_gpu(compiled=True)
    assert collects == {False} and gc.isenabled()


@pytest.mark.parametrize("fused_rows", [0, 8], ids=["products apart", "products fused"])
def test_captured_logits_in_bfloat16_are_within_a_bound_of_float64(fused_rows) -> None:
    """Of prompts whose last token is a step of its own."""
    config, prompts = replace(SMALL, num_layers=2), PROMPTS[1:]

    def logits(model: Llama, attention: str) -> torch.Tensor:
        engine = MiniEngine(
            model, BLOCK_SIZE, attention=attention, num_blocks=64, sampler=(sampler := RecordingSampler())
        )
        requests = [engine.request(prompt, max_tokens=2) for prompt in prompts]
        engine.step(requests, [len(prompt) - 1 for prompt in prompts])
        engine.step(requests, [1] * len(prompts))
        return sampler.logits[-1].cpu().double()

    model = load_model(config, RandomWeights(config, SEED), torch.bfloat16, torch.device("cuda", 0))
    model.compile(fused_rows)
    expected_RV = logits(random_model(config, SEED, torch.float64), "reference")
    torch.testing.assert_close(logits(model, "triton"), expected_RV, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("fused_rows", [0, 8], ids=["products apart", "products fused"])
def test_steps_launched_early_give_the_logits_of_those_in_turn_bit_for_bit(fused_rows) -> None:
    """A kernel that did not wait for the one before would read what is not there yet."""

    def logits(early: bool) -> list[torch.Tensor]:
        model = load_model(ONE_LAYER, RandomWeights(ONE_LAYER, SEED), torch.bfloat16, torch.device("cuda", 0))
        model.compile(fused_rows, early)
        engine = MiniEngine(
            model, BLOCK_SIZE, attention="triton", num_blocks=64, sampler=(sampler := RecordingSampler())
        )
        engine.finish([engine.request(prompt, max_tokens=4) for prompt in PROMPTS[:3]])
        return [logits_RV.cpu() for logits_RV in sampler.logits]

    in_turn, early = logits(early=False), logits(early=True)
    assert len(in_turn) == len(early) > 1
    assert all(torch.equal(*pair) for pair in zip(in_turn, early, strict=True))


def test_fused_products_are_refused_in_another_dtype_and_for_more_rows_than_there_are() -> None:
    with pytest.raises(ValueError, match=r"model.fused_rows=1 on cuda:0 in torch.float32: expected 0"):
        load_model(SMALL, RandomWeights(SMALL, SEED), torch.float32, torch.device("cuda", 0)).compile(1)
    with pytest.raises(ValueError, match=r"model.fused_rows=17: expected 0 to 16"):
        load_model(SMALL, RandomWeights(SMALL, SEED), torch.bfloat16, torch.device("cuda", 0)).compile(17)


@pytest.mark.parametrize("params", WAYS_TO_SAMPLE.values(), ids=WAYS_TO_SAMPLE)
def test_tokens_drawn_on_a_gpu_are_those_drawn_on_a_cpu(params) -> None:
    def answers(engine: MiniEngine) -> list[list[int]]:
        return engine.finish([engine.request(prompt, max_tokens=4, **params) for prompt in PROMPTS[:3]])

    assert answers(engine_on_gpu(compiled=False)) == answers(engine_on_cpu())
