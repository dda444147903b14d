"""A rank starts, sizes its cache and runs steps with the real sampler; what cannot be met is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers import logging as transformers_logging

from replicas.engine.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from replicas.engine.models.loader import read_model_info
from replicas.engine.worker import LocalExecutor
from tests.replicas.engine.paged_driver import PagedDriver, build

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _keep_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        dtype="bfloat16",
    )
    path = tmp_path_factory.mktemp("worker") / "model"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


def executor(
    folder: Path, cache: CacheConfig | None = None, tensor_parallel_size: int = 1, **model: Any
) -> LocalExecutor:
    config = ModelConfig(str(folder), device="cpu", **model)
    engine = EngineConfig(
        config,
        cache or CacheConfig(block_size=4, num_blocks=64),
        SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=32),
        num_threads=1,
        tensor_parallel_size=tensor_parallel_size,
    )
    return LocalExecutor(engine, read_model_info(config))


def test_it_draws_the_greedy_tokens_of_the_model(folder: Path) -> None:
    driver = PagedDriver(build(folder))
    expected, _ = driver.greedy([1, 2, 3], 10)
    local = executor(folder, dtype="float32")
    assert local.start() == 64
    # the driver makes the batches, the executor runs them over its own cache
    tokens = [int(local.execute(driver.batch({"r": [1, 2, 3]})).token_ids[0])]
    while len(tokens) < 10:
        tokens.append(int(local.execute(driver.batch({"r": tokens[-1:]})).token_ids[0]))
    assert tokens == expected
    assert local.kernels_name == "reference"  # its blocks of 4 tokens are too small for the CPU kernels
    assert set(local.phases_s) == {"open", "load_weights", "trial_step", "kv_cache"}
    assert all(seconds >= 0 for seconds in local.phases_s.values())
    local.shutdown()


def test_the_cache_is_sized_by_what_a_cpu_can_give(folder: Path) -> None:
    # 8 sequences of 128 tokens in blocks of 16 are all that this configuration can use
    assert executor(folder, CacheConfig(block_size=16)).start() == 64
    block_bytes = 2 * 2 * 2 * 16 * 8 * 2
    assert executor(folder, CacheConfig(block_size=16, memory_bytes=20 * block_bytes)).start() == 20
    with pytest.raises(ValueError, match="cannot hold one sequence of 128 tokens"):
        executor(folder, CacheConfig(block_size=16, num_blocks=7)).start()


def test_the_dtype_is_the_checkpoints_unless_named(folder: Path) -> None:
    block_bytes_of_bf16 = 2 * 2 * 2 * 16 * 8 * 2
    cache = CacheConfig(block_size=16, memory_bytes=40 * block_bytes_of_bf16)
    assert executor(folder, cache).start() == 40
    assert executor(folder, cache, dtype="float32").start() == 20


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "int4"}, "dtype 'int4' is not one of auto, bfloat16"),
        ({"quantization": "awq"}, "quantization 'awq' is not supported"),
        ({"kernels": "warp"}, "kernels 'warp' are not available on cpu"),
        ({"tensor_parallel_size": 2}, "is 2, but this executor runs one rank"),
    ],
)
def test_what_cannot_be_met_is_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        executor(folder, **changes).start()


@pytest.mark.parametrize("device", ["tpu", "meta", "cuda:99", "cuda:x"])
def test_a_device_that_is_not_here_is_refused(folder: Path, device: str) -> None:
    config = ModelConfig(str(folder), device=device)
    with pytest.raises(ValueError, match=f"device '{device}'"):
        LocalExecutor(EngineConfig(config), read_model_info(config)).start()


def test_the_bundled_file_is_loaded_within_three_seconds() -> None:
    config = ModelConfig("bundled:smollm2-135m", device="cpu")
    local = LocalExecutor(EngineConfig(config, CacheConfig(num_blocks=256)), read_model_info(config))
    assert local.start() == 256
    assert local.phases_s["open"] + local.phases_s["load_weights"] < 3
