"""The C++ kernels against `reference.py`, on every instruction set that this processor runs, and against themselves:
the same bits in any company, in any chunks, on any number of threads."""

from __future__ import annotations

import os
import random
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from replicas.engine.batch import Batch
from replicas.engine.kernels import GumbelDraws, Kernels, select_kernels
from replicas.engine.kernels.cpu.build import KernelsUnavailable
from replicas.engine.kernels.cpu.kernels import CpuKernels
from replicas.engine.kernels.cpu.library import Machine, Op, instruction_sets
from replicas.engine.kernels.cpu.program import Buffer, Recording, step_of
from replicas.engine.kernels.reference import ReferenceKernels
from replicas.engine.layers.rotary import RopeConfig
from replicas.engine.models.transformer import Transformer, TransformerConfig
from replicas.engine.quant.unquantized import UnquantizedLinear
from tests.replicas.engine.paged_driver import PagedDriver, greedy_columns

torch.set_num_threads(1)
REFERENCE = ReferenceKernels()
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.03}

Build = Callable[..., Tensor | tuple[Tensor, ...]]

BEST, *OTHERS = instruction_sets()
every_set = pytest.mark.parametrize(
    "instruction_set", [BEST, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])


@cache
def machine(instruction_set: str | None = None, num_threads: int = 2) -> Machine:
    return Machine(num_threads, instruction_set)


def an_empty_batch(num_tokens: int) -> Batch:
    """Columns for operations that look at none of them but the number of tokens."""
    columns, nothing = np.zeros(num_tokens, np.int64), np.zeros(0, np.int32)
    starts, tables = np.zeros(1, np.int32), np.zeros((0, 1), np.int32)
    return Batch((), columns, columns, columns, starts, nothing, tables, nothing, greedy_columns(0))


def computed(machine: Machine, build: Build, inputs: Sequence[Tensor], rows: Sequence[int] = ()) -> list[Tensor]:
    """What `build(kernels, *inputs)` records, computed."""
    recording = Recording()
    buffers = [recording.buffer(x.shape[1], x.dtype) for x in inputs]
    outputs = build(CpuKernels(machine), *buffers)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    num_tokens = len(inputs[0])
    memory = [torch.full((num_tokens, b.width), torch.nan, dtype=b.dtype) for b in recording.buffers]
    for buffer, values in zip(memory, inputs, strict=False):
        buffer.copy_(values)
    addresses = np.array([tensor.data_ptr() for tensor in memory], np.int64)
    step = step_of(an_empty_batch(num_tokens), np.array(rows, np.int64), addresses, 32)
    machine.run((Op * len(recording.ops))(*recording.ops), step)
    return [memory[cast("Buffer", output).index][: len(rows) or None] for output in outputs]


def check(instruction_set: str, build: Build, inputs: Sequence[Tensor], dtype: torch.dtype) -> None:
    actual = computed(machine(instruction_set), lambda kernels, *x: build(kernels, *x), inputs)
    expected = build(REFERENCE, *inputs)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@every_set
@every_dtype
@settings(max_examples=25, deadline=None)
@given(
    num_tokens=st.integers(1, 70),
    out_features=st.integers(1, 100),
    in_pairs=st.integers(1, 60),
    has_bias=st.booleans(),
    is_fp32_out=st.booleans(),
    seed=st.integers(0, 99),
)
def test_linear(
    instruction_set: str,
    dtype: torch.dtype,
    num_tokens: int,
    out_features: int,
    in_pairs: int,
    has_bias: bool,
    is_fp32_out: bool,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, 2 * in_pairs, generator=generator).to(dtype)
    weight = (torch.randn(out_features, 2 * in_pairs, generator=generator) / in_pairs**0.5).to(dtype)
    bias = torch.randn(out_features, generator=generator).to(dtype) if has_bias else None
    out_dtype = torch.float32 if is_fp32_out else None

    def build(kernels: Kernels, x: Tensor) -> Tensor:
        return kernels.linear(x, kernels.pack(weight), bias, out_dtype)

    check(instruction_set, build, [x], dtype)


@every_set
@every_dtype
@settings(max_examples=15, deadline=None)
@given(num_tokens=st.integers(1, 30), intermediate=st.integers(1, 100), has_bias=st.booleans(), seed=st.integers(0, 99))
def test_gate_and_up_fused_or_not(
    instruction_set: str, dtype: torch.dtype, num_tokens: int, intermediate: int, has_bias: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, 34, generator=generator).to(dtype)
    for width in (intermediate, 64):  # fused where the halves are whole tiles
        weight = (torch.randn(2 * width, 34, generator=generator) / 6).to(dtype)
        bias = torch.randn(2 * width, generator=generator).to(dtype) if has_bias else None

        def build(kernels: Kernels, x: Tensor) -> Tensor:
            return kernels.silu_and_mul(kernels.linear(x, kernels.pack(weight), bias))  # noqa: B023

        check(instruction_set, build, [x], dtype)


