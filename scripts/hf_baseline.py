"""HFBaseline: the same weights in transformers, timed through `generate`. Knows nothing of memserve's runner."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LogitsProcessor

from memserve.clock import monotonic_ns, to_s
from memserve.model.model_config import ModelConfig
from memserve.model.weights import WeightSource


class _StepTimes(LogitsProcessor):
    """Called by `generate` after every forward: notes when, changes nothing."""

    def __init__(self) -> None:
        self.times_ns: list[int] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.times_ns.append(monotonic_ns())
        return scores


class HFBaseline:
    """A float32 model of transformers with sdpa attention and its dynamic cache."""

    def __init__(self, config: ModelConfig, source: WeightSource) -> None:
        self._model = AutoModelForCausalLM.from_config(hf_config(config), attn_implementation="sdpa").float().eval()
        state = {name: source.tensor(name) for name in source.names()}
        if config.tie_embeddings:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        self._model.load_state_dict(state, strict=True)

    @torch.inference_mode()
    def generate(self, prompts: Sequence[np.ndarray], num_new: int) -> tuple[float, list[float], np.ndarray]:
        """Greedy, prompts padded on the left.

        Returns the seconds to the first token, the seconds of each of the num_new - 1 steps after it, and the tokens,
        int64 [num_prompts, num_new].
        """
        longest = max(len(prompt) for prompt in prompts)
        ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
            mask[row, longest - len(prompt) :] = 1
        times = _StepTimes()
        start_ns = monotonic_ns()
        out = self._model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=num_new,
            min_new_tokens=num_new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            logits_processor=[times],
        )
        steps = [to_s(int(t)) for t in np.diff(times.times_ns)]
        return to_s(times.times_ns[0] - start_ns), steps, out[:, longest:].numpy()


def hf_config(config: ModelConfig) -> object:
    """The same model as a configuration of transformers. Raises ValueError for a RoPE that is scaled."""
    c = config
    if c.rope_scaling is not None:
        raise ValueError(f"rope kind {c.rope_scaling.kind!r}: the baseline is built for plain RoPE only, use --no-hf")
    return AutoConfig.for_model(
        c.model_type,
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        max_position_embeddings=c.max_position,
        rms_norm_eps=c.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        tie_word_embeddings=c.tie_embeddings,
        attention_bias=c.o_bias,
        mlp_bias=c.mlp_bias,
        sliding_window=None,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
