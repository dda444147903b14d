"""The sampler against a naive full-sort oracle, against the distribution it claims, and against itself in company."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from replicas.engine.batch import Penalised, SamplingColumns, StepOutput
from replicas.engine.kernels import Kernels
from replicas.engine.kernels.cpu.kernels import CpuKernels
from replicas.engine.kernels.cpu.library import Machine, instruction_sets
from replicas.engine.kernels.reference import ReferenceKernels
from replicas.engine.philox import philox4x32
from replicas.engine.sampler import Sampler, _Candidates

CPU = torch.device("cpu")
KERNELS: list[Kernels] = [ReferenceKernels()]
"""The set that the tests of this module run on, one set after the other."""


BEST, *OTHERS = instruction_sets()


@pytest.fixture(
    params=["reference", BEST, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)],
    autouse=True,
    scope="module",
)
def _every_kernel_set(request: pytest.FixtureRequest) -> None:
    is_reference = request.param == "reference"
    KERNELS[0] = ReferenceKernels() if is_reference else CpuKernels(Machine(2, request.param))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@dataclass(frozen=True)
class Row:
    """Sampling parameters of one row, as a request would give them."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    position: int = 0
    num_logprobs: int = -1
    prompt: tuple[int, ...] = ()
    output: tuple[int, ...] = ()
    logit_bias: dict[int, float] = field(default_factory=dict)
    banned: tuple[int, ...] = ()


def columns_of(rows: list[Row]) -> SamplingColumns:
    def column(name: str, dtype: Any) -> NDArray[Any]:
        return np.array([getattr(row, name) for row in rows], dtype)

    penalised = [
        Penalised(i, np.array(row.prompt, np.int64), np.array(row.output, np.int64))
        for i, row in enumerate(rows)
        if row.presence_penalty or row.frequency_penalty or row.repetition_penalty != 1.0
    ]
    return SamplingColumns(
        temperature=column("temperature", np.float32),
        top_p=column("top_p", np.float32),
        top_k=column("top_k", np.int32),
        min_p=column("min_p", np.float32),
        presence_penalty=column("presence_penalty", np.float32),
        frequency_penalty=column("frequency_penalty", np.float32),
        repetition_penalty=column("repetition_penalty", np.float32),
        seed=column("seed", np.uint64),
        position=column("position", np.int64),
        num_logprobs=column("num_logprobs", np.int32),
        penalised=tuple(penalised),
        logit_bias=tuple((i, row.logit_bias) for i, row in enumerate(rows) if row.logit_bias),
        banned=tuple((i, row.banned) for i, row in enumerate(rows) if row.banned),
    )


def sample(logits: torch.Tensor, rows: list[Row]) -> StepOutput:
    return Sampler(logits.shape[1], CPU, KERNELS[0]).sample(logits, columns_of(rows))


def random_logits(num_rows: int, vocab_size: int, seed: int, step: float = 0.0) -> torch.Tensor:
    """Peaked like a language model's; `step` rounds them, so that many are equal."""
    logits = torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3
    return (logits / step).round() * step if step else logits


def token_of_oracle(logits: NDArray[np.float32], row: Row) -> int:
    """One row by the book: edit, scale, sort everything, filter, draw with plain-integer Philox per token."""
    x = logits.astype(np.float32).copy()
    for token_id, bias in row.logit_bias.items():
        x[token_id] += np.float32(bias)
    for token_id in row.banned:
        x[token_id] = -np.inf
    for token_id in set(row.prompt) | set(row.output):
        r = np.float32(row.repetition_penalty)
        x[token_id] = x[token_id] / r if x[token_id] > 0 else x[token_id] * r
    for token_id in set(row.output):
        count = np.float32(row.output.count(token_id))
        x[token_id] -= np.float32(row.presence_penalty) + np.float32(row.frequency_penalty) * count
    if row.temperature == 0 or row.top_k == 1:
        return int(x.argmax())
    x = (x - x.max()) / np.float32(row.temperature)
    kept = [i for i in range(len(x)) if x[i] > -np.inf and np.exp(np.float64(x[i])) >= row.min_p * (1 - 1e-6)]
    kept.sort(key=lambda i: (-x[i], i))
    if row.top_k > 0:
        kept = kept[: row.top_k]
    p = np.exp(x[kept].astype(np.float64))
    p /= p.sum()
    if row.top_p < 1:
        kept = kept[: 1 + int((p.cumsum() < row.top_p * (1 - 1e-9)).sum())]
    noise = gumbels(row, len(x))
    return max(kept, key=lambda i: float(x[i]) + noise[i])


