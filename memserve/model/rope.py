"""Rotary position embedding (arXiv 2104.09864) with the scalings that Llama-style checkpoints use. Knows no model.

Shape legend: T tokens, H heads, D head dim, F = D / 2 frequencies. A head is rotated in Hugging Face's order: dimension
i pairs with i + F.
"""

import math

import torch

from memserve.model.model_config import ModelConfig
from memserve.model.rope_scaling import RopeScaling

Rotation = tuple[torch.Tensor, torch.Tensor]


class RotaryEmbedding:
    """Turns positions into the rotation that `rotate` applies; one for a whole model."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        scaling = config.rope_scaling
        self._inv_freq_F = _inverse_frequencies(config).to(device)
        self._factor = 1.0 if scaling is None else scaling.attention_factor
        self._dtype = dtype

    def rotation(self, positions_T: torch.Tensor) -> Rotation:
        """int64 [T] -> (cos, sin), each [T, 1, 2, F]: sin carries the sign of each half."""
        angles_TF = positions_T[:, None].to(self._inv_freq_F.dtype) * self._inv_freq_F
        cos_TF, sin_TF = ((x * self._factor).to(self._dtype) for x in (angles_TF.cos(), angles_TF.sin()))
        return torch.stack((cos_TF, cos_TF), 1)[:, None], torch.stack((-sin_TF, sin_TF), 1)[:, None]


def rotate(x_THD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates [T, H, D] by (cos, sin) of `RotaryEmbedding.rotation`; returns a new [T, H, D]."""
    x_TH2F = torch.unflatten(x_THD, -1, (2, -1))
    return torch.addcmul(x_TH2F.flip(-2) * sin, x_TH2F, cos).flatten(-2)


def _inverse_frequencies(config: ModelConfig) -> torch.Tensor:
    """float32 [F]: angle per position of each pair of dimensions."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    freq_F, scaling = config.rope_theta**exponents, config.rope_scaling
    if scaling is None:
        return 1.0 / freq_F
    if scaling.kind == "linear":
        return 1.0 / freq_F / scaling.factor
    if scaling.kind == "llama3":
        return _llama3(1.0 / freq_F, scaling)
    return _yarn(freq_F, scaling, config)


def _llama3(inv_freq_F: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Llama 3.1's scaling: long wavelengths are slowed by `factor`, short ones kept, those between interpolated."""
    wavelength_F = 2 * math.pi / inv_freq_F
    low = scaling.original_max_position / scaling.low_freq_factor
    high = scaling.original_max_position / scaling.high_freq_factor
    span = scaling.high_freq_factor - scaling.low_freq_factor
    smooth_F = (scaling.original_max_position / wavelength_F - scaling.low_freq_factor) / span
    between_F = (1 - smooth_F) * inv_freq_F / scaling.factor + smooth_F * inv_freq_F
    slowed_F = torch.where(wavelength_F > low, inv_freq_F / scaling.factor, inv_freq_F)
    return torch.where((wavelength_F >= high) & (wavelength_F <= low), between_F, slowed_F)


def _yarn(freq_F: torch.Tensor, scaling: RopeScaling, config: ModelConfig) -> torch.Tensor:
    """YaRN's (arXiv 2309.00071, section 3.2): dimensions of less than beta_slow turns in the original length are slowed
    by `factor`, those of more than beta_fast kept; between them it goes by dimension. Rounded as in transformers: at
    position 100,000 a last bit of a frequency is .008 radians.
    """
    low, high = (_dimension(turns, scaling, config) for turns in (scaling.beta_fast, scaling.beta_slow))
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    span = high - low if high != low else 0.001
    slowed_F = ((torch.arange(len(freq_F), dtype=torch.float32) - low) / span).clamp(0, 1)
    kept_F = 1 - slowed_F
    return 1.0 / (scaling.factor * freq_F) * (1 - kept_F) + 1.0 / freq_F * kept_F


def _dimension(turns: float, scaling: RopeScaling, config: ModelConfig) -> float:
    """Which pair of dimensions turns so often in the original length."""
    radians = scaling.original_max_position / (turns * 2 * math.pi)
    return config.head_dim * math.log(radians) / (2 * math.log(config.rope_theta))
