"""Llama: the decoder of Llama 2/3, Mistral, SmolLM2, Qwen2 and Qwen3, top to bottom. Knows no request and no sampling.

A packed batch of tokens goes through `embed`, every `DecoderLayer` in turn, and `logits` of the rows that are sampled.
How KV is stored and read is the business of the `Attention` that is passed in. Where the model is split over ranks,
sizes here are this rank's and its `Shard` joins the parts (parallel.py).

Shape legend: T tokens, E hidden size, H query heads, K kv heads, D head dim, F intermediate features, V vocabulary,
S sampled rows, O output features of a product.
"""

import torch
from torch.nn import functional

from memserve.jit import EARLY_CAPABILITY
from memserve.model.attention.base import LayerAttention
from memserve.model.decode_graph import DecodeGraph
from memserve.model.kernels.configs import capability_of
from memserve.model.kernels.few_rows import MAX_ROWS
from memserve.model.layers import Linear, RMSNorm
from memserve.model.loader import Loader
from memserve.model.model_config import ModelConfig
from memserve.model.ops import Ops, Stream
from memserve.model.parallel import WHOLE, Shard
from memserve.model.rope import RotaryEmbedding, Rotation
from memserve.model.weights import EMBEDDING, HEAD, WeightSource, check_tensors


class SelfAttention(torch.nn.Module):
    """x + attention(norm(x)), by groups of query heads. The rows of `qkv` are all query heads, then all key heads, then
    all value heads.
    """

    def __init__(self, config: ModelConfig, load: Loader, layer: int) -> None:
        super().__init__()
        c, prefix = config, f"model.layers.{layer}.self_attn"
        self.layer = layer
        self.norm = load.norm(f"model.layers.{layer}.input_layernorm", c.hidden_size, c.rms_norm_eps)
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

    def forward(self, stream: Stream, rotation: Rotation, attention: LayerAttention) -> Stream:
        """Writes the KV of the stream's tokens and reads it through `attention`."""
        ops = attention.ops
        x_TE, qkv_TO = ops.norm_linear(self.norm, stream, self.qkv)
        qkv_THD = qkv_TO.view(len(qkv_TO), -1, self.head_dim)
        num_rotated = self.num_heads + self.num_kv_heads
        qk_THD = qkv_THD[:, :num_rotated]
        if self.qk_norm is not None:
            qk_THD = ops.norm(self.qk_norm, qk_THD)
        q_THD = attention.rotate_and_write(self.layer, qk_THD, qkv_THD[:, num_rotated:], rotation)
        return ops.add_linear(x_TE, attention.attend(self.layer, q_THD).flatten(1), self.o)


class MLP(torch.nn.Module):
    """x + SwiGLU(norm(x)). The rows of `gate_up` are the gate's, then the up projection's."""

    def __init__(self, config: ModelConfig, load: Loader, layer: int) -> None:
        super().__init__()
        c, prefix = config, f"model.layers.{layer}.mlp"
        self.norm = load.norm(f"model.layers.{layer}.post_attention_layernorm", c.hidden_size, c.rms_norm_eps)
        rows = {"gate_proj": c.intermediate_size, "up_proj": c.intermediate_size}
        self.gate_up = load.linear(prefix, rows, c.hidden_size, c.mlp_bias)
        self.down = load.summed_linear(f"{prefix}.down_proj", c.hidden_size, c.intermediate_size, c.mlp_bias)

    def forward(self, stream: Stream, ops: Ops) -> Stream:
        x_TE, y_TF = ops.norm_swiglu(self.norm, stream, self.gate_up)
        return ops.add_linear(x_TE, y_TF, self.down)


class DecoderLayer(torch.nn.Module):
    """Attention, then the MLP."""

    def __init__(self, config: ModelConfig, load: Loader, layer: int) -> None:
        super().__init__()
        self.attention = SelfAttention(config, load, layer)
        self.mlp = MLP(config, load, layer)

    def forward(self, stream: Stream, rotation: Rotation, attention: LayerAttention) -> Stream:
        """Writes this layer's KV and reads it through `attention`."""
        stream = self.attention(stream, rotation, attention)
        after: Stream = self.mlp(stream, attention.ops)
        return after


