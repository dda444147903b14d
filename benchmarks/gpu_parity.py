"""Greedy answers of small random models: the engine on Triton kernels and graphs against transformers' `generate`."""

from __future__ import annotations

import random
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gpu_models import Rig, empty_model, generate, make_engine
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from replicas.engine.models.hf_folder import HfFolder
from replicas.engine.models.transformer import Transformer

NUM_BLOCKS = 128
LARGEST_GAP = 0.1
"""What a bf16 choice may lack to the best of fp32, in standard deviations of the logits."""

SMALL: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 192,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.15,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
CASES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "grouped": (LlamaConfig, LlamaForCausalLM, {}),
    "multi-query, heads of 128": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 1, "head_dim": 128}),
    "multi-head, tied": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 6, "tie_word_embeddings": True}),
    "biases, heads of 80": (Qwen2Config, Qwen2ForCausalLM, {"head_dim": 80}),
}


def check_parity(device: torch.device, is_dry: bool) -> dict[str, float]:
    """The largest gap of each case in bf16. AssertionError where fp32 tokens differ or the gap is too large."""
    gaps = {}
    for name in list(CASES)[: 1 if is_dry else None]:
        config_class, model_class, changes = CASES[name]
        torch.manual_seed(3)
        oracle = model_class(config_class(**(SMALL | changes))).float().eval().to(device)
        lengths, num_tokens = ((3, 40), 4) if is_dry else ((1, 7, 33, 200, 400), 64)
        rng = random.Random(5)
        prompts = [rng.choices(range(SMALL["vocab_size"]), k=length) for length in lengths]
        with tempfile.TemporaryDirectory() as folder:
            oracle.save_pretrained(folder)
            fp32, bf16 = (
                _answers(Path(folder), dtype, prompts, num_tokens, device) for dtype in ("float32", "bfloat16")
            )
        for prompt, answer in zip(prompts, fp32, strict=True):
            expected = _oracle_answer(oracle, prompt, num_tokens, device)
            assert answer == expected, f"{name}, prompt of {len(prompt)}: {answer} instead of {expected}"
        gaps[name] = max(_gap(oracle, prompt, answer, device) for prompt, answer in zip(prompts, bf16, strict=True))
        assert gaps[name] <= LARGEST_GAP, f"{name}: a bf16 choice lacks {gaps[name]:.3f} standard deviations"
    return gaps


def _answers(
    folder: Path, dtype: str, prompts: list[list[int]], num_tokens: int, device: torch.device
) -> list[list[int]]:
    """Of the engine, all prompts in one batch, the longer ones in chunks."""
    model = _load(folder, dtype, device)
    engine = make_engine(Rig(model, NUM_BLOCKS, device), max_tokens_per_step=150)
    return generate(engine, [(prompt, num_tokens) for prompt in prompts])


@torch.inference_mode()
def _load(folder: Path, dtype: str, device: torch.device) -> Transformer:
    checkpoint = HfFolder(folder)
    model = empty_model(replace(checkpoint.transformer_config(), dtype=dtype), device)
    slots = model.weight_slots()
    for name, tensor in checkpoint.tensors(getattr(torch, dtype)):
        if name in slots:  # a tied head is stored, but has no place of its own
            slots[name](tensor)
    model.finalize()
    return model


@torch.inference_mode()
def _oracle_answer(oracle: Any, prompt: list[int], num_tokens: int, device: torch.device) -> list[int]:
    ids = torch.tensor([prompt], device=device)
    answer = oracle.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=num_tokens)
    tokens: list[int] = answer[0, len(prompt) :].tolist()
    return tokens


@torch.inference_mode()
def _gap(oracle: Any, prompt: list[int], answer: list[int], device: torch.device) -> float:
    """The largest lead of the oracle's own choice over the answer's, of all tokens of the answer."""
    logits: Tensor = oracle(torch.tensor([prompt + answer], device=device)).logits[0, len(prompt) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(answer, device=device)[:, None])[:, 0]
    return float(((logits.max(dim=1).values - chosen) / logits.std(dim=1)).max())
