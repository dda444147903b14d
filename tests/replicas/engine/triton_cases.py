"""Random cases of every Triton kernel against its oracle, on any device: in Triton's interpreter by the tests, compiled
by `benchmarks/gpu_check.py`. Needs neither pytest nor hypothesis, because the machine with the GPU has none.

A check draws its shapes from `rng`, larger ones where `is_large`, and raises AssertionError if a value is off.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from replicas.engine.kernels import AttentionPlan, GumbelDraws, HeadShape
from replicas.engine.kernels import triton_attention as attention
from replicas.engine.kernels import triton_rowwise as rowwise
from replicas.engine.kernels import triton_sampling as sampling
from replicas.engine.kernels.reference import ReferenceKernels

REFERENCE = ReferenceKernels()
Check = Callable[[random.Random, torch.device, bool], None]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@dataclass(frozen=True)
class Masks:
    """What a query does not see of its past, and the sink it may lose itself to."""

    window: int = 0
    soft_cap: float = 0.0
    sinks: Tensor | None = None


class Step:
    """A random step: each request's K and V dense, and in pages scattered over a cache that is NaN everywhere else."""

    def __init__(
        self,
        rng: random.Random,
        device: torch.device,
        dtype: torch.dtype,
        heads: HeadShape,
        block_size: int,
        lengths: list[tuple[int, int]],
    ) -> None:
        """lengths: (query_len, seq_len) of each request."""
        self.heads, self.dtype = heads, dtype
        generator = torch.Generator(device).manual_seed(rng.randrange(2**40))

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        num_kv_heads, head_dim = heads.num_kv_heads, heads.head_dim
        num_tokens = sum(query_len for query_len, _ in lengths)
        self.q = randn(num_tokens, heads.num_heads, head_dim)
        self.k = [randn(seq_len, num_kv_heads, head_dim) for _, seq_len in lengths]
        self.v = [randn(seq_len, num_kv_heads, head_dim) for _, seq_len in lengths]
        counts = [-(-seq_len // block_size) for _, seq_len in lengths]
        free = list(range(sum(counts) + 2))
        rng.shuffle(free)
        shape = (len(free), num_kv_heads, block_size, head_dim)
        self.k_cache, self.v_cache = (torch.full(shape, torch.nan, dtype=dtype, device=device) for _ in range(2))
        # a table's padding names blocks that are not there: whoever reads it fails
        tables = np.full((len(lengths), max(counts) + 1), 2**30, np.int32)
        new_slots: list[Tensor] = []
        for i, (query_len, seq_len) in enumerate(lengths):
            tables[i, : counts[i]] = [free.pop() for _ in range(counts[i])]
            positions = torch.arange(seq_len)
            pages = torch.from_numpy(tables[i].astype(np.int64))[positions // block_size]
            slots = (pages * block_size + positions % block_size).to(device)
            REFERENCE.store_kv(self.k[i], self.v[i], self.k_cache, self.v_cache, slots)
            new_slots.append(slots[seq_len - query_len :])
        query_lens, seq_lens = zip(*lengths, strict=True)
        self.plan = AttentionPlan(
            query_start_loc=torch.tensor([0, *np.cumsum(query_lens).tolist()], dtype=torch.int32, device=device),
            seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=device),
            block_tables=torch.from_numpy(tables).to(device),
            slot_mapping=torch.cat(new_slots),
            query_lens_host=query_lens,
            seq_lens_host=seq_lens,
        )

    def expected(self, scale: float, masks: Masks) -> Tensor:
        """(num_tokens, num_heads x head_dim) in float64, one request at a time."""
        pieces = torch.split(self.q, list(self.plan.query_lens_host))
        dense = [dense_attention(q, k, v, scale, masks) for q, k, v in zip(pieces, self.k, self.v, strict=True)]
        return torch.cat(dense).flatten(-2)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, masks: Masks) -> Tensor:
    """q (query_len, num_heads, d), the newest positions; k, v (seq_len, num_kv_heads, d) -> (query_len, num_heads, d),
    all in float64."""
    query_len, num_heads, _ = q.shape
    seq_len, group = len(k), num_heads // k.shape[1]
    k, v = (x.double().repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) * scale
    if masks.soft_cap:
        scores = masks.soft_cap * torch.tanh(scores / masks.soft_cap)
    tokens = torch.arange(seq_len, device=q.device)
    distance = tokens[seq_len - query_len :, None] - tokens
    is_hidden = (distance < 0) | (distance >= masks.window if masks.window else torch.zeros_like(distance > 0))
    scores = scores.masked_fill(is_hidden, -torch.inf)
    if masks.sinks is not None:
        sinks = masks.sinks.double()[:, None, None].expand(-1, query_len, 1)
        shares = torch.cat((scores, sinks), dim=-1).softmax(-1)[..., :-1]
    else:
        shares = scores.softmax(-1)
    return torch.einsum("hqk,khd->qhd", shares, v)


def check_varlen_attention(rng: random.Random, device: torch.device, is_large: bool) -> None:
    longest = 700 if is_large else 90
    lengths = [
        _length(rng, longest, is_single=rng.random() < 0.4) for _ in range(rng.randint(1, 40 if is_large else 4))
    ]
    _check_attention(rng, device, lengths, attention.attend_varlen)


def check_decode_attention(rng: random.Random, device: torch.device, is_large: bool) -> None:
    longest = rng.choice([60, 500, 20_000]) if is_large else rng.choice([30, 300])
    count = rng.randint(1, 200 if is_large and longest < 1000 else 3)
    _check_attention(
        rng, device, [_length(rng, longest, is_single=True) for _ in range(count)], attention.attend_decode
    )


def _length(rng: random.Random, longest: int, is_single: bool) -> tuple[int, int]:
    seq_len = rng.randint(1, longest)
    return 1 if is_single else rng.randint(1, seq_len), seq_len


def _check_attention(
    rng: random.Random, device: torch.device, lengths: list[tuple[int, int]], attend: Callable[..., Tensor]
) -> None:
    num_kv_heads, group = rng.randint(1, 3), rng.choice([1, 2, 3, 4, 7])
    heads = HeadShape(num_kv_heads * group, num_kv_heads, rng.choice([32, 64, 80, 96, 128, 256]))
    step = Step(rng, device, rng.choice(DTYPES), heads, rng.choice([16, 32, 64, 128]), lengths)
    scale = heads.head_dim**-0.5
    sinks = torch.tensor([rng.uniform(-3, 3) for _ in range(heads.num_heads)], device=device)
    masks = rng.choice([Masks(), Masks(window=rng.randint(1, 200)), Masks(soft_cap=5.0), Masks(sinks=sinks)])
    out = attend(
        step.q, step.k_cache, step.v_cache, step.plan, heads, scale,
        window=masks.window, soft_cap=masks.soft_cap, sinks=masks.sinks,
    )  # fmt: skip
    assert out.dtype == step.dtype
    _assert_close(out, step.expected(scale, masks))
    if masks == Masks():
        for cache in (step.k_cache, step.v_cache):  # the reference wants the unwritten rest of a page zero
            cache.nan_to_num_()
        expected = REFERENCE.paged_attention(step.q, step.k_cache, step.v_cache, step.plan, heads, scale)
        _assert_close(out, expected.double())


def check_padding_rows_of_a_decode_step(rng: random.Random, device: torch.device, is_large: bool) -> None:
    """Requests of length 0 with slot -1, as a captured step is padded with: zeros, and the others as without them."""
    heads = HeadShape(4, 2, 64)
    step = Step(rng, device, torch.float32, heads, 16, [(1, rng.randint(1, 90)) for _ in range(3)])
    plan = step.plan
    padded = AttentionPlan(
        query_start_loc=torch.arange(6, dtype=torch.int32, device=device),
        seq_lens=torch.cat((plan.seq_lens, plan.seq_lens.new_zeros(2))),
        block_tables=torch.cat((plan.block_tables, plan.block_tables[:2])),
        slot_mapping=torch.cat((plan.slot_mapping, plan.slot_mapping.new_full((2,), -1))),
        query_lens_host=(1,) * 5,
        seq_lens_host=(*plan.seq_lens_host, 0, 0),
    )
    # long on the host only: the split that holds nothing must be seen on the device
    for longest in (90, 10 * attention.SPLIT_TOKENS):
        bounded = AttentionPlan(
            padded.query_start_loc, padded.seq_lens, padded.block_tables, padded.slot_mapping,
            padded.query_lens_host, (longest,) * 5,
        )  # fmt: skip
        q = torch.cat((step.q, torch.ones_like(step.q[:2])))
        out = attention.attend_decode(q, step.k_cache, step.v_cache, bounded, heads, 0.2)
        _assert_close(out[:3], step.expected(0.2, Masks()))
        assert (out[3:] == 0).all(), "a padding row is zero"


def check_rope_and_store(rng: random.Random, device: torch.device, is_large: bool) -> None:
    num_kv_heads, group = rng.randint(1, 4), rng.randint(1, 4)
    head_dim = rng.choice([8, 32, 64, 80, 128, 256])
    heads = HeadShape(num_kv_heads * group, num_kv_heads, head_dim)
    num_tokens, block_size = rng.randint(1, 2000 if is_large else 12), rng.choice([16, 32])
    rotary_dim, dtype = rng.choice([head_dim, head_dim // 2]), rng.choice(DTYPES)
    num_blocks = num_tokens // block_size + 2
    width = (heads.num_heads + 2 * num_kv_heads) * head_dim
    qkv = torch.randn(num_tokens, width, device=device).to(dtype)
    angles = REFERENCE.rope_angles(
        torch.randint(5000, (num_tokens,), device=device), torch.rand(rotary_dim // 2, device=device), 1.1
    )
    slots = torch.randperm(num_blocks * block_size, device=device)[:num_tokens]
    is_padding = torch.rand(num_tokens, device=device) < 0.2
    is_padding[0] = False
    plan = _plan_of_slots(torch.where(is_padding, -1, slots))
    caches = [torch.full((num_blocks, num_kv_heads, block_size, head_dim), 7.0, dtype=dtype, device=device)] * 2
    mine, theirs = ([cache.clone() for cache in caches] for _ in range(2))
    q = rowwise.rope_and_store_kv(qkv, angles, mine[0], mine[1], plan, heads)
    kept = ~is_padding
    expected_q = REFERENCE.rope_and_store_kv(
        qkv[kept], angles[kept], theirs[0], theirs[1], _plan_of_slots(slots[kept]), heads
    )
    _assert_close(q[kept], expected_q.double())
    _assert_close(mine[0], theirs[0].double())
    assert torch.equal(mine[1], theirs[1]), "values are stored as they are"


def _plan_of_slots(slots: Tensor) -> AttentionPlan:
    nothing = slots.new_zeros(0)
    return AttentionPlan(nothing, nothing, nothing, slots, (), ())


def check_norms(rng: random.Random, device: torch.device, is_large: bool) -> None:
    shape = (rng.randint(1, 500 if is_large else 6), rng.choice([1, 48, 576, 1024, 4096, 5120]))
    dtype = rng.choice(DTYPES)
    x, residual = (torch.randn(shape, device=device).to(dtype) * rng.choice([1, 100]) for _ in range(2))
    weight = torch.rand(shape[1], device=device).to(dtype)
    _assert_close(rowwise.rms_norm(x, weight, 1e-5), REFERENCE.rms_norm(x, weight, 1e-5).double())
    normed, total = rowwise.add_rms_norm(x, residual, weight, 1e-5)
    expected_normed, expected_total = REFERENCE.add_rms_norm(x, residual, weight, 1e-5)
    _assert_close(total, expected_total.double())  # the interpreter cuts bf16 where hardware rounds
    _assert_close(normed, expected_normed.double())


def check_silu_and_mul(rng: random.Random, device: torch.device, is_large: bool) -> None:
    shape = (rng.randint(1, 1000 if is_large else 5), 2 * rng.choice([1, 48, 1024, 1536, 14336]))
    gate_up = torch.randn(shape, device=device).to(rng.choice(DTYPES)) * 3
    _assert_close(rowwise.silu_and_mul(gate_up), REFERENCE.silu_and_mul(gate_up).double())


def check_max_of_rows(rng: random.Random, device: torch.device, is_large: bool) -> None:
    scores = _scores(rng, device, is_large)
    if rng.random() < 0.5:
        scores = scores.round()  # many are equal, -0 and 0 among them
    scores[rng.randrange(len(scores)), rng.randrange(scores.shape[1])] = rng.choice([torch.inf, -torch.inf, 3.0])
    expected = scores.cpu().numpy()
    best, token_ids = sampling.max_of_rows(scores)
    assert np.array_equal(best, expected.max(axis=1))
    assert np.array_equal(token_ids, expected.argmax(axis=1)), "the lowest id of equals"
    scores[-1, rng.randrange(scores.shape[1])] = rng.choice([1, -1]) * torch.nan
    assert np.isnan(sampling.max_of_rows(scores)[0][-1])
    scores[-1] = -torch.inf
    assert sampling.max_of_rows(scores)[0][-1] == -np.inf


def check_draws(rng: random.Random, device: torch.device, is_large: bool) -> None:
    scores = _scores(rng, device, is_large) * rng.choice([0.0, 0.1, 3.0])
    scores[torch.rand(scores.shape, device=device) < 0.1] = -torch.inf
    scores[:, rng.randrange(scores.shape[1])] = 0.5
    rows = np.flatnonzero(np.arange(len(scores)) % rng.randint(1, 3) == 0)

    def column(*choices: float) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        return np.array([rng.choice(choices) for _ in rows], np.float32)

    draws = GumbelDraws(
        rows=rows,
        best=scores.max(dim=1).values.cpu().numpy()[rows],
        temperature=column(1e-3, 0.5, 1.0, 5.0),
        threshold=column(-np.inf, -1.0, 0.0),
        seed=np.array([rng.randrange(2**64) for _ in rows], np.uint64),
        position=np.array([rng.choice([0, 5, 2**40]) + i for i in range(len(rows))], np.int64),
    )
    # the CPU's double-precision logarithm, whatever the device's
    assert np.array_equal(sampling.draw_of_rows(scores, draws), REFERENCE.draw_of_rows(scores.cpu(), draws))


def _scores(rng: random.Random, device: torch.device, is_large: bool) -> Tensor:
    num_rows = rng.randint(1, 64 if is_large else 4)
    vocab_size = rng.choice([1, 3, 97, 8192, 20_001, 151_936] if is_large else [1, 3, 97, 2048, 9001])
    return torch.randn(num_rows, vocab_size, device=device) * 2


def _assert_close(actual: Tensor, expected: Tensor) -> None:
    """Relative to the size of the values: `expected` is float64."""
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(
        actual.double().flatten(), expected.flatten(), atol=tolerance, rtol=tolerance, equal_nan=False
    )


CHECKS = (
    check_varlen_attention,
    check_decode_attention,
    check_padding_rows_of_a_decode_step,
    check_rope_and_store,
    check_norms,
    check_silu_and_mul,
    check_max_of_rows,
    check_draws,
)
