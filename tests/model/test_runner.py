"""ModelRunner: however a prompt is cut, batched, cached and laid out, the tokens are the same."""

import itertools

import numpy as np
import pytest
import torch
from mini_engine import LAYOUTS, MiniEngine
from small_models import SMALL, five_prompts, random_model

from memserve.model.attention.reference import ReferenceAttention
from memserve.model.runner import ModelRunner, geometry
from memserve.request import ScheduledBatch

NUM_OUTPUT = 12


@pytest.fixture(scope="module")
def model():
    return random_model(SMALL, seed=3)


@pytest.fixture(scope="module")
def prompts():
    return five_prompts(SMALL.vocab_size)


@pytest.fixture(scope="module")
def expected(model, prompts):
    """Each prompt alone, in one chunk, with the plainest backend."""
    return [MiniEngine(model, 16, attention="reference").generate([p], NUM_OUTPUT)[0] for p in prompts]


@pytest.mark.parametrize(
    ("block_size", "layout", "attention"),
    list(itertools.product((1, 4, 16, 32), LAYOUTS, ("reference", "sdpa", "sparse"))),
)
def test_tokens_do_not_depend_on_block_size_layout_backend_or_batch(
    model, prompts, expected, block_size, layout, attention
) -> None:
    for scatter in (False, True):
        engine = MiniEngine(model, block_size, layout, attention, num_blocks=260 // block_size * 2, scatter=scatter)
        assert engine.generate(prompts, NUM_OUTPUT) == expected


@pytest.mark.parametrize(("chunk", "scatter"), list(itertools.product((1, 5, 16, 31), (False, True))))
def test_tokens_do_not_depend_on_the_chunk(model, prompts, expected, chunk, scatter) -> None:
    assert MiniEngine(model, 4, scatter=scatter).generate(prompts, NUM_OUTPUT, chunk=chunk) == expected


@pytest.mark.parametrize("num_cached", [16, 32, 80])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_cached_prefix_gives_the_same_tokens(model, prompts, expected, num_cached, layout) -> None:
    engine = MiniEngine(model, 16, layout)
    first = engine.request(prompts[4], max_tokens=NUM_OUTPUT)
    engine.finish([first])
    second = engine.request(prompts[4], cached_from=first, num_cached=num_cached, max_tokens=NUM_OUTPUT)
    assert engine.finish([second]) == [expected[4]]


def test_prefill_may_join_decode_in_one_batch(model, prompts, expected) -> None:
    engine = MiniEngine(model, 4, scatter=True)
    early = [engine.request(p, max_tokens=NUM_OUTPUT) for p in prompts[:2]]
    engine.step(early, [1, 33])
    late = [engine.request(p, max_tokens=NUM_OUTPUT) for p in prompts[2:]]
    engine.step([late[0], early[0], late[2], early[1], late[1]], [20, 1, 50, 1, 7])
    assert engine.finish(early + late) == expected


@pytest.mark.parametrize("num_steps", [2, 5, 12])
def test_several_decode_steps_in_one_batch_equal_single_steps(model, prompts, expected, num_steps) -> None:
    assert MiniEngine(model, 4, scatter=True).generate(prompts, NUM_OUTPUT, num_steps=num_steps) == expected


def test_several_decode_steps_draw_the_random_numbers_of_single_steps(model, prompts) -> None:
    def sampled(num_steps: int) -> list[list[int]]:
        engine = MiniEngine(model, 4)
        how = {"max_tokens": NUM_OUTPUT, "temperature": 1.0}
        return engine.finish([engine.request(p, **how) for p in prompts], num_steps=num_steps)

    assert sampled(1) == sampled(4)


def test_a_request_is_never_changed_by_the_runner(model, prompts) -> None:
    engine = MiniEngine(model, 16)
    request = engine.request(prompts[1], max_tokens=4)
    request.block_table.extend(np.arange(3, dtype=np.int32))
    engine.runner.forward(ScheduledBatch([request], [33]))
    assert (request.num_computed, request.num_tokens, len(request.block_table)) == (0, 33, 3)


def test_requests_whose_chunk_ends_early_sample_nothing(model, prompts) -> None:
    engine = MiniEngine(model, 16)
    a, b = (engine.request(p, max_tokens=4) for p in (prompts[1], prompts[2]))
    a.block_table.extend(np.arange(3, dtype=np.int32))
    b.block_table.extend(np.arange(3, 7, dtype=np.int32))
    output = engine.runner.forward(ScheduledBatch([a, b], [20, 64]))
    assert output.token_ids[0, 0] == -1 and output.token_ids[1, 0] >= 0
    assert engine.runner.forward(ScheduledBatch([a], [20])).token_ids.tolist() == [[-1]]


def test_each_layer_is_yielded_once_its_kv_is_written(model, prompts) -> None:
    engine = MiniEngine(model, 16)
    request = engine.request(prompts[1], max_tokens=4)
    request.block_table.extend(np.arange(3, dtype=np.int32))
    layers = engine.runner.forward_by_layer(ScheduledBatch([request], [33]))
    for layer in range(model.config.num_layers):
        assert next(layers) == layer
        assert not torch.is_inference_mode_enabled()
        written = [not engine.kv[i, :, :3].flatten(1, 2)[:, :33].isnan().any() for i in range(len(engine.kv))]
        assert written == [i <= layer for i in range(len(engine.kv))]
    with pytest.raises(StopIteration) as end:
        next(layers)
    assert end.value.value.token_ids.shape == (1, 1)


def test_several_steps_yield_each_layer_once(model, prompts) -> None:
    engine = MiniEngine(model, 16)
    request = engine.request(prompts[1], max_tokens=4)
    engine.step([request], [33])
    request.block_table.extend(np.arange(100, 101, dtype=np.int32))
    assert list(engine.runner.forward_by_layer(ScheduledBatch([request], [1], num_steps=3))) == [0, 1, 2]


def test_logprobs_come_back_with_the_request_that_asked(model, prompts) -> None:
    engine = MiniEngine(model, 16)
    requests = [engine.request(prompts[0], max_tokens=4), engine.request(prompts[3], max_tokens=4, logprobs=2)]
    for i, request in enumerate(requests):
        request.block_table.append(i)
    output = engine.runner.forward(ScheduledBatch(requests, [1, 7]))
    assert output.logprobs is not None and output.logprobs[0] is None
    assert output.logprobs[1].token_id == output.token_ids[1, 0] and len(output.logprobs[1].top) == 2


def test_runners_may_share_a_model(model, prompts, expected) -> None:
    engines = [MiniEngine(model, 4), MiniEngine(model, 16, "aggregated")]
    requests = [[e.request(p, max_tokens=NUM_OUTPUT) for p in prompts[1:3]] for e in engines]
    for _ in range(NUM_OUTPUT):
        for engine, mine in zip(engines, requests, strict=True):
            engine.step(mine, [r.num_to_compute for r in mine])
    assert [[r.output_token_ids.tolist() for r in mine] for mine in requests] == [expected[1:3]] * 2


@pytest.mark.parametrize(
    "kv", [torch.zeros(3, 2, 8, 16, 2, 8), torch.zeros(3, 2, 8, 8, 2, 16), torch.zeros(3, 2, 8, 16, 2, 16).half()]
)
def test_a_cache_that_does_not_fit_the_model_is_refused(model, kv) -> None:
    with pytest.raises(ValueError, match="kv: "):
        ModelRunner(model, kv, 16)


def test_an_unknown_attention_backend_is_refused_with_the_words_there_are(model) -> None:
    with pytest.raises(ValueError, match="attention='flash3': expected one of reference, sdpa, sparse, triton, or"):
        ModelRunner(model, torch.zeros(3, 2, 8, 16, 2, 16), 16, attention="flash3")


def test_geometry_is_the_models(model) -> None:
    g = geometry(model.config, 32, torch.float32)
    assert (g.num_layers, g.block_size, g.num_kv_heads, g.head_dim) == (3, 32, 2, 16)


class OneHead(ReferenceAttention):
    def attend(self, layer, q_THD):
        return super().attend(layer, q_THD)[:, :1]


class NoReturn(ReferenceAttention):
    def attend(self, layer, q_THD):
        super().attend(layer, q_THD)


class InDouble(ReferenceAttention):
    def attend(self, layer, q_THD):
        return super().attend(layer, q_THD).double()


@pytest.mark.parametrize(
    ("kind", "said"),
    [(OneHead, r"torch\.float32 \[5, 1, \d+\]"), (NoReturn, "None"), (InDouble, r"torch\.float64 \[5, \d+, \d+\]")],
)
def test_an_attention_that_gives_something_else_than_layers_take_is_refused_in_the_first_step(
    model, kind, said
) -> None:
    engine = MiniEngine(model, 16, attention=f"{__name__}.{kind.__name__}")
    expected = r"torch\.float32 \[5, \d+, \d+\], as the queries"
    with pytest.raises(ValueError, match=rf"{kind.__name__}\.attend gave {said}: expected {expected}"):
        engine.generate([np.arange(5, dtype=np.int32)], 2)