class Llama(torch.nn.Module):
    """The decoder. One object serves any number of runners: it holds weights and nothing that changes.

    config: as this rank sees the model, see `Shard.config`; whole_config: of all of it.  shard: which part of it the
    rank holds.
    """

    embedding_VE: torch.Tensor

    def __init__(self, config: ModelConfig, load: Loader) -> None:
        super().__init__()
        self.whole_config = config
        self.config = config = load.shard.config(config)
        self.dtype, self.device, self.shard = load.dtype, load.device, load.shard
        self.decode_graph: DecodeGraph | None = None
        self.captures_decode, self.fused_rows, self.early_launches = False, 0, False
        shape = (config.vocab_size, config.hidden_size)
        self.register_buffer("embedding_VE", load.tensor(self._embedding_name(load), shape))
        self.rotary = RotaryEmbedding(config, load.dtype, load.device)
        self.layers = torch.nn.ModuleList(DecoderLayer(config, load, i) for i in range(config.num_layers))
        self.norm = load.norm("model.norm", config.hidden_size, config.rms_norm_eps)
        self.head = Linear(self._head_PE(load))

    def _embedding_name(self, load: Loader) -> str:
        """A tied pair may be stored under the head's name alone; transformers takes that too."""
        return EMBEDDING if load.has(EMBEDDING) else HEAD

    def _head_PE(self, load: Loader) -> torch.Tensor:
        """This rank's P rows of the head, [P, E]. Tied ones are the embedding's, unless the weights have others."""
        tied_PE = load.shard.part(self.embedding_VE, 0) if self.config.tie_embeddings else None
        if tied_PE is not None and not load.has(HEAD):
            return tied_PE
        own_PE = load.rows(HEAD, (self.config.vocab_size // load.shard.size, self.config.hidden_size))
        return own_PE if tied_PE is None or not torch.equal(own_PE, tied_PE) else tied_PE

    def compile(self, fused_rows: int = 0, early_launches: bool = False) -> None:
        """Lets decode steps run as one graph, built when a runner starts: on a GPU each runner captures its own
        (`CapturedDecode`), elsewhere all share a compiled one (`DecodeGraph`).

        fused_rows: graphs of up to so many requests have products that are kernels of ours with the norms, SwiGLU and
        sums around them (`FewRowsOps`); on a GPU in bfloat16, at most few_rows.MAX_ROWS.  early_launches: kernels of
        ours in graphs are launched while the one before still runs, on a GPU of compute capability 90 or more.

        Raises ValueError where that cannot be: on a model split over ranks, and see `DecodeGraph`.
        """
        if self.shard.size > 1:
            raise ValueError(
                f"model.compile=true: contradicts a model split over {self.shard.size} ranks, expected false"
            )
        captures = self.device.type == "cuda"
        if fused_rows and (not captures or self.dtype != torch.bfloat16):
            raise ValueError(
                f"model.fused_rows={fused_rows} on {self.device} in {self.dtype}: expected 0; or a GPU, torch.bfloat16"
            )
        if not 0 <= fused_rows <= MAX_ROWS:
            raise ValueError(f"model.fused_rows={fused_rows}: expected 0 to {MAX_ROWS}")
        if early_launches and capability_of(self.device) < EARLY_CAPABILITY:
            raise ValueError(
                f"model.early_launches=true on {self.device}: expected false; or a GPU of capability 9.0 or more"
            )
        self.captures_decode, self.fused_rows, self.early_launches = captures, fused_rows, early_launches
        if not captures:
            self.decode_graph = DecodeGraph(self)

    def embed(self, token_ids_T: torch.Tensor) -> Stream:
        """int64 [T] -> what the first layer takes."""
        return functional.embedding(token_ids_T, self.embedding_VE), None

    def logits(self, stream: Stream, ops: Ops) -> torch.Tensor:
        """Of S rows that left the last layer, [S, V]; see `Shard.gather` for ranks that do not sample."""
        return self.shard.gather(ops.norm_linear(self.norm, stream, self.head)[1])


def load_model(
    config: ModelConfig, source: WeightSource, dtype: torch.dtype, device: torch.device, shard: Shard = WHOLE
) -> Llama:
    """Builds the decoder with the weights of `source`, converted to `dtype` on `device`, one tensor at a time.

    config: of the whole model.  shard: the part of it that this rank loads and computes. Nothing else is copied out of
    safetensors files; other sources make a whole tensor, of which the part is kept.

    Raises ValueError, before any tensor is read or memory taken, naming a size that does not divide by the number of
    ranks, or a tensor that is missing, has another shape than the config says, or has no place in the decoder.
    """
    check_tensors(config, source)
    return Llama(config, Loader(source, dtype, device, shard))