def gumbels(row: Row, num_tokens: int) -> list[float]:
    def word(value: int) -> NDArray[np.int64]:
        return np.array([value], np.int64)

    blocks = np.arange(-(-num_tokens // 4), dtype=np.int64)
    counter = (blocks, word(0), word(row.position % 2**32), word(row.position >> 32))
    words = philox4x32(counter, (word(row.seed % 2**32), word(row.seed >> 32)))
    uniform = [(int(words[i % 4][i // 4]) + 0.5) / 2**32 for i in range(num_tokens)]
    return [-math.log(-math.log(u)) for u in uniform]


VOCAB = 700
tokens = st.lists(st.integers(0, VOCAB - 1), max_size=12).map(tuple)
# Steps of 1/64 keep a filter's border away from the oracle's rounding.
any_row = st.builds(
    Row,
    temperature=st.sampled_from([0.0, 0.25, 0.7, 1.0, 2.0, 16.0]),
    top_p=st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.99, 1.0]),
    top_k=st.sampled_from([0, 1, 2, 5, 50, 300, 650, 700, 9999]),
    min_p=st.sampled_from([0.0, 0.0, 0.011, 0.11, 1.0]),
    presence_penalty=st.sampled_from([0.0, 0.0, -1.5, 1.5]),
    frequency_penalty=st.sampled_from([0.0, 0.0, -0.75, 0.75]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 0.5, 1.25]),
    seed=st.integers(0, 2**64 - 1),
    position=st.integers(0, 2**40),
    prompt=tokens,
    output=tokens,
    logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), st.sampled_from([-100.0, -2.5, 5.0, 100.0]), max_size=4),
    banned=tokens,
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(any_row, min_size=1, max_size=6), st.integers(0, 999), st.sampled_from([0.0, 0.125, 2.0]))
def test_agrees_with_the_oracle(rows: list[Row], seed: int, step: float) -> None:
    logits = random_logits(len(rows), VOCAB, seed, step)
    output = sample(logits, rows)
    assert not output.errors
    assert output.token_ids.tolist() == [token_of_oracle(x.numpy(), row) for x, row in zip(logits, rows, strict=True)]


@pytest.mark.parametrize("top_k", [256, 1024])
def test_round_numbers_of_top_k_need_no_sort(top_k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, row = random_logits(1, 3000, seed=1), Row(top_k=top_k, temperature=3.0)

    def sort(*arguments: object) -> None:
        raise AssertionError("the whole vocabulary is sorted")

    monkeypatch.setattr(_Candidates, "of_whole_row", sort)
    assert sample(logits, [row]).token_ids[0] == token_of_oracle(logits[0].numpy(), row)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(any_row, min_size=33, max_size=33), st.integers(0, 999), st.sampled_from([0.0, 0.125]))
def test_a_row_does_not_see_its_company(rows: list[Row], seed: int, step: float) -> None:
    logits = random_logits(len(rows), VOCAB, seed, step)
    together = sample(logits, rows)
    for i, row in enumerate(rows):
        assert sample(logits[i : i + 1], [row]).token_ids[0] == together.token_ids[i]


@pytest.mark.parametrize(
    "row",
    [
        Row(),
        Row(temperature=0.5),
        Row(top_k=5),
        Row(top_p=0.8),
        Row(min_p=0.05),
        Row(temperature=1.5, top_k=20, top_p=0.9, min_p=0.01),
    ],
)
def test_draws_follow_the_distribution(row: Row) -> None:
    num_draws, vocab_size = 20_000, 40
    x = random_logits(1, vocab_size, seed=5)[0] / 2
    rows = columns_of([row] * num_draws)
    positions = np.arange(num_draws, dtype=np.int64)
    columns = SamplingColumns(
        **{name: getattr(rows, name) for name in SamplingColumns.__dataclass_fields__ if name != "position"},
        position=positions,
    )
    drawn = Sampler(vocab_size, CPU, KERNELS[0]).sample(x.expand(num_draws, -1), columns).token_ids
    observed = np.bincount(drawn, minlength=vocab_size)
    expected = kept_distribution(x.numpy(), row) * num_draws
    assert (observed[expected == 0] == 0).all()
    common = expected >= 5
    statistic = ((observed - expected)[common] ** 2 / expected[common]).sum()
    degrees = common.sum() - 1
    # Wilson-Hilferty: the chi-square quantile at 1e-5; the draws are fixed, so this passes for ever or never.
    assert statistic < degrees * (1 - 2 / (9 * degrees) + 4.265 * np.sqrt(2 / (9 * degrees))) ** 3


def kept_distribution(x: NDArray[np.float32], row: Row) -> NDArray[np.float64]:
    p = np.exp((x.astype(np.float64) - x.max()) / row.temperature)
    p[p < row.min_p] = 0
    order = np.argsort(-p, kind="stable")
    if row.top_k:
        p[order[row.top_k :]] = 0
    p /= p.sum()
    if row.top_p < 1:
        p[order[1 + int((p[order].cumsum() < row.top_p).sum()) :]] = 0
    kept: NDArray[np.float64] = p / p.sum()
    return kept


def test_positions_and_seeds_are_independent() -> None:
    """Neighbouring positions and seeds draw as if unrelated: a uniform pair hits each cell equally often."""
    logits = torch.zeros(1, 8).expand(8192, -1)
    row = np.arange(8192)
    for seed, position in [(row, 0 * row), (0 * row, row), (row << 32, 0 * row), (0 * row, row << 32)]:
        columns = columns_of([Row()] * 8192)
        columns = SamplingColumns(
            **{n: getattr(columns, n) for n in SamplingColumns.__dataclass_fields__ if n not in ("seed", "position")},
            seed=seed.astype(np.uint64),
            position=position,
        )
        drawn = Sampler(8, CPU, KERNELS[0]).sample(logits, columns).token_ids
        pairs = np.bincount(drawn[::2] * 8 + drawn[1::2], minlength=64)
        assert ((pairs - 64) ** 2 / 64).sum() < 63 + 4.3 * np.sqrt(2 * 63) + 12


@pytest.mark.parametrize("row", [Row(temperature=0.0), Row(top_k=1)])
def test_greedy_takes_the_lowest_id_of_equals(row: Row) -> None:
    logits = torch.zeros(3, 49_152)
    logits[0, [7, 40_000]] = 1
    logits[1, [49_151]] = 1
    logits[2, [100, 101, 102]] = 1
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert sample(logits.to(dtype), [row] * 3).token_ids.tolist() == [7, 49_151, 100]


def test_ties_that_reach_beyond_the_candidates() -> None:
    """All tokens equal: top-k and top-p must keep the lowest ids, though no candidate list can know them."""
    logits = torch.zeros(2, 5000)
    for position in range(30):
        rows = [Row(top_k=3, position=position), Row(top_p=0.0019, position=position)]
        ids = sample(logits, rows).token_ids
        assert ids[0] < 3
        assert ids[1] < 10
        assert ids[0] == np.argmax(gumbels(rows[0], 3))


def test_wide_filters_fall_back_to_the_whole_vocabulary() -> None:
    logits = random_logits(1, 6000, seed=3) / 30
    for row in [Row(top_p=0.97), Row(top_k=4000), Row(top_k=600), Row(min_p=0.5), Row(top_p=0.97, top_k=3000)]:
        for seed in range(5):
            seeded = Row(top_p=row.top_p, top_k=row.top_k, min_p=row.min_p, seed=seed)
            assert sample(logits, [seeded]).token_ids[0] == token_of_oracle(logits[0].numpy(), seeded)


def test_logprobs_are_of_the_raw_model() -> None:
    logits = random_logits(4, VOCAB, seed=1).to(torch.bfloat16)
    edited = Row(num_logprobs=5, temperature=0.3, logit_bias={3: 50.0}, presence_penalty=1.0, output=(3, 4))
    rows = [edited, Row(num_logprobs=0), Row(num_logprobs=-1), Row(num_logprobs=20)]
    output = sample(logits, rows)
    assert set(output.logprobs) == {0, 1, 3}
    expected = logits.double().log_softmax(-1)
    for i, logprobs in output.logprobs.items():
        num = rows[i].num_logprobs
        assert abs(logprobs.sampled - float(expected[i, output.token_ids[i]])) < 1e-5
        assert len(logprobs.top_token_ids) == len(logprobs.top_logprobs) == num
        assert np.allclose(logprobs.top_logprobs, expected[i, logprobs.top_token_ids], atol=1e-5)
        assert np.allclose(logprobs.top_logprobs, expected[i].topk(num).values, atol=1e-5)


def test_a_broken_row_fails_alone() -> None:
    logits = random_logits(7, VOCAB, seed=2)
    logits[1, 5] = torch.nan
    logits[2] = -torch.inf
    logits[6, 5] = torch.inf
    rows = [Row(num_logprobs=1)] * 3 + [
        Row(logit_bias={VOCAB: 1.0}),
        Row(banned=tuple(range(VOCAB))),
        Row(logit_bias={0: float("nan")}),
        Row(),
    ]
    before = logits.clone()
    output = sample(logits, rows)
    assert set(output.errors) == {1, 2, 3, 4, 5, 6}
    assert all(len(reason) > 20 for reason in output.errors.values())
    assert f"token {VOCAB}" in output.errors[3]
    assert set(output.logprobs) == {0}
    assert output.token_ids[0] == sample(before[:1], rows[:1]).token_ids[0]
    assert torch.equal(logits.nan_to_num(), before.nan_to_num()), "the caller's logits are not ours to change"


def test_a_history_outside_the_vocabulary_fails_its_row() -> None:
    output = sample(random_logits(2, VOCAB, 0), [Row(presence_penalty=1.0, output=(VOCAB,)), Row()])
    assert set(output.errors) == {0}


def test_banning_an_unknown_token_changes_nothing() -> None:
    logits = random_logits(1, VOCAB, 0)
    assert sample(logits, [Row(banned=(-1, VOCAB))]).token_ids[0] == sample(logits, [Row()]).token_ids[0]


def test_extreme_temperatures_stay_finite() -> None:
    logits = random_logits(1, VOCAB, 0)
    assert sample(logits, [Row(temperature=1e-30)]).token_ids[0] == logits.argmax()
    assert not sample(logits, [Row(temperature=1e30)]).errors


def test_no_rows() -> None:
    output = sample(torch.zeros(0, 8), [])
    assert output.token_ids.shape == (0,)
    assert not output.errors


def test_a_repetition_penalty_next_to_zero_makes_a_token_certain_and_no_error() -> None:
    output = sample(
        random_logits(1, 50, seed=1), [Row(temperature=0.0, repetition_penalty=1e-40, prompt=(7,), output=(7,))]
    )
    assert not output.errors
