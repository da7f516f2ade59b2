"""Llama: the decoder of Llama 2/3, Mistral, SmolLM2, Qwen2 and Qwen3, top to bottom. Knows no request and no sampling.

A packed batch of tokens goes through `embed`, every `DecoderLayer` in turn, and `logits` of the rows that are sampled.
How KV is stored and read is the business of the `Attention` that is passed in. Where the model is split over ranks,
sizes here are this rank's and its `Shard` joins the parts (parallel.py).

Shape legend: T tokens, E hidden size, H query heads, K kv heads, D head dim, V vocabulary, S sampled rows.
"""

import torch
from torch.nn import functional

from memserve.model.attention.base import LayerAttention
from memserve.model.decode_graph import DecodeGraph
from memserve.model.layers import Linear, RMSNorm
from memserve.model.loader import Loader
from memserve.model.model_config import ModelConfig
from memserve.model.ops import Ops, Stream
from memserve.model.parallel import WHOLE, Shard
from memserve.model.rope import RotaryEmbedding, Rotation
from memserve.model.weights import WeightSource


class SelfAttention(torch.nn.Module):
    """Grouped-query attention. The rows of `qkv` are all query heads, then all key heads, then all value heads."""

    def __init__(self, config: ModelConfig, load: Loader, prefix: str) -> None:
        super().__init__()
        c = config
        self.num_heads, self.num_kv_heads, self.head_dim = c.num_heads, c.num_kv_heads, c.head_dim
        rows = {"q_proj": c.num_heads * c.head_dim, "k_proj": c.num_kv_heads * c.head_dim}
        rows["v_proj"] = rows["k_proj"]
        self.qkv = load.linear(prefix, rows, c.hidden_size, c.qkv_bias)
        self.o = load.summed_linear(f"{prefix}.o_proj", c.hidden_size, c.num_heads * c.head_dim, c.o_bias)
        self.qk_norm = RMSNorm(self._qk_norm_weight(load, prefix), c.rms_norm_eps) if c.qk_norm else None

    def _qk_norm_weight(self, load: Loader, prefix: str) -> torch.Tensor:
        """[H + K, D]: the norm's weight for each query and key head."""
        q_D = load.tensor(f"{prefix}.q_norm.weight", (self.head_dim,))
        k_D = load.tensor(f"{prefix}.k_norm.weight", (self.head_dim,))
        return torch.cat((q_D.expand(self.num_heads, -1), k_D.expand(self.num_kv_heads, -1)))

    def forward(self, layer: int, x_TE: torch.Tensor, rotation: Rotation, attention: LayerAttention) -> torch.Tensor:
        """Of normed hidden states, [T, E]; writes their KV. Of a model split over ranks, this rank's addend."""
        qkv_THD = self.qkv(x_TE).view(len(x_TE), -1, self.head_dim)
        num_rotated = self.num_heads + self.num_kv_heads
        qk_THD = qkv_THD[:, :num_rotated]
        if self.qk_norm is not None:
            qk_THD = attention.ops.norm(self.qk_norm, qk_THD)
        q_THD = attention.rotate_and_write(layer, qk_THD, qkv_THD[:, num_rotated:], rotation)
        y_TE: torch.Tensor = self.o(attention.attend(layer, q_THD).flatten(1))
        return y_TE


class MLP(torch.nn.Module):
    """SwiGLU. The rows of `gate_up` are the gate's, then the up projection's."""

    def __init__(self, config: ModelConfig, load: Loader, prefix: str) -> None:
        super().__init__()
        rows = {"gate_proj": config.intermediate_size, "up_proj": config.intermediate_size}
        self.gate_up = load.linear(prefix, rows, config.hidden_size, config.mlp_bias)
        self.down = load.summed_linear(
            f"{prefix}.down_proj", config.hidden_size, config.intermediate_size, config.mlp_bias
        )

    def forward(self, x_TE: torch.Tensor, ops: Ops) -> torch.Tensor:
        y_TE: torch.Tensor = self.down(ops.swiglu(self.gate_up(x_TE)))
        return y_TE


