"""Rotary position embedding: which angle each pair of channels turns by, with the scalings that stretch a context.

Rotating is a kernel; this file only makes frequencies. Angles are fp32 whatever the model's dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from replicas.engine.kernels import Kernels

RopeScaling = Literal["default", "linear", "llama3", "yarn"]


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """The first `rotary_dim` channels of a head turn; `factor` and what follows it belong to the scaling."""

    rotary_dim: int
    theta: float = 10_000.0
    scaling: RopeScaling = "default"
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    """Multiplies cosines and sines (YaRN's temperature)."""
    is_truncated: bool = True
    """YaRN: round the corrected range outwards to whole channels."""
    freq_divisors: tuple[float, ...] = ()
    """GGUF's `rope_freqs.weight`, (rotary_dim / 2,): llama3 scaling worked out by the converter."""


class RotaryEmbedding(nn.Module):
    inv_freq: Tensor

    def __init__(self, config: RopeConfig, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self.attention_factor = config.attention_factor
        self.register_buffer("inv_freq", inverse_frequencies(config), persistent=False)

    def forward(self, positions: Tensor) -> Tensor:
        """positions (num_tokens,) -> (num_tokens, rotary_dim) fp32: cosines, then sines."""
        return self.kernels.rope_angles(positions, self.inv_freq, self.attention_factor)


def inverse_frequencies(config: RopeConfig) -> Tensor:
    """(rotary_dim / 2,) fp32: radians per position of each channel pair."""
    exponents = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32) / config.rotary_dim
    inv_freq = 1.0 / config.theta**exponents
    if config.scaling == "linear":
        inv_freq = inv_freq / config.factor
    elif config.scaling == "llama3":
        inv_freq = _scale_llama3(inv_freq, config)
    elif config.scaling == "yarn":
        inv_freq = _scale_yarn(inv_freq, config)
    if config.freq_divisors:
        inv_freq = inv_freq / torch.tensor(config.freq_divisors, dtype=torch.float32, device=inv_freq.device)
    return inv_freq


def _scale_llama3(inv_freq: Tensor, config: RopeConfig) -> Tensor:
    """Llama 3.1: long wavelengths are divided by `factor`, short ones kept, those between blended by length."""
    wavelength = 2 * math.pi / inv_freq
    span = config.high_freq_factor - config.low_freq_factor
    kept = (config.original_max_position / wavelength - config.low_freq_factor) / span
    blended = (1 - kept) * inv_freq / config.factor + kept * inv_freq
    is_long = wavelength > config.original_max_position / config.low_freq_factor
    is_short = wavelength < config.original_max_position / config.high_freq_factor
    return torch.where(is_long, inv_freq / config.factor, torch.where(is_short, inv_freq, blended))


def _scale_yarn(inv_freq: Tensor, config: RopeConfig) -> Tensor:
    """YaRN (Peng et al. 2023): channels that turn often in the original context are kept, slow ones are divided."""

    def channel_that_turns(times: float) -> float:
        length = config.original_max_position / (times * 2 * math.pi)
        return config.rotary_dim * math.log(length) / (2 * math.log(config.theta))

    low, high = channel_that_turns(config.beta_fast), channel_that_turns(config.beta_slow)
    if config.is_truncated:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.rotary_dim - 1)
    channels = torch.arange(inv_freq.shape[0], dtype=torch.float32, device=inv_freq.device)
    divided = ((channels - low) / max(high - low, 0.001)).clamp(0, 1)
    return inv_freq / config.factor * divided + inv_freq * (1 - divided)


def yarn_attention_factor(factor: float) -> float:
    """YaRN's default temperature of the logits, as a factor of cosines and sines."""
    return 1.0 if factor <= 1 else 0.1 * math.log(factor) + 1.0
