"""RopeScaling: how rotary frequencies are stretched beyond the length they were trained for; read from a config.

linear: position interpolation (arXiv 2306.15595).  llama3: Llama 3.1's.  yarn: YaRN (arXiv 2309.00071).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ROPE_KINDS = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class RopeScaling:
    """What a kind does not name means nothing to it. Raises ValueError for a number out of range.

    kind "linear" divides every frequency by `factor`; "llama3" divides the low ones, keeps the high ones and blends
    between them (low_freq_factor, high_freq_factor: turns within the original length); so does "yarn" (beta_slow,
    beta_fast: the same, and between them it blends by dimension, whole ones with `truncate`), which multiplies queries
    and keys by `attention_factor`.  original_max_position: the length of training, in tokens.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    beta_slow: float = 1.0
    beta_fast: float = 32.0
    attention_factor: float = 1.0
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.kind not in ROPE_KINDS[1:]:
            raise ValueError(f"rope kind {self.kind!r}: expected one of {', '.join(ROPE_KINDS)}")
        for name in _NUMBERS:
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
                raise ValueError(f"rope {name}={value!r}: expected a finite number")
        if self.factor < 1.0:
            raise ValueError(f"rope factor={self.factor!r}: expected a finite number >= 1")
        self._check_order("low_freq_factor", "high_freq_factor")
        self._check_order("beta_slow", "beta_fast")
        if self.attention_factor <= 0:
            raise ValueError(f"rope attention_factor={self.attention_factor!r}: expected a number > 0")
        if not isinstance(self.truncate, bool):
            raise ValueError(f"rope truncate={self.truncate!r}: expected true or false")
        if self.original_max_position < 1:
            raise ValueError(f"rope original_max_position={self.original_max_position!r}: expected an integer >= 1")

    def _check_order(self, low: str, high: str) -> None:
        first, last = getattr(self, low), getattr(self, high)
        if not 0 < first < last:
            raise ValueError(f"rope {low}={first!r}, {high}={last!r}: expected 0 < {low} < {high}")

    @property
    def max_position(self) -> int:
        """The context that the stretching is for, as far as the kind says: 0 where it does not."""
        return int(self.factor * self.original_max_position) if self.kind == "yarn" else 0


_NUMBERS = (
    "factor", "low_freq_factor", "high_freq_factor", "original_max_position", "beta_slow", "beta_fast",
    "attention_factor",
)  # fmt: skip
_LENGTH = {"original_max_position_embeddings": "original_max_position"}
_REQUIRED = {  # a config's names, and ours
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor", "low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor", **_LENGTH,
    },
    "yarn": {"factor": "factor"},
}  # fmt: skip
_OPTIONAL = ("beta_slow", "beta_fast", "attention_factor", "truncate")  # of yarn; null is as good as absent


def rope_of(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) of a config.json, from `rope_parameters`, or from `rope_theta` and `rope_scaling`."""
    spec = _spec_of(config)
    theta = spec.get("rope_theta", config.get("rope_theta", 10000.0))
    kind = spec.get("rope_type", spec.get("type", "default"))
    if kind not in ROPE_KINDS:
        raise ValueError(f"rope_type={kind!r}: expected one of {', '.join(ROPE_KINDS)}")
    if spec.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"partial_rotary_factor={spec['partial_rotary_factor']!r}: expected 1.0")
    if kind == "default":
        return theta, None
    names = _REQUIRED[kind]
    missing = [key for key in names if key not in spec]
    if missing:
        raise ValueError(f"rope_type={kind!r} without {', '.join(missing)}")
    more = _of_yarn(spec, config) if kind == "yarn" else {}
    return theta, RopeScaling(kind, **{field: spec[key] for key, field in names.items()}, **more)


def _spec_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    new, old = config.get("rope_parameters"), config.get("rope_scaling")
    if new and old and new != old:
        raise ValueError(f"rope_parameters={new!r} beside rope_scaling={old!r}: expected one of them")
    spec = new or old or {}
    if not isinstance(spec, Mapping):
        raise ValueError(f"rope_parameters={spec!r}: expected a mapping")
    if any(isinstance(value, Mapping) for value in spec.values()):
        raise ValueError(f"rope_parameters for {sorted(spec)!r}: expected one set for every layer")
    return spec


def _of_yarn(spec: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """What need not be said. The original length is then the model's own."""
    found = {name: spec[name] for name in _OPTIONAL if spec.get(name) is not None}
    length = spec.get("original_max_position_embeddings", config.get("max_position_embeddings"))
    if "attention_factor" not in found:
        above, below = (_number(spec, name) for name in ("mscale", "mscale_all_dim"))
        scales = (above, below) if above and below else (1.0, 0.0)
        numerator, denominator = (_magnitude(_number(spec, "factor"), scale) for scale in scales)
        found["attention_factor"] = numerator / denominator
    return {**found, "original_max_position": length}


def _number(spec: Mapping[str, Any], name: str) -> float:
    """0 where it is not said."""
    value = spec.get(name) or 0.0
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
        raise ValueError(f"rope {name}={value!r}: expected a finite number >= 0")
    return value


def _magnitude(factor: float, scale: float) -> float:
    """YaRN's square root of 1 / t (section 3.4), with its logarithm times `scale`."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0
