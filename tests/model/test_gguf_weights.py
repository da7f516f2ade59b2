"""A GGUF file written from a Hugging Face checkpoint reads back as it, and bad files are refused by name."""

import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from parallel_models import Part
from transformers import LlamaConfig, Qwen2Config

from memserve.model.gguf_weights import GGUFWeights
from memserve.model.llama import load_model
from memserve.model.model_config import ModelConfig
from memserve.model.parallel import WHOLE
from memserve.model.random_weights import RandomWeights
from memserve.model.rope_scaling import RopeScaling
from memserve.model.weights import WeightFileError

SIZES = {
    "vocab_size": 96,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 2,
    "bos_token_id": 1,
}
LLAMA = ModelConfig.from_hf(LlamaConfig(**SIZES, tie_word_embeddings=True, rope_theta=1e5).to_dict())
QWEN2 = ModelConfig.from_hf(Qwen2Config(**SIZES).to_dict())
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
Types = gguf.GGMLQuantizationType


def gguf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, layer, rest = stem.split(".", 3)
        return f"blk.{layer}.{GGUF_NAMES[rest]}.{kind}"
    return f"{GGUF_NAMES[stem]}.{kind}"


def interleave(array: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of each head as llama.cpp keeps them: i, i + D/2 next to each other."""
    halves = array.reshape(num_heads, 2, array.shape[0] // num_heads // 2, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


def write_gguf(
    path: Path,
    config: ModelConfig,
    quant: Types = Types.F32,
    extra: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
) -> RandomWeights:
    weights, name = RandomWeights(config, seed=5), config.model_type
    writer = gguf.GGUFWriter(path, name)
    for key, value in {
        "block_count": config.num_layers,
        "context_length": config.max_position,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        **(extra or {}),
    }.items():
        add = {str: writer.add_string, float: writer.add_float32}.get(type(value), writer.add_uint32)
        add(f"{name}.{key}", value)
    writer.add_float32(f"{name}.rope.freq_base", config.rope_theta)
    writer.add_float32(f"{name}.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    writer.add_eos_token_id(2)
    writer.add_bos_token_id(1)
    for hf in sorted(weights.names()):
        array = weights.tensor(hf).numpy()
        if name == "llama" and ".q_proj." in hf or name == "llama" and ".k_proj." in hf:
            array = interleave(array, config.num_heads if ".q_proj." in hf else config.num_kv_heads)
        kind = quant if array.ndim == 2 else Types.F32
        writer.add_tensor(gguf_name(hf), gguf.quants.quantize(array, kind), raw_dtype=kind)
    for hf, array in (tensors or {}).items():
        writer.add_tensor(hf, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.mark.parametrize("config", [LLAMA, QWEN2], ids=["llama", "qwen2"])
def test_a_float32_file_gives_back_the_checkpoint_and_its_config(tmp_path: Path, config: ModelConfig) -> None:
    written = write_gguf(tmp_path / "m.gguf", config)
    read = GGUFWeights(tmp_path / "m.gguf")
    assert read.config == config
    assert read.names() == written.names()
    assert all(torch.equal(read.tensor(name), written.tensor(name)) for name in written.names())


@pytest.mark.parametrize(
    ("quant", "dtype", "tolerance"),
    [
        (Types.F16, torch.float16, 1e-3),
        (Types.BF16, torch.bfloat16, 1e-2),
        (Types.Q8_0, torch.float32, 2e-2),
        (Types.Q5_1, torch.float32, 0.1),
        (Types.Q5_0, torch.float32, 0.1),
        (Types.Q4_1, torch.float32, 0.2),
        (Types.Q4_0, torch.float32, 0.2),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_quantised_file_is_close_to_the_checkpoint(
    tmp_path: Path, quant: Types, dtype: torch.dtype, tolerance: float
) -> None:
    written = write_gguf(tmp_path / "m.gguf", LLAMA, quant)
    read = GGUFWeights(tmp_path / "m.gguf")
    for name in written.names():
        expected, got = written.tensor(name), read.tensor(name)
        assert got.dtype == (dtype if expected.ndim == 2 else torch.float32)
        assert torch.allclose(got.float(), expected, atol=tolerance * float(expected.abs().max()))
        assert read.shape(name) == tuple(expected.shape), "told without being dequantised"


def test_k_quants_are_read(tmp_path: Path) -> None:
    path = tmp_path / "k.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key in ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count"):
        writer.add_uint32(f"llama.{key}", 256 if key == "embedding_length" else 1)
    blocks = {kind: np.zeros((2, gguf.GGML_QUANT_SIZES[Types[kind]][1]), np.uint8) for kind in ("Q4_K", "Q6_K")}
    writer.add_tensor("token_embd.weight", blocks["Q6_K"], raw_dtype=Types.Q6_K)
    writer.add_tensor("output.weight", blocks["Q4_K"], raw_dtype=Types.Q4_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    weights = GGUFWeights(path)
    assert torch.equal(weights.tensor("model.embed_tokens.weight"), torch.zeros(2, 256))
    assert torch.equal(weights.tensor("lm_head.weight"), torch.zeros(2, 256))


def test_llama3_rope_is_recognised_by_its_divisors(tmp_path: Path) -> None:
    wavelength = 2 * np.pi * LLAMA.rope_theta ** (np.arange(0, LLAMA.head_dim, 2) / LLAMA.head_dim)
    divisors = np.where(wavelength > 8192, 8.0, 1.0)
    between = (wavelength <= 8192) & (wavelength >= 8192 / 4)
    smooth = (8192 / wavelength[between] - 1) / 3
    divisors[between] = 1 / ((1 - smooth) / 8 + smooth)
    write_gguf(tmp_path / "m.gguf", LLAMA, tensors={"rope_freqs.weight": divisors.astype(np.float32)})
    weights = GGUFWeights(tmp_path / "m.gguf")
    assert weights.config.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    assert "rope_freqs.weight" not in weights.names()
    write_gguf(tmp_path / "n.gguf", LLAMA, tensors={"rope_freqs.weight": np.linspace(1, 8, 32, dtype=np.float32)})
    with pytest.raises(ValueError, match="rope_freqs.weight is not Llama 3's"):
        GGUFWeights(tmp_path / "n.gguf")


@pytest.mark.parametrize(
    ("extra", "factor"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, 4.0),
        ({"rope.scaling.factor": 4.0}, 4.0),
        ({"rope.scale_linear": 2.0}, 2.0),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
        ({"rope.scale_linear": 1.0}, None),
    ],
)
def test_a_factor_stretches_rope_under_both_its_names_as_in_llama_cpp(
    tmp_path: Path, extra: dict[str, Any], factor: float | None
) -> None:
    write_gguf(tmp_path / "m.gguf", LLAMA, extra=extra)
    expected = None if factor is None else RopeScaling("linear", factor)
    assert GGUFWeights(tmp_path / "m.gguf").config.rope_scaling == expected


def test_a_factor_beside_divisors_is_refused(tmp_path: Path) -> None:
    divisors = {"rope_freqs.weight": np.ones(32, dtype=np.float32)}
    write_gguf(tmp_path / "m.gguf", LLAMA, extra={"rope.scaling.factor": 2.0}, tensors=divisors)
    with pytest.raises(ValueError, match=r"rope\.scaling\.factor=2\.0 beside rope_freqs\.weight"):
        GGUFWeights(tmp_path / "m.gguf")


def test_a_window_is_no_window_where_no_longer_context_is_to_be_run(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", LLAMA, extra={"attention.sliding_window": 128})
    assert GGUFWeights(tmp_path / "m.gguf", max_context=128).config.max_position == 128
    with pytest.raises(ValueError, match=r"m\.gguf: sliding_window=128: .* or a max_context of at most 128"):
        GGUFWeights(tmp_path / "m.gguf", max_context=129)


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"expert_count": 8}, "expert_count=8"),
        ({"attention.sliding_window": 128}, "sliding_window=128"),
        ({"rope.dimension_count": 32}, "rope.dimension_count=32.*head_dim=64"),
        ({"rope.scaling.type": "yarn"}, "yarn"),
        ({"block_count": 0}, "block_count=0"),
    ],
)
def test_metadata_that_cannot_be_run_is_refused_by_name(tmp_path: Path, extra: dict[str, Any], named: str) -> None:
    write_gguf(tmp_path / "m.gguf", LLAMA, extra=extra)
    with pytest.raises(ValueError, match=named):
        GGUFWeights(tmp_path / "m.gguf")


def test_another_architecture_and_another_tensor_type_are_refused_by_name(tmp_path: Path) -> None:
    gguf_file = tmp_path / "m.gguf"
    write_gguf(gguf_file, LLAMA, tensors={"blk.0.x.weight": np.zeros(4, dtype=np.int32)})
    with pytest.raises(ValueError, match="blk.0.x.weight is I32, expected one of BF16"):
        GGUFWeights(gguf_file)
    content = gguf_file.read_bytes().replace(b"llama", b"llamb")
    gguf_file.write_bytes(content)
    with pytest.raises(ValueError, match="architecture 'llamb', expected llama or qwen2"):
        GGUFWeights(gguf_file)


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.001, 0.3, 0.999])
def test_a_truncated_file_is_named(tmp_path: Path, share: float) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, LLAMA)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(WeightFileError, match="m.gguf: truncated, corrupt, or no GGUF file"):
        GGUFWeights(path)


def test_a_file_of_another_byte_order_is_refused_and_not_misread(tmp_path: Path) -> None:
    other = {"little": gguf.GGUFEndian.BIG, "big": gguf.GGUFEndian.LITTLE}[sys.byteorder]
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", endianess=other)
    for key in ("block_count", "embedding_length", "feed_forward_length", "context_length"):
        writer.add_uint32(f"llama.{key}", 2)
    writer.add_uint32("llama.attention.head_count", 1)
    writer.add_tensor("token_embd.weight", np.ones((2, 2), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(WeightFileError, match=r"m\.gguf: written in another byte order"):
        GGUFWeights(tmp_path / "m.gguf")


def test_a_file_without_embeddings_is_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for key in ("block_count", "embedding_length", "feed_forward_length", "attention.head_count", "context_length"):
        writer.add_uint32(f"llama.{key}", 2)
    writer.add_tensor("output_norm.weight", np.ones(2, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(WeightFileError, match=r"m\.gguf: has no tensor 'token_embd\.weight'"):
        GGUFWeights(tmp_path / "m.gguf")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightFileError, match="none.gguf: no such file"):
        GGUFWeights(tmp_path / "none.gguf")


def test_ranks_hold_their_parts_of_a_quantised_file(tmp_path: Path) -> None:
    """Its rows are put in order, and its blocks dequantised, before they are parted."""
    write_gguf(tmp_path / "m.gguf", LLAMA, Types.Q8_0)
    weights = GGUFWeights(tmp_path / "m.gguf")
    whole, *parts = (
        load_model(weights.config, weights, torch.float32, torch.device("cpu"), shard)
        for shard in (WHOLE, Part(0, 2), Part(1, 2))
    )
    num_q, num_kv = (n * LLAMA.head_dim for n in (LLAMA.num_heads, LLAMA.num_kv_heads))
    for rank, part in enumerate(parts):
        layer, expected = part.layers[1], whole.layers[1]
        qkv = [rows.chunk(2)[rank] for rows in expected.attention.qkv.weight.split([num_q, num_kv, num_kv])]
        assert torch.equal(layer.attention.qkv.weight, torch.cat(qkv))
        assert torch.equal(layer.mlp.down.weight, expected.mlp.down.weight.chunk(2, 1)[rank])
