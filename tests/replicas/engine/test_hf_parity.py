"""The model computes what Hugging Face's transformers computes, in fp32: tokens equal, log-probabilities close."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers import logging as transformers_logging

from replicas.engine.models.gguf_model import GgufModel
from replicas.engine.models.source import resolve_source
from tests.replicas.engine.paged_driver import PagedDriver, build

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()
torch.set_num_threads(1)

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}

CASES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "grouped, tied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "grouped, untied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": False}),
    "multi-query": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 1}),
    "multi-head": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 6}),
    "own head size": (LlamaConfig, LlamaForCausalLM, {"head_dim": 16}),
    "biases": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    "rope linear": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": LINEAR}),
    "rope llama3": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": LLAMA3}),
    "rope yarn": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": YARN}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_random_models_agree_over_200_tokens(case: str, tmp_path: Path) -> None:
    config_class, model_class, changes = CASES[case]
    torch.manual_seed(7)
    oracle = model_class(config_class(**(SMALL | changes))).float().eval()
    _randomise_biases(oracle)
    oracle.save_pretrained(tmp_path)
    _assert_agrees(oracle, PagedDriver(build(tmp_path)), prompt=[5, 17, 60, 3, 3, 41, 88], num_tokens=200)


@pytest.mark.slow
def test_the_bundled_model_agrees_over_200_tokens() -> None:
    path = resolve_source("bundled:smollm2-135m")
    oracle = _oracle_of_gguf(path)
    prompt = [1, 9690, 198, 2683, 359, 260, 3491, 1446, 30, 2, 198, 1, 4093, 198, 504, 3575, 282, 4649, 314]
    _assert_agrees(oracle, PagedDriver(build(path), block_size=32), prompt, num_tokens=200)


def _assert_agrees(oracle: Any, driver: PagedDriver, prompt: list[int], num_tokens: int) -> None:
    with torch.inference_mode():
        # to the very end: no token may stop the oracle, and `min_new_tokens` would forbid tokens instead
        oracle.generation_config.eos_token_id = None
        # every token is seen: without a mask `generate` hides the prompt's padding ids
        ids = torch.tensor([prompt])
        expected = oracle.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=num_tokens)
        expected = expected[0, len(prompt) :].tolist()
        assert len(expected) == num_tokens
        dense = oracle(torch.tensor([prompt + expected])).logits[0, len(prompt) - 1 : -1]
    tokens, logits = driver.greedy(prompt, num_tokens)
    assert tokens == expected
    difference = (torch.log_softmax(logits, -1) - torch.log_softmax(dense.float(), -1)).abs().max()
    assert difference < 1e-4


def _randomise_biases(model: torch.nn.Module) -> None:
    """They are born zero, and a bias that is never added would go unnoticed."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)


def _oracle_of_gguf(path: Path) -> Any:
    """transformers' model with the weights of our GGUF reader (whose values `test_gguf.py` compares with gguf-py);
    the configuration is the published one of SmolLM2-135M, written down here."""
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config).float().eval()
    weights = dict(GgufModel(path).tensors(torch.float32))
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert missing == ["lm_head.weight"]
    assert unexpected == []
    model.tie_weights()
    return model
