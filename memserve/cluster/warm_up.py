"""Warm-up: serves a few prompts on an instance of its own, so that no first-time cost falls into a measured step."""

from collections.abc import Iterable

import numpy as np

from memserve.instance import Instance
from memserve.messages import Dispatch, pack_tokens
from memserve.sampling_params import SamplingParams

WARM_UP_PROMPTS = (300, 64, 17)  # tokens; with the answers below, steps of every kind run once
WARM_UP_TOKENS = 8


def warm_up(instance: Instance) -> None:
    """Uses the instance up: whoever measures builds another."""
    params = SamplingParams(max_tokens=WARM_UP_TOKENS, ignore_eos=True)
    for name, tokens in _fitting(instance, params):
        instance.receive(Dispatch(name, 0, "", pack_tokens(tokens), params, 0))
    while (batch := instance.schedule(0)) is not None:
        instance.commit(batch, instance.forward(batch), np.zeros(batch.num_steps, dtype=np.int64))
        instance.drain_outbox()


def _fitting(instance: Instance, params: SamplingParams) -> Iterable[tuple[str, np.ndarray]]:
    """The prompts that this instance can serve."""
    limits = instance.limits
    most = min(limits.max_context, limits.num_blocks * limits.block_size) - params.max_tokens
    for length in WARM_UP_PROMPTS:
        if length < most:
            yield f"warm-up-{length}", np.arange(length, dtype=np.int32) % limits.vocab_size