@every_set
@every_dtype
@settings(max_examples=15, deadline=None)
@given(num_tokens=st.integers(1, 30), width=st.integers(1, 100), seed=st.integers(0, 99))
def test_norms(instruction_set: str, dtype: torch.dtype, num_tokens: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, residual = (torch.randn(num_tokens, width, generator=generator).to(dtype) for _ in range(2))
    weight = torch.rand(width, generator=generator).to(dtype)
    check(instruction_set, lambda kernels, x: kernels.rms_norm(x, weight, 1e-5), [x], dtype)
    check(instruction_set, lambda kernels, x, r: kernels.add_rms_norm(x, r, weight, 1e-5), [x, residual], dtype)


@every_set
@every_dtype
def test_rows_are_taken_in_the_order_asked_for(instruction_set: str, dtype: torch.dtype) -> None:
    x = torch.randn(20, 7).to(dtype)
    rows = [13, 0, 0, 19]
    (taken,) = computed(machine(instruction_set), lambda kernels, x: kernels.take_rows(x, x), [x], rows)
    assert torch.equal(taken, x[rows])


def random_transformer(kernels: Kernels, config: TransformerConfig, seed: int) -> Transformer:
    method = UnquantizedLinear(kernels)
    model = Transformer(config, kernels, method, method)
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            scale = 0.5 if parameter.dim() == 1 else 1.5 / parameter.shape[1] ** 0.5
            values = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(values + 1 if parameter.dim() == 1 and name == "weight" else values)
    model.finalize()
    return model


@st.composite
def configs(draw: st.DrawFn, dtype: str) -> TransformerConfig:
    head_dim = draw(st.sampled_from([4, 8, 16, 34, 64, 80]))
    num_kv_heads, group = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 7]))
    return TransformerConfig(
        vocab_size=draw(st.integers(20, 70)),
        hidden_size=2 * draw(st.integers(8, 40)),
        intermediate_size=2 * draw(st.integers(8, 40)),
        num_layers=2,
        num_heads=num_kv_heads * group,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=1e-5,
        max_position=2048,
        rope=RopeConfig(draw(st.sampled_from([head_dim, head_dim // 2 // 2 * 2]))),
        tie_word_embeddings=draw(st.booleans()),
        has_qkv_bias=draw(st.booleans()),
        has_output_bias=draw(st.booleans()),
        has_mlp_bias=draw(st.booleans()),
        dtype=dtype,
    )


@every_set
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_a_whole_model_equals_the_reference(instruction_set: str, data: st.DataObject) -> None:
    """Ragged steps over pages in random order, contexts of several segments among them."""
    config, seed = data.draw(configs("float32")), data.draw(st.integers(0, 2**20))
    rng = random.Random(seed)
    block_size = data.draw(st.sampled_from([32, 64]))
    drivers = [
        PagedDriver(random_transformer(kernels, config, seed), block_size, num_blocks=90)
        for kernels in (REFERENCE, CpuKernels(machine(instruction_set)))
    ]
    lengths = data.draw(st.lists(st.sampled_from([1, 2, 5, 33, 300, 600]), min_size=1, max_size=4))
    prompts = {str(i): rng.choices(range(config.vocab_size), k=length) for i, length in enumerate(lengths)}
    steps = [prompts, *[{name: [rng.randrange(config.vocab_size)] for name in prompts} for _ in range(2)]]
    steps.append({name: rng.choices(range(config.vocab_size), k=3) for name in prompts})
    for step in steps:
        for driver in drivers:
            driver.sampler.logits.clear()
            driver.step(step)
        (expected,), (actual,) = (driver.sampler.logits for driver in drivers)
        torch.testing.assert_close(actual, expected, atol=2e-4, rtol=2e-4)


SMALL = TransformerConfig(
    vocab_size=50,
    hidden_size=48,
    intermediate_size=64,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,
    rms_norm_eps=1e-5,
    max_position=2048,
    rope=RopeConfig(16),
)


def small_model(dtype: torch.dtype, machine: Machine) -> Transformer:
    config = TransformerConfig(
        **{name: getattr(SMALL, name) for name in SMALL.__slots__ if name != "dtype"},
        dtype=str(dtype).removeprefix("torch."),
    )
    return random_transformer(CpuKernels(machine), config, seed=5)


@every_set
def test_bf16_stays_close_to_fp32(instruction_set: str) -> None:
    prompt = random.Random(1).choices(range(50), k=400)
    one, two = (PagedDriver(small_model(dtype, machine(instruction_set)), 32).greedy(prompt, 1)[1] for dtype in DTYPES)
    assert torch.cosine_similarity(one.flatten(), two.flatten(), dim=0) > 0.999


@every_set
@every_dtype
def test_the_same_bits_in_any_chunks_and_on_any_number_of_threads(instruction_set: str, dtype: torch.dtype) -> None:
    prompt = random.Random(2).choices(range(50), k=530)
    tokens, logits = PagedDriver(small_model(dtype, machine(instruction_set)), 32).greedy(prompt, 12)
    for chunk, num_threads in ((1, 1), (7, 2), (16, 3), (64, 1), (None, 3), (None, 1)):
        driver = PagedDriver(small_model(dtype, machine(instruction_set, num_threads)), 32, seed=num_threads)
        other_tokens, other_logits = driver.greedy(prompt, 12, chunk)
        assert other_tokens == tokens
        assert torch.equal(other_logits, logits), f"chunks of {chunk}, {num_threads} threads"


@every_set
@every_dtype
def test_the_same_bits_alone_and_among_32(instruction_set: str, dtype: torch.dtype) -> None:
    model = small_model(dtype, machine(instruction_set))
    rng = random.Random(3)
    prompts = {str(i): rng.choices(range(50), k=rng.choice([1, 3, 31, 32, 33, 100, 270])) for i in range(32)}
    alone = {name: PagedDriver(model, 32).greedy(prompt, 4)[1] for name, prompt in prompts.items()}
    together = PagedDriver(model, 32, num_blocks=300)
    pending = prompts
    for position in range(4):
        together.sampler.logits.clear()
        tokens = together.step(pending).token_ids
        for row, name in enumerate(prompts):
            assert torch.equal(together.sampler.logits[0][row], alone[name][position]), f"request {name}"
        pending = {name: [int(token)] for name, token in zip(prompts, tokens, strict=True)}


def test_nan_left_by_a_former_owner_never_reaches_a_request() -> None:
    model = small_model(torch.bfloat16, machine())
    clean, poisoned = PagedDriver(model, 32), PagedDriver(model, 32)
    poisoned.cache.fill_(torch.nan)
    for length in (1, 31, 32, 33, 300):
        prompt = random.Random(length).choices(range(50), k=length)
        assert torch.equal(poisoned.greedy(prompt, 4)[1], clean.greedy(prompt, 4)[1])


def test_a_token_outside_the_vocabulary_fails_the_step_and_the_next_one_runs() -> None:
    driver = PagedDriver(small_model(torch.float32, machine()), 32)
    for token in (50, -1):
        with pytest.raises(IndexError, match="outside the vocabulary"):
            driver.step({"a": [1, token]})
    assert (
        driver.greedy([1, 2, 3], 3)[0] == PagedDriver(small_model(torch.float32, machine()), 32).greedy([1, 2, 3], 3)[0]
    )


def test_buffers_that_live_at_the_same_time_do_not_overlap() -> None:
    recording = Recording()
    kernels = CpuKernels(machine())
    x = cast("Tensor", recording.buffer(64, torch.float32))
    weight = torch.ones(64)
    first, total = kernels.add_rms_norm(kernels.rms_norm(x, weight, 1e-5), x, weight, 1e-5)
    for _ in range(3):
        first, total = kernels.add_rms_norm(first, total, weight, 1e-5)
    offsets, in_all = recording.offsets(output=-1)
    assert in_all < 64 * 4 * len(recording.buffers), "memory is used again"
    last_use = {b: i for i, op in enumerate(recording.ops) for b in (op.in0, op.in1, op.out0, op.out1)}
    born = {b: i for i, op in reversed(list(enumerate(recording.ops))) for b in (op.out0, op.out1) if b >= 0}
    for a in born:
        for b in born:
            if a < b and born[a] <= last_use[b] and born[b] <= last_use[a]:
                assert abs(offsets[a] - offsets[b]) >= 64 * 4


@every_set
@settings(max_examples=30, deadline=None)
@given(
    num_rows=st.integers(1, 5),
    vocab_size=st.integers(1, 200),
    step=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 999),
)
def test_the_largest_of_each_row(instruction_set: str, num_rows: int, vocab_size: int, step: float, seed: int) -> None:
    scores = torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 2
    scores = (scores / step).round() * step if step else scores  # many are equal
    best, token_ids = machine(instruction_set).max_of_rows(scores)
    expected = scores.numpy()
    assert np.array_equal(best, expected.max(axis=1))
    assert np.array_equal(token_ids, expected.argmax(axis=1)), "the lowest id of equals"
    scores[num_rows - 1, seed % vocab_size] = torch.nan
    assert np.isnan(machine(instruction_set).max_of_rows(scores)[0][-1])


@every_set
@settings(max_examples=20, deadline=None)
@given(vocab_size=st.integers(1, 1000), num_rows=st.integers(1, 40), seed=st.integers(0, 2**64 - 1), data=st.data())
def test_draws_are_the_references(
    instruction_set: str, vocab_size: int, num_rows: int, seed: int, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(seed % 2**60)
    scores = torch.randn(num_rows, vocab_size, generator=generator) * data.draw(st.sampled_from([0.0, 0.1, 3.0]))
    scores[torch.rand(scores.shape, generator=generator) < 0.1] = -torch.inf
    scores[:, seed % vocab_size] = 0.5
    rows = np.flatnonzero(np.arange(num_rows) % data.draw(st.integers(1, 3)) == 0)
    draws = GumbelDraws(
        rows=rows,
        best=scores.max(dim=1).values.numpy()[rows],
        temperature=np.float32(data.draw(st.sampled_from([1e-3, 0.5, 1.0, 5.0]))) * np.ones(len(rows), np.float32),
        threshold=np.float32(data.draw(st.sampled_from([-np.inf, -1.0, 0.0]))) * np.ones(len(rows), np.float32),
        seed=np.arange(len(rows), dtype=np.uint64) + np.uint64(seed // 2),
        position=np.arange(len(rows), dtype=np.int64) * 2**31,
    )
    expected = REFERENCE.draw_of_rows(scores, draws)
    assert np.array_equal(machine(instruction_set).draw_of_rows(scores, draws), expected)


@every_set
@settings(max_examples=20, deadline=None)
@given(vocab_size=st.integers(1, 3000), step=st.sampled_from([0.0, 0.5]), seed=st.integers(0, 999), data=st.data())
def test_the_likeliest_tokens_are_the_references(
    instruction_set: str, vocab_size: int, step: float, seed: int, data: st.DataObject
) -> None:
    scores = torch.randn(4, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3
    scores = (scores / step).round() * step if step else scores  # many are equal
    scores[:, seed % vocab_size] = 30 * step
    rows = np.array([0, 1, 3])
    draws = GumbelDraws(
        rows=rows,
        best=scores.max(dim=1).values.numpy()[rows],
        temperature=np.array([0.3, 1.0, 2.0], np.float32),
        threshold=np.array([-np.inf, -1.0, -5.0], np.float32),
        seed=np.zeros(3, np.uint64),
        position=np.zeros(3, np.int64),
    )
    width = data.draw(st.integers(1, min(vocab_size, 300)))
    top = machine(instruction_set).top_of_rows(scores, draws, width)
    expected = REFERENCE.top_of_rows(scores, draws, width)
    assert np.array_equal(top.scores, expected.scores)
    np.testing.assert_allclose(top.mass, expected.mass, rtol=1e-5)
    scaled = (scores.numpy()[rows] - draws.best[:, None]) / draws.temperature[:, None]
    order = np.lexsort((np.broadcast_to(np.arange(vocab_size), scaled.shape), -scaled))[:, :width]
    assert np.array_equal(top.token_ids, order), "equal scores in the order of their ids"


@pytest.mark.parametrize(
    ("dtype", "block_size", "reason"),
    [(torch.float16, 32, "bfloat16 or float32, not in float16"), (torch.bfloat16, 16, "multiple of 32 tokens, not 16")],
)
def test_what_these_kernels_cannot_do_goes_to_the_reference(dtype: torch.dtype, block_size: int, reason: str) -> None:
    assert select_kernels(torch.device("cpu"), dtype, block_size, 1).name == "reference"
    with pytest.raises(ValueError, match=reason):
        select_kernels(torch.device("cpu"), dtype, block_size, 1, "cpu")


def test_without_a_compiler_the_reference_runs_and_the_reason_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert select_kernels(torch.device("cpu"), torch.bfloat16, 32, 1).name == "reference"
    assert "install g++" in caplog.text
    with pytest.raises(KernelsUnavailable, match="install g"):
        Machine(1)


def test_a_set_that_does_not_run_here_is_refused_with_the_choices() -> None:
    with pytest.raises(KernelsUnavailable, match="portable"):
        Machine(1, "sve3")


@pytest.mark.skipif(sys.platform != "linux", reason="other kernels take no hints")
def test_threads_keep_to_their_own_processors_and_the_caller_only_meanwhile() -> None:
    before, threads = os.sched_getaffinity(0), set(os.listdir("/proc/self/task"))
    if len(before) < 2:
        pytest.skip("one processor has nothing to share out")
    two = Machine(2)
    packed = torch.empty(64 * 64)
    two.pack(torch.ones(64, 64), packed)
    (worker,) = set(os.listdir("/proc/self/task")) - threads
    assert os.sched_getaffinity(0) == before
    assert len(os.sched_getaffinity(int(worker))) == len(before) - len(before) // 2
    assert os.sched_getaffinity(int(worker)) < before


def test_an_odd_number_of_input_features_is_refused() -> None:
    with pytest.raises(ValueError, match="even number of input features, not 7"):
        CpuKernels(machine()).pack(torch.ones(4, 7))
