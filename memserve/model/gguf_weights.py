"""GGUFWeights: a llama.cpp file as a Hugging Face checkpoint. Knows tensors and metadata, no tokenizer.

The file is mapped; a tensor is dequantised when it is asked for, through the `gguf` library. llama.cpp stores the rows
of a Llama's query and key projections interleaved for its own rotation: they are put back in Hugging Face order here.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as TensorType

from memserve.model.model_config import ModelConfig, longest_context
from memserve.model.rope_scaling import RopeScaling
from memserve.model.weights import WeightFileError

ARCHITECTURES = ("llama", "qwen2")
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Llama 3.1 and its successors stretch RoPE by these; a GGUF file keeps only the divisors that follow from them.
_LLAMA3_ROPE = RopeScaling("llama3", 1.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192)
_ROPE_DIVISORS = "rope_freqs.weight"


class GGUFWeights:
    """The tensors of one GGUF file under Hugging Face names, and the ModelConfig in its metadata; a WeightSource.

    F32, F16 and BF16 tensors keep their dtype, quantised ones become float32. max_context: as in `ModelConfig.from_hf`.
    Raises WeightFileError naming the file if it is truncated or corrupt, ValueError naming an architecture or a tensor
    type that cannot be run.
    """

    def __init__(self, path: Path | str, max_context: int | None = None) -> None:
        self.path = Path(path)
        self._reader = _open(self.path)
        self._architecture = self.metadata("general.architecture")
        if self._architecture not in ARCHITECTURES:
            raise ValueError(f"{self.path}: architecture {self._architecture!r}, expected {' or '.join(ARCHITECTURES)}")
        stored = {tensor.name: tensor for tensor in self._reader.tensors}
        self._rope_divisors = stored.pop(_ROPE_DIVISORS, None)
        self._tensors = {_hf_name(name): tensor for name, tensor in stored.items()}
        self._refuse_tensor_types()
        self.config = self._read_config(max_context)

    def metadata(self, key: str, default: Any = None) -> Any:
        """A metadata value; a number that was stored as float32 comes as the decimal it was written as."""
        field = self._reader.get_field(key)
        if field is None:
            return default
        value = field.contents()
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def names(self) -> set[str]:
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def tensor(self, name: str) -> torch.Tensor:
        stored = self._tensors[name]
        tensor = _to_torch(stored)
        num_heads = {"q": self.config.num_heads, "k": self.config.num_kv_heads}
        projection = name.split(".")[-2][:1] if ".self_attn." in name else ""
        if self._architecture == "llama" and projection in num_heads:
            return _deinterleave(tensor, num_heads[projection])
        return tensor

    def _refuse_tensor_types(self) -> None:
        readable = {TensorType.F32, TensorType.F16, TensorType.BF16, *_DEQUANTISED}
        for tensor in self._reader.tensors:
            if tensor.tensor_type not in readable:
                allowed = ", ".join(sorted(t.name for t in readable))
                raise ValueError(f"{self.path}: {tensor.name} is {tensor.tensor_type.name}, expected one of {allowed}")

    def _read_config(self, max_context: int | None) -> ModelConfig:
        size = self._size
        num_heads, hidden_size = size("attention.head_count"), size("embedding_length")
        head_dim = size("attention.key_length", hidden_size // num_heads)
        self._refuse_what_cannot_run(head_dim)
        if "model.embed_tokens.weight" not in self._tensors:
            raise WeightFileError(f"{self.path}: has no tensor 'token_embd.weight', expected a language model")
        return ModelConfig(
            model_type=self._architecture,
            vocab_size=int(self._tensors["model.embed_tokens.weight"].shape[1]),
            hidden_size=hidden_size,
            intermediate_size=size("feed_forward_length"),
            num_layers=size("block_count"),
            num_heads=num_heads,
            num_kv_heads=size("attention.head_count_kv", num_heads),
            head_dim=head_dim,
            max_position=self._longest_context(max_context),
            rms_norm_eps=self._own("attention.layer_norm_rms_epsilon", 1e-6),
            rope_theta=self._own("rope.freq_base", 10000.0),
            rope_scaling=self._rope_scaling(head_dim),
            tie_embeddings="lm_head.weight" not in self._tensors,
            qkv_bias="model.layers.0.self_attn.q_proj.bias" in self._tensors,
            o_bias="model.layers.0.self_attn.o_proj.bias" in self._tensors,
            mlp_bias="model.layers.0.mlp.gate_proj.bias" in self._tensors,
            eos_token_ids=self._eos_token_ids(),
            bos_token_id=self.metadata("tokenizer.ggml.bos_token_id"),
        )

    def _own(self, key: str, default: Any = None) -> Any:
        return self.metadata(f"{self._architecture}.{key}", default)

    def _size(self, key: str, default: int | None = None) -> int:
        value = self._own(key, default)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{self.path}: {self._architecture}.{key}={value!r}, expected an integer >= 1")
        return value

    def _eos_token_ids(self) -> tuple[int, ...]:
        ids = [self.metadata(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
        return tuple(dict.fromkeys(i for i in ids if i is not None))

    def _longest_context(self, max_context: int | None) -> int:
        own, window = self._size("context_length"), self._own("attention.sliding_window") or None
        try:
            return longest_context(own, max_context, window)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error

    def _refuse_what_cannot_run(self, head_dim: int) -> None:
        if self.metadata("split.count", 0) > 1:
            raise ValueError(f"{self.path}: one of {self.metadata('split.count')} parts, expected a single file")
        if self._own("expert_count", 0):
            raise ValueError(f"{self.path}: expert_count={self._own('expert_count')}, expected a dense model")
        rotated = self._own("rope.dimension_count", head_dim)
        if rotated != head_dim:
            raise ValueError(f"{self.path}: rope.dimension_count={rotated}, expected head_dim={head_dim}")

    def _rope_scaling(self, head_dim: int) -> RopeScaling | None:
        kind = self._own("rope.scaling.type", "linear")  # as for llama.cpp: a factor alone is a linear one's
        if kind not in ("none", "linear"):
            raise ValueError(f"{self.path}: rope.scaling.type={kind!r}, expected 'none' or 'linear'")
        factor = self._own("rope.scaling.factor", self._own("rope.scale_linear")) or 1.0  # the second is its old name
        if kind == "none" or factor == 1.0:
            return None if self._rope_divisors is None else self._llama3_scaling(head_dim)
        if self._rope_divisors is not None:
            raise ValueError(f"{self.path}: rope.scaling.factor={factor} beside {_ROPE_DIVISORS}, expected one of them")
        return RopeScaling("linear", factor)

    def _llama3_scaling(self, head_dim: int) -> RopeScaling:
        """The scaling whose divisors are those of the file, or ValueError if there is none."""
        divisors = _to_torch(self._rope_divisors).double()
        scaling = replace(_LLAMA3_ROPE, factor=round(float(divisors.max()), 3))
        expected = _llama3_divisors(scaling, self._own("rope.freq_base", 10000.0), head_dim)
        if divisors.shape != expected.shape or not torch.allclose(divisors, expected, rtol=1e-3):
            raise ValueError(f"{self.path}: {_ROPE_DIVISORS} is not Llama 3's rope scaling, the only one that is known")
        return scaling


_DEQUANTISED = tuple(
    TensorType[name] for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
)


class _Reader(gguf.GGUFReader):  # type: ignore[misc] # the library is not typed
    """Reads the mapped file as a plain array: of a `memmap`, each of its many slices takes three times as long."""

    @property
    def data(self) -> np.ndarray:
        return self._data

    @data.setter
    def data(self, mapped: np.ndarray) -> None:
        self._data = np.asarray(mapped)


def _open(path: Path) -> Any:
    if not path.is_file():
        raise WeightFileError(f"{path}: no such file")
    try:
        reader = _Reader(path)
    except (ValueError, IndexError, KeyError, OSError, OverflowError) as error:
        raise WeightFileError(
            f"{path}: truncated, corrupt, or no GGUF file ({path.stat().st_size} bytes): {error}"
        ) from error
    if reader.byte_order != "I":
        raise WeightFileError(f"{path}: written in another byte order, expected this machine's, {sys.byteorder} endian")
    return reader


def _hf_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; names without a counterpart stay."""
    stem, _, kind = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{kind}"
    parts = stem.split(".")
    if parts[0] == "blk" and parts[-1] in _LAYER:
        return f"model.layers.{parts[1]}.{_LAYER[parts[-1]]}.{kind}"
    return name


def _to_torch(stored: Any) -> torch.Tensor:
    if stored.tensor_type == TensorType.BF16:
        return torch.from_numpy(np.array(stored.data).view(np.int16)).view(torch.bfloat16)
    if stored.tensor_type in (TensorType.F32, TensorType.F16):
        return torch.from_numpy(np.array(stored.data))
    return torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type))


def _deinterleave(tensor: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of each head from pairs (0, D/2), (1, D/2 + 1), ... back to 0, 1, ..., D - 1."""
    pairs = tensor.reshape(num_heads, -1, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)


def _llama3_divisors(scaling: RopeScaling, theta: float, head_dim: int) -> torch.Tensor:
    """float64 [head_dim / 2]: what Llama 3 divides each rotary frequency by (section "RoPE" of its reference code)."""
    wavelength = 2 * torch.pi * theta ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = ((scaling.original_max_position / wavelength - low) / (high - low)).clamp(0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / scaling.factor + smooth)
