"""One step: the same logits for every chunking and every company, and nothing left over from former owners."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from replicas.engine.kernels import Kernels
from replicas.engine.kernels.reference import ReferenceKernels
from replicas.engine.layers.rotary import RopeConfig
from replicas.engine.models.transformer import Transformer, TransformerConfig
from replicas.engine.quant.unquantized import UnquantizedLinear
from tests.replicas.engine.paged_driver import PagedDriver

torch.set_num_threads(1)
PROMPT = [3, 14, 15, 9, 2, 6, 5, 35, 8, 9, 7, 9, 32, 38, 4, 6, 26, 4, 33, 8]


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model("float32")


def random_model(dtype: str, kernels: Kernels | None = None) -> Transformer:
    config = TransformerConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        rms_norm_eps=1e-5,
        max_position=128,
        rope=RopeConfig(8),
        tie_word_embeddings=True,
        dtype=dtype,
    )
    kernels = kernels or ReferenceKernels()
    method = UnquantizedLinear(kernels)
    model = Transformer(config, kernels, method, method)
    generator = torch.Generator().manual_seed(1)
    for slot, shape in _shapes(model).items():
        model.weight_slots()[slot](torch.randn(shape, generator=generator) * 0.3)
    model.finalize()
    return model


def _shapes(model: Transformer) -> dict[str, tuple[int, ...]]:
    sizes = {"embed_tokens": (40, 32), "q_proj": (32, 32), "k_proj": (16, 32), "v_proj": (16, 32), "o_proj": (32, 32)}
    sizes |= {"gate_proj": (48, 32), "up_proj": (48, 32), "down_proj": (32, 48)}
    return {slot: sizes.get(slot.split(".")[-2], (32,)) for slot in model.weight_slots()}


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 7, 19])
@pytest.mark.parametrize("block_size", [1, 4, 32])
def test_every_chunking_of_the_prompt_gives_the_same_logits(model: Transformer, chunk: int, block_size: int) -> None:
    driver = PagedDriver(model, block_size)
    tokens, logits = driver.greedy(PROMPT, 20)
    chunked_tokens, chunked_logits = driver.greedy(PROMPT, 20, chunk)
    assert chunked_tokens == tokens
    torch.testing.assert_close(chunked_logits, logits, atol=1e-4, rtol=1e-4)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_company_does_not_change_a_request(model: Transformer, data: st.DataObject) -> None:
    """Random prompts, each step a random part of the requests with a random number of their tokens."""
    prompts = data.draw(st.lists(st.lists(st.integers(0, 39), min_size=1, max_size=12), min_size=2, max_size=5))
    alone = [PagedDriver(model).greedy(prompt, 6)[0] for prompt in prompts]
    driver = PagedDriver(model)
    lacking = {str(i): list(prompt) for i, prompt in enumerate(prompts)}
    drawn: dict[str, list[int]] = {name: [] for name in lacking}
    while any(len(tokens) < 6 for tokens in drawn.values()):
        names = [name for name in lacking if len(drawn[name]) < 6]
        chosen = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
        counts = {name: data.draw(st.integers(1, len(lacking[name]))) for name in chosen}
        pending = {name: lacking[name][: counts[name]] for name in chosen}
        for name in chosen:
            del lacking[name][: counts[name]]
        sampled = [name for name in chosen if not lacking[name]]
        output = driver.step(pending, sampled)
        for name, token in zip(sampled, output.token_ids.tolist(), strict=True):
            drawn[name].append(token)
            lacking[name].append(token)
    assert [drawn[str(i)] for i in range(len(prompts))] == alone


def test_logits_are_computed_for_sampled_rows_only_and_in_their_order(model: Transformer) -> None:
    driver = PagedDriver(model)
    driver.step({"a": [1, 2], "b": [3], "c": [4, 5, 6]}, sampled=["c", "a"])
    (logits,) = driver.sampler.logits
    expected = [PagedDriver(model).greedy(prompt, 1)[1][0] for prompt in ([4, 5, 6], [1, 2])]
    torch.testing.assert_close(logits, torch.stack(expected), atol=1e-5, rtol=1e-5)


def test_a_step_that_samples_nothing_returns_nothing(model: Transformer) -> None:
    output = PagedDriver(model).step({"a": [1, 2, 3]}, sampled=[])
    assert len(output.token_ids) == 0


@pytest.mark.parametrize("prompt_len", [1, 3, 4, 5, 8, 9])
def test_nan_left_by_a_former_owner_never_reaches_a_request(model: Transformer, prompt_len: int) -> None:
    clean, poisoned = PagedDriver(model), PagedDriver(model)
    poisoned.cache.fill_(torch.nan)
    prompt = PROMPT[:prompt_len]
    assert poisoned.greedy(prompt, 12)[0] == clean.greedy(prompt, 12)[0]
    # in company rows are padded to the longest
    names = {"a": PROMPT[:9], "b": PROMPT[:3], "c": PROMPT[:1]}
    expected = clean.step(names).token_ids
    poisoned.cache.fill_(torch.nan)
    actual = poisoned.step(names).token_ids
    for _ in range(6):
        assert np.array_equal(actual, expected)
        pending = {name: [int(token)] for name, token in zip(names, expected, strict=True)}
        expected, actual = clean.step(pending).token_ids, poisoned.step(pending).token_ids
    assert all(logits.isfinite().all() for logits in poisoned.sampler.logits)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precisions_stay_close_to_fp32(model: Transformer, dtype: str) -> None:
    _, expected = PagedDriver(model).greedy(PROMPT, 1)
    _, actual = PagedDriver(random_model(dtype)).greedy(PROMPT, 1)
    similarity = torch.cosine_similarity(expected.flatten(), actual.flatten(), dim=0)
    assert similarity > 0.999


def test_a_failing_forward_fails_the_step_and_the_next_one_runs(model: Transformer) -> None:
    driver = PagedDriver(model)
    with pytest.raises(IndexError):
        driver.step({"a": [1, 4000]})
    assert driver.greedy(PROMPT, 5)[0] == PagedDriver(model).greedy(PROMPT, 5)[0]
