"""Decode steps of Llama-3-8B's shape on a GPU, random weights in bfloat16: ours, and Hugging Face's. Prints nothing."""

import functools
import statistics
from collections.abc import Callable

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

from memserve.clock import monotonic_ns, to_s
from memserve.kvcache.layout import DiscreteLayout
from memserve.model.llama import Llama, load_model
from memserve.model.model_config import ModelConfig
from memserve.model.runner import ModelRunner, geometry
from memserve.model.weights import tensor_shapes
from memserve.request import Request, SamplingParams, ScheduledBatch

DTYPE, BLOCK_SIZE = torch.bfloat16, 16
NUM_STEPS, WARM_UP_STEPS = 20, 3
MODEL = ModelConfig(
    model_type="llama",
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    max_position=8192,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
)


class DrawnWeights:
    """A WeightSource that draws each tensor on the GPU when it is asked for: timing needs no better ones."""

    def names(self) -> set[str]:
        return set(tensor_shapes(MODEL))

    def tensor(self, name: str) -> torch.Tensor:
        return 0.02 * torch.randn(tensor_shapes(MODEL)[name], dtype=DTYPE, device="cuda")


@functools.lru_cache(maxsize=1)
def _our_model() -> Llama:
    model = load_model(MODEL, DrawnWeights(), DTYPE, torch.device("cuda"))
    model.compile()
    return model


def our_step_s(batch: int, context: int) -> float:
    """Median seconds of `ModelRunner.forward`: inputs copied, the graph replayed, greedy tokens read."""
    blocks_each = -(-context // BLOCK_SIZE)
    model = _our_model()
    shape = DiscreteLayout().shape(geometry(MODEL, BLOCK_SIZE, DTYPE), batch * blocks_each)
    runner = ModelRunner(model, torch.randn(shape, dtype=DTYPE, device="cuda"), BLOCK_SIZE, attention="triton")
    blocks = np.random.default_rng(0).permutation(batch * blocks_each).astype(np.int32)
    requests = []
    for table in np.split(blocks, batch):
        request = Request("r", np.ones(context, dtype=np.int32), SamplingParams())
        request.num_computed = context - 1
        request.block_table.extend(table)
        requests.append(request)
    scheduled = ScheduledBatch(requests, [1] * batch)
    return _median_s(lambda: runner.forward(scheduled))


@torch.inference_mode()
def hugging_face_step_s(batch: int, context: int) -> float:
    """Median seconds of a forward of transformers with sdpa attention and its static cache, greedy tokens read."""
    model = _hugging_face_model()
    cache = StaticCache(config=model.config, max_cache_len=context + NUM_STEPS + WARM_UP_STEPS)
    tokens = torch.ones(batch, context - 1, dtype=torch.int64, device="cuda")
    for part in tokens.split(256, 1):
        model(part, past_key_values=cache, logits_to_keep=1)
    one = tokens[:, :1]

    def step() -> None:
        out = model(one, past_key_values=cache)  # each step adds its token, as it does for a user
        out.logits[:, -1].argmax(-1).cpu()

    return _median_s(step)


@functools.lru_cache(maxsize=1)
def _hugging_face_model() -> torch.nn.Module:
    config = AutoConfig.for_model(
        "llama",
        vocab_size=MODEL.vocab_size,
        hidden_size=MODEL.hidden_size,
        intermediate_size=MODEL.intermediate_size,
        num_hidden_layers=MODEL.num_layers,
        num_attention_heads=MODEL.num_heads,
        num_key_value_heads=MODEL.num_kv_heads,
        max_position_embeddings=MODEL.max_position,
    )
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(config, dtype=DTYPE, attn_implementation="sdpa").eval()


def _median_s(run: Callable[[], object]) -> float:
    times = []
    for i in range(NUM_STEPS + WARM_UP_STEPS):
        start_ns = monotonic_ns()
        run()
        torch.cuda.synchronize()
        if i >= WARM_UP_STEPS:
            times.append(to_s(monotonic_ns() - start_ns))
    return statistics.median(times)