class DecoderLayer(torch.nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, load: Loader, layer: int) -> None:
        super().__init__()
        prefix = f"model.layers.{layer}"
        self.number, self._shard = layer, load.shard
        self.attention_norm = load.norm(f"{prefix}.input_layernorm", config.hidden_size, config.rms_norm_eps)
        self.attention = SelfAttention(config, load, f"{prefix}.self_attn")
        self.mlp_norm = load.norm(f"{prefix}.post_attention_layernorm", config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, load, f"{prefix}.mlp")

    def forward(self, stream: Stream, rotation: Rotation, attention: LayerAttention) -> Stream:
        """Writes this layer's KV and reads it through `attention`."""
        ops = attention.ops
        x_TE, normed_TE = ops.add_norm(self.attention_norm, stream)
        attended_TE = self._shard.sum(self.attention(self.number, normed_TE, rotation, attention))
        x_TE, normed_TE = ops.add_norm(self.mlp_norm, (x_TE, attended_TE))
        return x_TE, self._shard.sum(self.mlp(normed_TE, ops))


class Llama(torch.nn.Module):
    """The decoder. One object serves any number of runners: it holds weights and nothing that changes.

    config: as this rank sees the model, see `Shard.config`.  shard: which part of it the rank holds.
    """

    embedding_VE: torch.Tensor

    def __init__(self, config: ModelConfig, load: Loader) -> None:
        super().__init__()
        self.config = config = load.shard.config(config)
        self.dtype, self.device, self.shard = load.dtype, load.device, load.shard
        self.decode_graph: DecodeGraph | None = None
        self.captures_decode = False
        shape = (config.vocab_size, config.hidden_size)
        self.register_buffer("embedding_VE", load.tensor("model.embed_tokens.weight", shape))
        self.rotary = RotaryEmbedding(config, load.dtype, load.device)
        self.layers = torch.nn.ModuleList(DecoderLayer(config, load, i) for i in range(config.num_layers))
        self.norm = load.norm("model.norm", config.hidden_size, config.rms_norm_eps)
        self.head = Linear(self._head_PE(load))

    def _head_PE(self, load: Loader) -> torch.Tensor:
        """This rank's P rows of the head, [P, E]."""
        if self.config.tie_embeddings:
            return load.shard.part(self.embedding_VE, 0)
        return load.rows("lm_head.weight", (self.config.vocab_size // load.shard.size, self.config.hidden_size))

    def compile(self) -> None:
        """Lets decode steps run as one graph, built when a runner starts: on a GPU each runner captures its own
        (`CapturedDecode`), elsewhere all share a compiled one (`DecodeGraph`).

        Raises ValueError where that cannot be: on a model split over ranks, and see `DecodeGraph`.
        """
        if self.shard.size > 1:
            raise ValueError(
                f"model.compile=true: contradicts a model split over {self.shard.size} ranks, expected false"
            )
        self.captures_decode = self.device.type == "cuda"
        if not self.captures_decode:
            self.decode_graph = DecodeGraph(self)

    def embed(self, token_ids_T: torch.Tensor) -> Stream:
        """int64 [T] -> what the first layer takes."""
        return functional.embedding(token_ids_T, self.embedding_VE), None

    def logits(self, stream: Stream, ops: Ops) -> torch.Tensor:
        """Of S rows that left the last layer, [S, V]; see `Shard.gather` for ranks that do not sample."""
        _, normed_SE = ops.add_norm(self.norm, stream)
        return self.shard.gather(self.head(normed_SE))


def load_model(
    config: ModelConfig, source: WeightSource, dtype: torch.dtype, device: torch.device, shard: Shard = WHOLE
) -> Llama:
    """Builds the decoder with the weights of `source`, converted to `dtype` on `device`, one tensor at a time.

    config: of the whole model.  shard: the part of it that this rank loads and computes. Nothing else is copied out of
    safetensors files; other sources make a whole tensor, of which the part is kept.

    Raises ValueError naming a size that does not divide by the number of ranks, before any tensor is read; or a tensor
    that is missing, has another shape than the config says, or has no place in the decoder.
    """
    load = Loader(source, dtype, device, shard)
    model = Llama(config, load)
    load.check_all_used()
    return model
