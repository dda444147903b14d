"""The whole engine with a real (small, random) model in fp32: the same tokens however the work is cut up."""

import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers import logging as transformers_logging

from replicas.engine.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from replicas.engine.engine import Engine
from replicas.engine.models.loader import read_model_info
from replicas.engine.request import Request
from replicas.engine.sampling_params import SamplingParams
from replicas.engine.worker import LocalExecutor

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

NUM_TOKENS = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(11)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).float().save_pretrained(path)
    return path


def make_engine(folder: Path, num_blocks: int, **scheduler: int) -> Engine:
    config = EngineConfig(
        ModelConfig(str(folder), dtype="float32", device="cpu"),
        CacheConfig(block_size=4, num_blocks=num_blocks),
        SchedulerConfig(**scheduler),
        num_threads=1,
    )
    info = read_model_info(config.model)
    engine = Engine(config, info, LocalExecutor(config, info))
    engine.start()
    return engine


@cache
def requests() -> tuple[dict[str, Any], ...]:
    """Half greedy, half sampled with filters and penalties; many share a beginning."""
    rng = random.Random(2)
    shared = [rng.randrange(97) for _ in range(24)]
    sampled: dict[str, Any] = {
        "temperature": 0.8,
        "top_p": 0.9,
        "top_k": 20,
        "presence_penalty": 0.5,
        "repetition_penalty": 1.1,
    }
    return tuple(
        {
            "prompt_token_ids": shared[: rng.randrange(25)] + [rng.randrange(97) for _ in range(rng.randrange(1, 30))],
            "sampling": SamplingParams(
                max_tokens=NUM_TOKENS, seed=index, **(sampled if index % 2 else {"temperature": 0.0})
            ),
        }
        for index in range(32)
    )


def answers(engine: Engine, chosen: tuple[dict[str, Any], ...]) -> list[list[int]]:
    for index, request in enumerate(chosen):
        engine.add(Request(str(index), **request))
    tokens: list[list[int]] = [[] for _ in chosen]
    while engine.has_work:
        for output in engine.step():
            assert output.finish is None or output.finish.error is None, output.finish
            tokens[int(output.request_id)] += output.token_ids
    engine.check_integrity()
    assert engine.stats().is_intact
    return tokens


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[list[int]]:
    """Each request in an engine where nothing else runs and nothing is cached."""
    engine = make_engine(folder, num_blocks=40)
    return [answers(engine, ({**request, "cache_salt": str(i)},))[0] for i, request in enumerate(requests())]


@pytest.mark.parametrize("num_blocks", [800, 40], ids=["roomy", "preempting"])
@pytest.mark.parametrize("max_num_batched_tokens", [pytest.param(1, marks=pytest.mark.slow), 7, 16, 64, 10**6])
def test_the_same_tokens_in_every_company(
    folder: Path, alone: list[list[int]], max_num_batched_tokens: int, num_blocks: int
) -> None:
    engine = make_engine(folder, num_blocks, max_num_batched_tokens=max_num_batched_tokens)
    assert answers(engine, requests()) == alone
    assert answers(engine, requests()) == alone, "with a warm prefix cache"
    counters = engine.stats().counters
    assert counters.prefix_hits > 0
    if num_blocks == 40 and max_num_batched_tokens >= 16:
        assert counters.num_preemptions > 0


def test_resumed_at_any_token(folder: Path, alone: list[list[int]]) -> None:
    engine = make_engine(folder, num_blocks=800)
    for cut in range(1, NUM_TOKENS, 4):
        resumed = tuple(
            {**request, "emitted_token_ids": tokens[:cut]} for request, tokens in zip(requests(), alone, strict=True)
        )
        assert answers(engine, resumed) == [tokens[cut:] for tokens in alone]
