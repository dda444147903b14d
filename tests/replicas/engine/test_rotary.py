"""Frequencies equal transformers' for every scaling that we support."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from replicas.engine.kernels.reference import ReferenceKernels
from replicas.engine.layers.rotary import RopeConfig, RotaryEmbedding, yarn_attention_factor

KERNELS = ReferenceKernels()
LLAMA3: dict[str, Any] = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES: list[tuple[dict[str, Any], RopeConfig]] = [
    ({"rope_type": "default"}, RopeConfig(64, 10_000.0)),
    ({"rope_type": "linear", "factor": 4.0}, RopeConfig(64, 10_000.0, "linear", 4.0)),
    (
        {"rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 8192, **LLAMA3},
        RopeConfig(64, 10_000.0, "llama3", 32.0, 8192, 1.0, 4.0),
    ),
    (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048},
        RopeConfig(64, 10_000.0, "yarn", 4.0, 2048, attention_factor=yarn_attention_factor(4.0)),
    ),
    (
        {
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 512,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "attention_factor": 1.5,
        },
        RopeConfig(64, 10_000.0, "yarn", 8.0, 512, beta_fast=16.0, beta_slow=2.0, attention_factor=1.5),
    ),
]


@pytest.mark.parametrize(("parameters", "config"), CASES, ids=lambda case: str(case)[:40])
def test_cosines_and_sines_equal_transformers(parameters: dict[str, Any], config: RopeConfig) -> None:
    oracle = LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=256,
            num_attention_heads=4,
            max_position_embeddings=8192,
            rope_parameters={"rope_theta": config.theta, **parameters},
        )
    )
    positions = torch.tensor([0, 1, 2, 63, 500, 4095, 8191])
    expected_cos, expected_sin = oracle(torch.zeros(1), positions[None])
    cos, sin = RotaryEmbedding(config, KERNELS)(positions).chunk(2, dim=-1)
    torch.testing.assert_close(cos, expected_cos[0, :, :32], atol=1e-6, rtol=0)
    torch.testing.assert_close(sin, expected_sin[0, :, :32], atol=1e-6, rtol=0)


def test_divisors_of_gguf_divide_the_frequencies() -> None:
    plain, divided = (RotaryEmbedding(RopeConfig(4, freq_divisors=d), KERNELS).inv_freq for d in ((), (2.0, 8.0)))
    torch.testing.assert_close(divided, plain / torch.tensor([2.0, 8.0]))
