"""The peer of `gpu_check.py`: the same requests through transformers' own continuous batching.

`generate_batch` knows one output length for all requests; this drives the manager that it drives, request by request.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from gpu_models import Workload
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.generation.continuous_batching.utils import WorkloadHints

from replicas.engine.models.transformer import TransformerConfig


def build_peer(config: TransformerConfig, device: torch.device) -> Any:
    """Of the same shape and dtype, with random weights."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, config.dtype))
    try:
        with torch.device(device):
            model = LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=config.vocab_size,
                    hidden_size=config.hidden_size,
                    intermediate_size=config.intermediate_size,
                    num_hidden_layers=config.num_layers,
                    num_attention_heads=config.num_heads,
                    num_key_value_heads=config.num_kv_heads,
                    head_dim=config.head_dim,
                    max_position_embeddings=config.max_position,
                    tie_word_embeddings=config.tie_word_embeddings,
                    eos_token_id=None,
                    bos_token_id=None,
                    pad_token_id=None,
                )
            )
    finally:
        torch.set_default_dtype(default)
    return model.eval()


def run_peer(model: Any, workload: Workload, stop_at: float) -> dict[str, Any]:
    """Output tokens per second, start-up and its graphs left out. Where the clock (`perf_counter`) ends the run at
    `stop_at`, a range: at least the tokens of the requests that were done, less than all tokens."""
    longest = max(max_tokens for _, max_tokens in workload)
    generation = GenerationConfig(max_new_tokens=longest, do_sample=False, eos_token_id=-1, pad_token_id=0)
    hints = WorkloadHints(
        max_prompt_length=max(len(prompt) for prompt, _ in workload),
        max_generated_length=longest,
        num_requests=len(workload),
    )
    with model.continuous_batching_context_manager(
        generation_config=generation, workload_hints=hints, block=True, timeout=10
    ) as manager:
        start = time.perf_counter()
        for prompt, max_tokens in workload:
            manager.add_request(prompt, max_new_tokens=max_tokens)
        num_done = num_tokens = 0
        while num_done < len(workload) and time.perf_counter() < stop_at:
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                num_done += 1
                num_tokens += len(result.generated_tokens)
            elif result is None and not manager.is_running():
                raise RuntimeError(f"transformers' generation thread ended after {num_done} requests")
        seconds = time.perf_counter() - start
    wanted = sum(max_tokens for _, max_tokens in workload)
    is_complete = num_done == len(workload)
    if is_complete and num_tokens != wanted:
        raise RuntimeError(f"transformers generated {num_tokens} tokens instead of {wanted}")
    return {
        "is_complete": is_complete,
        "num_done": num_done,
        "seconds": seconds,
        "tokens_per_s_at_least": num_tokens / seconds,
        "tokens_per_s_at_most": wanted / seconds,
        "attention": model.config._attn_implementation,
    }
