"""Paged attention against a dense oracle on random ragged batches, and the smaller kernels against torch's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from replicas.engine.kernels import AttentionPlan, HeadShape, select_kernels
from replicas.engine.kernels import reference as reference_module
from replicas.engine.kernels.reference import ReferenceKernels

torch.set_num_threads(1)
KERNELS = ReferenceKernels()
HEAD_DIM = 8


def dense_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """q (query_len, num_heads, d), k and v (seq_len, num_kv_heads, d), in float64, one head and one row at a time."""
    query_len, num_heads, _ = q.shape
    group = num_heads // k.shape[1]
    out = torch.empty_like(q, dtype=torch.float64)
    for row in range(query_len):
        last = k.shape[0] - query_len + row + 1
        for head in range(num_heads):
            scores = k[:last, head // group].double() @ q[row, head].double() * scale
            out[row, head] = scores.softmax(-1) @ v[:last, head // group].double()
    return out


class Ragged:
    """A random step: each request's K and V, dense, and the same in pages scattered over a poisoned cache."""

    def __init__(
        self, lengths: list[tuple[int, int]], num_kv_heads: int, group: int, block_size: int, seed: int
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.query_lens = [query for query, _ in lengths]
        self.seq_lens = [query + computed for query, computed in lengths]
        self.k = [torch.randn(n, num_kv_heads, HEAD_DIM, generator=generator) for n in self.seq_lens]
        self.v = [torch.randn(n, num_kv_heads, HEAD_DIM, generator=generator) for n in self.seq_lens]
        self.q = torch.randn(sum(self.query_lens), num_kv_heads * group, HEAD_DIM, generator=generator)
        num_blocks = [-(-n // block_size) for n in self.seq_lens]
        # block 0 pads the tables, so it must belong to nobody here: it stays NaN
        order = (torch.randperm(sum(num_blocks) + 3, generator=generator) + 1).tolist()
        shape = (len(order) + 1, num_kv_heads, block_size, HEAD_DIM)
        self.k_cache, self.v_cache = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
        tables = np.zeros((len(lengths), max(num_blocks)), dtype=np.int32)
        new_slots: list[int] = []
        for i, count in enumerate(num_blocks):
            table = [order.pop() for _ in range(count)]
            tables[i, :count] = table
            self.k_cache[table], self.v_cache[table] = 0.0, 0.0
            slots = torch.tensor(
                [table[p // block_size] * block_size + p % block_size for p in range(self.seq_lens[i])]
            )
            computed = self.seq_lens[i] - self.query_lens[i]
            old = slots[:computed]
            KERNELS.store_kv(self.k[i][:computed], self.v[i][:computed], self.k_cache, self.v_cache, old)
            new_slots += slots[computed:].tolist()
        self.plan = AttentionPlan(
            query_start_loc=torch.tensor([0, *np.cumsum(self.query_lens).tolist()], dtype=torch.int32),
            seq_lens=torch.tensor(self.seq_lens, dtype=torch.int32),
            block_tables=torch.from_numpy(tables),
            slot_mapping=torch.tensor(new_slots),
            query_lens_host=tuple(self.query_lens),
            seq_lens_host=tuple(self.seq_lens),
        )

    def attend(self, scale: float) -> Tensor:
        tails = [
            (k[n - q :], v[n - q :]) for k, v, n, q in zip(self.k, self.v, self.seq_lens, self.query_lens, strict=True)
        ]
        new_k, new_v = torch.cat([k for k, _ in tails]), torch.cat([v for _, v in tails])
        KERNELS.store_kv(new_k, new_v, self.k_cache, self.v_cache, self.plan.slot_mapping)
        heads = HeadShape(self.q.shape[1], self.k_cache.shape[1], HEAD_DIM)
        return KERNELS.paged_attention(self.q, self.k_cache, self.v_cache, self.plan, heads, scale).view(self.q.shape)

    def expected(self, scale: float) -> Tensor:
        pieces = torch.split(self.q, self.query_lens)
        return torch.cat([dense_attention(q, k, v, scale) for q, k, v in zip(pieces, self.k, self.v, strict=True)])


requests = st.lists(st.tuples(st.one_of(st.just(1), st.integers(1, 9)), st.integers(0, 20)), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(
    lengths=requests,
    num_kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    block_size=st.sampled_from([1, 2, 4, 16]),
    seed=st.integers(0, 2**20),
)
def test_paged_attention_equals_the_dense_oracle(
    lengths: list[tuple[int, int]], num_kv_heads: int, group: int, block_size: int, seed: int
) -> None:
    step = Ragged(lengths, num_kv_heads, group, block_size, seed)
    torch.testing.assert_close(step.attend(0.3).double(), step.expected(0.3), atol=1e-5, rtol=1e-5)


def test_groups_that_exceed_the_workspace_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_module, "MAX_GATHERED_TOKENS", 16)
    step = Ragged([(1, n) for n in (0, 1, 3, 5, 9, 9, 12, 15, 15, 15)], 2, 2, 4, seed=3)
    torch.testing.assert_close(step.attend(0.3).double(), step.expected(0.3), atol=1e-5, rtol=1e-5)


def test_a_poisoned_request_poisons_nobody_else() -> None:
    step = Ragged([(1, 6), (1, 5), (3, 4)], 2, 2, 4, seed=5)
    step.v[0][2] = torch.nan
    block = int(step.plan.block_tables[0, 0])
    step.v_cache[block, :, 2] = torch.nan
    out = step.attend(0.3)
    assert out[0].isnan().all()
    assert out[1:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rms_norm_sums_in_fp32(dtype: torch.dtype) -> None:
    # 4096 squares of 300 overflow fp16 and lose their last digits in bf16
    x = torch.full((2, 4096), 300.0, dtype=dtype)
    x[:, ::2] = -300.0
    weight = torch.linspace(0.5, 1.5, 4096).to(dtype)
    expected = F.rms_norm(x.double(), (4096,), weight.double(), 1e-6).to(dtype)
    torch.testing.assert_close(KERNELS.rms_norm(x, weight, 1e-6), expected)


def test_add_rms_norm_returns_the_sum_and_its_norm() -> None:
    x, residual, weight = torch.randn(3, 16), torch.randn(3, 16), torch.rand(16)
    normed, total = KERNELS.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(normed, F.rms_norm(x + residual, (16,), weight, 1e-5))


@pytest.mark.parametrize("rotary_dim", [8, 4])
def test_rope_turns_pairs_as_complex_numbers(rotary_dim: int) -> None:
    q, k, angles = torch.randn(5, 3, 8), torch.randn(5, 1, 8), torch.randn(5, rotary_dim // 2)
    turned_q, turned_k = KERNELS.apply_rope(q, k, angles.cos(), angles.sin())
    half = rotary_dim // 2
    for x, turned in ((q, turned_q), (k, turned_k)):
        numbers = (
            torch.complex(x[..., :half], x[..., half:rotary_dim]) * torch.polar(torch.ones(5, half), angles)[:, None]
        )
        torch.testing.assert_close(turned[..., :rotary_dim], torch.cat((numbers.real, numbers.imag), -1))
        assert torch.equal(turned[..., rotary_dim:], x[..., rotary_dim:])


def test_silu_and_mul_gates_the_second_half() -> None:
    gate_up = torch.randn(4, 10)
    gate, up = gate_up[:, :5], gate_up[:, 5:]
    torch.testing.assert_close(KERNELS.silu_and_mul(gate_up), gate * torch.sigmoid(gate) * up)


def test_an_unknown_kernel_set_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"warp9.*reference"):
        select_kernels(torch.device("cpu"), torch.float32, 32, 1, "warp9")
