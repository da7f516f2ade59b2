"""WeightSource: where a model's tensors come from, by Hugging Face name. Knows no file format and builds no model."""

from typing import Protocol

import torch

from memserve.model.model_config import ModelConfig

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class WeightFileError(ValueError):
    """A weight file is missing, truncated, corrupt, or of a kind that cannot be read; the message names the file."""


class WeightSource(Protocol):
    """Tensors by the names that a Hugging Face checkpoint gives them, each read when it is asked for."""

    def names(self) -> set[str]:
        """Every tensor there is."""

    def shape(self, name: str) -> tuple[int, ...]:
        """What `tensor` would give, told without reading it. Raises KeyError for a name that is not in `names()`."""

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor in the file's shape and dtype, read-only: it may be a view of a mapped file.

        Raises KeyError for a name that is not in `names()`, WeightFileError if the file cannot be read.
        """


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor the decoder needs, by Hugging Face name; a linear layer is [features out, features in]."""
    c = config
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (c.vocab_size, c.hidden_size),
        "model.norm.weight": (c.hidden_size,),
    }
    if not c.tie_embeddings:
        shapes[HEAD] = (c.vocab_size, c.hidden_size)
    for i in range(c.num_layers):
        shapes.update({f"model.layers.{i}.{name}": shape for name, shape in _layer_shapes(c).items()})
    return shapes


def check_tensors(config: ModelConfig, source: WeightSource) -> None:
    """Raises ValueError naming a tensor that the decoder needs and `source` lacks or has in another shape, or one that
    the decoder has no place for: left out it would change the answers. Reads none of them.
    """
    expected, held = tensor_shapes(config), source.names()
    if config.tie_embeddings and HEAD in held:  # a tied pair may be stored twice, or under the head's name alone
        expected[HEAD] = expected[EMBEDDING] if EMBEDDING in held else expected.pop(EMBEDDING)
    if missing := sorted(expected.keys() - held):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"weights have no tensor {missing[0]!r}{more}, which the model's config asks for")
    for name, shape in expected.items():
        if source.shape(name) != shape:
            raise ValueError(f"{name}: shape {source.shape(name)} in the weights, {shape} by the config")
    left = sorted(name for name in held - expected.keys() if not name.endswith(".rotary_emb.inv_freq"))
    if left:
        raise ValueError(f"weights have {len(left)} tensors the model has no place for: {', '.join(left[:4])} ...")


def _layer_shapes(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    num_q, num_kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    linear = {  # name -> features out, features in, whether there is a bias
        "self_attn.q_proj": (num_q, c.hidden_size, c.qkv_bias),
        "self_attn.k_proj": (num_kv, c.hidden_size, c.qkv_bias),
        "self_attn.v_proj": (num_kv, c.hidden_size, c.qkv_bias),
        "self_attn.o_proj": (c.hidden_size, num_q, c.o_bias),
        "mlp.gate_proj": (c.intermediate_size, c.hidden_size, c.mlp_bias),
        "mlp.up_proj": (c.intermediate_size, c.hidden_size, c.mlp_bias),
        "mlp.down_proj": (c.hidden_size, c.intermediate_size, c.mlp_bias),
    }
    norms = ["input_layernorm", "post_attention_layernorm"]
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (c.hidden_size,) for name in norms}
    shapes.update({f"{name}.weight": (out, inp) for name, (out, inp, _) in linear.items()})
    shapes.update({f"{name}.bias": (out,) for name, (out, _, bias) in linear.items() if bias})
    if c.qk_norm:
        shapes.update({f"self_attn.{name}.weight": (c.head_dim,) for name in ("q_norm", "k_norm")})
    return shapes
