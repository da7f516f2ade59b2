"""Rotary position embedding (arXiv 2104.09864) with the scalings that Llama-style checkpoints use. Knows no model.

Shape legend: T tokens, H heads, D head dim, F = D / 2 frequencies. A head is rotated in Hugging Face's order: dimension
i pairs with i + F.
"""

import math

import torch

from memserve.model.model_config import ModelConfig, RopeScaling

Rotation = tuple[torch.Tensor, torch.Tensor]


class RotaryEmbedding:
    """Turns positions into the rotation that `rotate` applies; one for a whole model."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self._inv_freq_F = _scaled(_inverse_frequencies(config), config.rope_scaling).to(device)
        self._dtype = dtype

    def rotation(self, positions_T: torch.Tensor) -> Rotation:
        """int64 [T] -> (cos, sin), each [T, 1, 2, F]: sin carries the sign of each half."""
        angles_TF = positions_T[:, None].to(self._inv_freq_F.dtype) * self._inv_freq_F
        cos_TF, sin_TF = angles_TF.cos().to(self._dtype), angles_TF.sin().to(self._dtype)
        return torch.stack((cos_TF, cos_TF), 1)[:, None], torch.stack((-sin_TF, sin_TF), 1)[:, None]


def rotate(x_THD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates [T, H, D] by (cos, sin) of `RotaryEmbedding.rotation`; returns a new [T, H, D]."""
    x_TH2F = x_THD.view(*x_THD.shape[:-1], 2, -1)
    return torch.addcmul(x_TH2F.flip(-2) * sin, x_TH2F, cos).flatten(-2)


def _inverse_frequencies(config: ModelConfig) -> torch.Tensor:
    """float32 [F]: angle per position of each pair of dimensions."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    return 1.0 / (config.rope_theta**exponents)


def _scaled(inv_freq_F: torch.Tensor, scaling: RopeScaling | None) -> torch.Tensor:
    if scaling is None or scaling.kind == "default":
        return inv_freq_F
    if scaling.kind == "linear":
        return inv_freq_F / scaling.factor
    if scaling.kind == "llama3":
        return _llama3(inv_freq_F, scaling)
    raise ValueError(f"rope_scaling kind {scaling.kind!r}: expected default, linear or llama3")


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
