"""How many blocks fit, and the sentence when not one sequence does."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from replicas.engine.config import CacheConfig
from replicas.engine.kv_cache import GIB, KVShape, allocate, choose_num_blocks, cpu_budget_bytes

SHAPE = KVShape(num_layers=30, num_kv_heads=3, block_size=32, head_dim=64, dtype=torch.bfloat16)
LIMITS = {"max_model_len": 1000, "max_num_seqs": 4}


def test_a_block_counts_k_and_v_of_every_layer() -> None:
    assert SHAPE.block_bytes == allocate(SHAPE, 1, torch.device("cpu")).nbytes == 30 * 2 * 3 * 32 * 64 * 2


def test_the_first_size_that_is_set_decides() -> None:
    plenty = 10 * GIB
    both = CacheConfig(num_blocks=40, memory_bytes=35 * SHAPE.block_bytes)
    assert choose_num_blocks(SHAPE, both, plenty, **LIMITS) == 40
    assert choose_num_blocks(SHAPE, CacheConfig(memory_bytes=35 * SHAPE.block_bytes), plenty, **LIMITS) == 35
    assert choose_num_blocks(SHAPE, CacheConfig(), 50 * SHAPE.block_bytes, **LIMITS) == 50
    # 4 sequences of 1,000 tokens cannot use more than 4 x 32 blocks
    assert choose_num_blocks(SHAPE, CacheConfig(), plenty, **LIMITS) == 128
    assert choose_num_blocks(SHAPE, CacheConfig(num_blocks=500), plenty, **LIMITS) == 500


@pytest.mark.parametrize(
    ("config", "available"),
    [
        (CacheConfig(num_blocks=31), GIB),
        (CacheConfig(memory_bytes=31 * SHAPE.block_bytes), GIB),
        (CacheConfig(), 31 * SHAPE.block_bytes),
        (CacheConfig(), -GIB),
    ],
)
def test_a_cache_too_small_for_one_sequence_is_refused_with_the_numbers(config: CacheConfig, available: int) -> None:
    with pytest.raises(ValueError, match=r"one sequence of 1000 tokens: that takes 32 blocks of 32 tokens"):
        choose_num_blocks(SHAPE, config, available, **LIMITS)


@given(free=st.integers(0, 1 << 45), max_model_len=st.integers(1, 1 << 20))
def test_the_budget_on_a_cpu_leaves_room_for_others(free: int, max_model_len: int) -> None:
    budget = cpu_budget_bytes(SHAPE, free, max_model_len)
    assert 0 <= budget <= min(4 * GIB, free // 4)
    if free >= 16 * GIB:
        assert budget >= GIB


def test_a_cache_that_no_memory_holds_is_refused() -> None:
    with pytest.raises(ValueError, match="no memory for a KV cache of 1000000000000 blocks"):
        allocate(SHAPE, 10**12, torch.device("cpu"))
