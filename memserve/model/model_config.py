"""ModelConfig: the shape of a decoder this package can run, read from its config. Knows no tensor and no file.

Llama, Mistral, Qwen2 and Qwen3 are one decoder with four switches (`qkv_bias`, `o_bias`, `mlp_bias`, `qk_norm`).
Whatever else a config asks for is refused by name, here and nowhere later: a model that loads, runs. Attention in a
sliding window is that of the whole context up to the window's length, and no longer context can be run.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from memserve.model.rope_scaling import RopeScaling, rope_of


@dataclass(frozen=True)
class ModelConfig:
    """Everything the decoder is built from. Sizes in elements, positions in tokens; raises ValueError on a bad one.

    max_position: the longest context that can be run, with YaRN what it is stretched to.  rope_scaling: None for plain
    RoPE.
    eos_token_ids: any of them ends an answer; may be empty.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
        for name in (*sizes, "head_dim", "max_position"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r}: expected an integer >= 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads}: expected a multiple of num_kv_heads={self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim}: expected an even number (RoPE rotates pairs)")
        for name in ("rms_norm_eps", "rope_theta"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
                raise ValueError(f"{name}={value!r}: expected a finite number > 0")
        if self.rope_scaling is not None and self.rope_scaling.kind == "yarn" and self.rope_theta <= 1:
            raise ValueError(f"rope_theta={self.rope_theta!r}: expected a number > 1 with rope_type='yarn'")

    @classmethod
    def from_hf(
        cls,
        config: Mapping[str, Any],
        generation_config: Mapping[str, Any] | None = None,
        max_context: int | None = None,
    ) -> "ModelConfig":
        """From the dict of a config.json (old rope keys or `rope_parameters`) and, if any, a generation_config.json.

        max_context: tokens; no longer context is to be run, so that a sliding window of as many changes nothing.

        The end-of-sequence tokens are generation_config's where it names some. Raises ValueError naming the key that
        is missing, or the value that cannot be run and what can.
        """
        _require_types(config)
        model_type = config.get("model_type")
        if model_type not in _FAMILIES:
            raise ValueError(f"model_type={model_type!r}: expected one of {', '.join(_FAMILIES)}")
        family = _FAMILIES[model_type]
        merged = {**family.defaults, **{k: v for k, v in config.items() if v is not None or k == "sliding_window"}}
        _refuse_what_cannot_run(merged)
        theta, scaling = rope_of(merged)
        max_position = _required(merged, "max_position_embeddings")
        if scaling is not None:
            max_position = max(max_position, scaling.max_position)
        max_position = longest_context(max_position, max_context, _window_of(merged, family.chooses_windows))
        num_heads = _required(merged, "num_attention_heads")
        if "num_key_value_heads" in config and config["num_key_value_heads"] is None:
            merged["num_key_value_heads"] = num_heads
        hidden_size = _required(merged, "hidden_size")
        ids = (generation_config or {}).get("eos_token_id")
        return cls(
            model_type=model_type,
            vocab_size=_required(merged, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_required(merged, "intermediate_size"),
            num_layers=_required(merged, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=merged.get("num_key_value_heads", num_heads),
            head_dim=merged.get("head_dim", hidden_size // num_heads),
            max_position=max_position,
            rms_norm_eps=merged["rms_norm_eps"],
            rope_theta=theta,
            rope_scaling=scaling,
            tie_embeddings=bool(merged["tie_word_embeddings"]),
            qkv_bias=family.always_qkv_bias or bool(merged.get("attention_bias", False)),
            o_bias=not family.always_qkv_bias and bool(merged.get("attention_bias", False)),
            mlp_bias=bool(merged.get("mlp_bias", False)),
            qk_norm=family.qk_norm,
            eos_token_ids=_token_ids(merged.get("eos_token_id") if ids is None else ids),
            bos_token_id=merged.get("bos_token_id"),
        )


@dataclass(frozen=True)
class _Family:
    """What a model_type fixes, and the values it takes where a config.json leaves a key out."""

    defaults: Mapping[str, Any]
    always_qkv_bias: bool = False
    qk_norm: bool = False
    chooses_windows: bool = False  # by use_sliding_window, and by layer


_COMMON = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
_FAMILIES = {
    "llama": _Family(_COMMON),
    "mistral": _Family({**_COMMON, "num_key_value_heads": 8, "sliding_window": 4096}),
    "qwen2": _Family({**_COMMON, "num_key_value_heads": 32}, always_qkv_bias=True, chooses_windows=True),
    "qwen3": _Family({**_COMMON, "num_key_value_heads": 32, "head_dim": 128}, qk_norm=True, chooses_windows=True),
}

_SWITCHES = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window")
_KINDS: dict[str, tuple[type, str]] = {
    "model_type": (str, "text"),
    "architectures": (list, "a list of names"),
    "layer_types": (list, "a list of names"),
    "quantization_config": (Mapping, "a mapping"),
    "max_window_layers": (int, "an integer"),
    "bos_token_id": (int, "an integer"),
    **dict.fromkeys(_SWITCHES, (bool, "true or false")),
}


def _required(config: Mapping[str, Any], key: str) -> int:
    if key not in config:
        raise ValueError(f"the model's config has no {key!r}")
    value = config[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{key}={value!r}: expected an integer >= 1")
    return value


def _require_types(config: Mapping[str, Any]) -> None:
    """Raises ValueError for a key of another kind than a config.json has there, where nobody else would name it."""
    for key, (kind, said) in _KINDS.items():
        value = config.get(key)
        if value is not None and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
            raise ValueError(f"{key}={value!r}: expected {said}")
        if isinstance(value, list) and not all(isinstance(item, str) for item in value):
            raise ValueError(f"{key}={value!r}: expected {said}")


def _refuse_what_cannot_run(config: Mapping[str, Any]) -> None:
    if config["hidden_act"] not in ("silu", "swish"):
        raise ValueError(f"hidden_act={config['hidden_act']!r}: expected 'silu'")
    for key in ("num_local_experts", "num_experts", "n_routed_experts"):
        if config.get(key):
            raise ValueError(f"{key}={config[key]!r}: mixture-of-experts models cannot be run, expected a dense model")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise ValueError(
            f"quantization_config with quant_method={method!r}: expected an unquantised checkpoint or a GGUF file"
        )
    wrong = [name for name in config.get("architectures", ()) if not name.endswith("ForCausalLM")]
    if wrong:
        raise ValueError(f"architectures={wrong!r}: expected a ...ForCausalLM")
    if config.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"partial_rotary_factor={config['partial_rotary_factor']!r}: expected 1.0")


def _window_of(config: Mapping[str, Any], is_chosen: bool) -> Any:
    """The sliding window that a layer has; None where none has one."""
    layer_types = set(config.get("layer_types", ())) - {"full_attention"}
    window = config.get("sliding_window")
    if is_chosen:
        first_windowed, num_layers = config.get("max_window_layers", 28), _required(config, "num_hidden_layers")
        has_any = bool(layer_types) if config.get("layer_types") else first_windowed < num_layers
        window = window if config.get("use_sliding_window", False) and has_any else None
    if layer_types - {"sliding_attention"} or (layer_types and window is None):
        raise ValueError(f"layer_types with {sorted(layer_types)!r}: expected 'full_attention' only")
    return window


def longest_context(own: int, max_context: int | None, window: Any) -> int:
    """The longest that can be run. own: the model's.  max_context: that is asked for; None: all of it.  window: of
    sliding attention, None where there is none. All in tokens.

    A token sees itself and the `window` - 1 before it, as in transformers: within the window that is the whole context.
    Raises ValueError for a window that is shorter.
    """
    longest = min(own, max_context or own)
    if window is not None and (not isinstance(window, int) or isinstance(window, bool) or window < 1):
        raise ValueError(f"sliding_window={window!r}: expected null or an integer >= 1")
    if window is not None and window < longest:
        raise ValueError(
            f"sliding_window={window!r}: expected null, or at least the context, {longest}; "
            f"or a max_context of at most {window}"
        )
    return longest


def _token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    ids = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise ValueError(f"eos_token_id={value!r}: expected an integer >= 0, or a list of them")
    return tuple(dict.fromkeys(ids))
