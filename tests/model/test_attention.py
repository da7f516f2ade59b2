"""Every attention backend against the reference in float64, over caches full of NaN."""

import itertools

import numpy as np
import pytest
import torch
from mini_engine import LAYOUTS

from memserve.kvcache.layout import CacheGeometry
from memserve.model.attention import attention_backend
from memserve.model.attention.reference import ReferenceAttention
from memserve.model.batch import ForwardBatch, build_forward_batch
from memserve.request import Request, ScheduledBatch
from memserve.sampling_params import SamplingParams

NUM_KV_HEADS, HEAD_DIM = 2, 24
# (tokens in the cache, new tokens): prefill, decode, chunks of one and of many, a lone first token
SHAPES = {
    "mixed": [(0, 17), (40, 1), (16, 30), (0, 1), (63, 1), (5, 2)],
    "decode": [(3, 1), (64, 1), (100, 1), (0, 1), (31, 1), (33, 1)],
    "prefill": [(0, 33), (0, 64)],
}


def make_batch(shape: list[tuple[int, int]], block_size: int, scatter: bool) -> ForwardBatch:
    num_blocks = [-(-(old + new) // block_size) for old, new in shape]
    numbers = np.arange(1, sum(num_blocks) + 1, dtype=np.int32)
    tables = np.random.default_rng(1).permutation(numbers) if scatter else numbers
    requests = []
    for (old, new), blocks in zip(shape, np.split(tables, np.cumsum(num_blocks)[:-1]), strict=True):
        request = Request("r", np.zeros(old + new, dtype=np.int32), SamplingParams())
        request.num_computed = old
        request.block_table.extend(blocks)
        requests.append(request)
    return build_forward_batch(ScheduledBatch(requests, [new for _, new in shape]), block_size, torch.device("cpu"))


def make_cache(batch: ForwardBatch, layout: str, dtype: torch.dtype) -> torch.Tensor:
    """kv[2, 2, N, B, K, D], NaN but for the tokens that the batch's requests hold from earlier steps."""
    geometry = CacheGeometry(2, batch.block_size, NUM_KV_HEADS, HEAD_DIM, dtype)
    num_blocks = int(batch.block_tables.max()) + 3
    kv = LAYOUTS[layout].view(torch.full(LAYOUTS[layout].shape(geometry, num_blocks), torch.nan, dtype=dtype))
    num_new = np.diff(batch.query_starts)
    for table, num_kv in zip(batch.block_tables, batch.seq_lens - num_new, strict=True):
        for position in range(num_kv):
            block, offset = table[position // batch.block_size], position % batch.block_size
            kv[:, :, block, offset] = torch.randn(2, 2, NUM_KV_HEADS, HEAD_DIM, dtype=dtype)
    return kv


def attend(backend: str, batch: ForwardBatch, kv: torch.Tensor, q: torch.Tensor, new_kv: torch.Tensor) -> torch.Tensor:
    attention = attention_backend(backend)(batch, kv.unbind(0), q.shape[1])
    attention.write(1, new_kv)
    return attention.attend(1, q)


@pytest.mark.parametrize(
    ("backend", "shape", "block_size", "layout", "num_groups", "scatter"),
    list(itertools.product(("sdpa", "sparse"), SHAPES, (1, 4, 16, 32), LAYOUTS, (1, 3), (False, True))),
)
def test_backends_equal_the_reference(backend, shape, block_size, layout, num_groups, scatter) -> None:
    torch.manual_seed(0)
    batch = make_batch(SHAPES[shape], block_size, scatter)
    kv = make_cache(batch, layout, torch.float64)
    q = torch.randn(batch.num_tokens, NUM_KV_HEADS * num_groups, HEAD_DIM, dtype=torch.float64)
    new_kv = torch.randn(batch.num_tokens, 2, NUM_KV_HEADS, HEAD_DIM, dtype=torch.float64)
    expected = attend("reference", batch, kv.clone(), q, new_kv)
    assert not expected.isnan().any()
    torch.testing.assert_close(attend(backend, batch, kv, q, new_kv), expected)
    actual = attend(backend, batch, kv.float(), q.float(), new_kv.float())
    torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=1e-5)


def test_the_reference_is_the_formula() -> None:
    torch.manual_seed(0)
    batch = make_batch([(2, 2)], 4, scatter=False)
    kv = make_cache(batch, "discrete", torch.float64)
    q = torch.randn(2, 2, HEAD_DIM, dtype=torch.float64)
    new_kv = torch.randn(2, 2, NUM_KV_HEADS, HEAD_DIM, dtype=torch.float64)
    actual = attend("reference", batch, kv, q, new_kv)
    block = int(batch.block_tables[0, 0])
    for token, head in itertools.product(range(2), range(2)):
        k, v = kv[1, :, block, : 3 + token, head]
        scores = torch.stack([q[token, head] @ k_i / HEAD_DIM**0.5 for k_i in k]).exp()
        torch.testing.assert_close(actual[token, head], (scores / scores.sum()) @ v)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_write_touches_the_slots_of_the_batch_and_nothing_else(layout) -> None:
    batch = make_batch([(3, 3), (5, 1)], 4, scatter=True)
    kv = make_cache(batch, layout, torch.float32).fill_(7.0)
    new_kv = torch.randn(4, 2, NUM_KV_HEADS, HEAD_DIM)
    ReferenceAttention(batch, kv.unbind(0), NUM_KV_HEADS).write(1, new_kv)
    slots = kv[1].flatten(1, 2)
    assert torch.equal(slots[:, batch.slot_mapping_T], new_kv.transpose(0, 1))
    untouched = torch.ones(slots.shape[1], dtype=torch.bool).index_fill(0, batch.slot_mapping_T, False)
    assert (slots[:, untouched] == 7.0).all() and (kv[0] == 7.0).all()
