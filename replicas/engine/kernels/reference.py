"""The kernels in plain torch: correct on every device and dtype, and the oracle of every faster set.

It knows tensors and the step's shape, no layer and no request. Two rules keep one request out of another's numbers:
a row reads no page but its own, and `eager.py` keeps the unwritten rest of a held page zero, so a mask never meets a
foreign NaN (-inf + NaN and 0 * NaN are NaN).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from replicas.engine.kernels import AttentionPlan, Forward, GumbelDraws, HeadShape, StepModel, TopOfRows, gumbel
from replicas.engine.kernels.eager import EagerForward

MAX_GATHERED_TOKENS = 65_536
"""Cached tokens that one batched gather may copy: bounds the workspace of a step with many long requests."""


class ReferenceKernels:
    name = "reference"

    def compile(self, model: StepModel, kv_cache: Tensor) -> Forward:
        return EagerForward(model, kv_cache)

    def pack(self, weight: Tensor) -> Tensor:
        return weight

    def embed(self, token_ids: Tensor, table: Tensor) -> Tensor:
        return F.embedding(token_ids, table)

    def take_rows(self, x: Tensor, rows: Tensor) -> Tensor:
        return x[rows]

    def rope_angles(self, positions: Tensor, inv_freq: Tensor, factor: float) -> Tensor:
        angles = positions[:, None].float() * inv_freq
        return torch.cat((angles.cos(), angles.sin()), dim=-1) * factor

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
    ) -> Tensor:
        return F.linear(x, weight, bias).to(out_dtype or x.dtype)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Root-mean-square norm (Zhang and Sennrich 2019), in the operation order of Hugging Face's LlamaRMSNorm."""
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
        return x32.to(x.dtype) * weight

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total = x + residual
        return self.rms_norm(total, weight, eps), total

    def apply_rope(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary embedding (Su et al. 2021) in NeoX order: channel i turns with channel i + rotary_dim / 2.
        q (num_tokens, num_heads, head_dim), k (num_tokens, num_kv_heads, head_dim), angles (num_tokens, rotary_dim /
        2)."""
        cos, sin = cos[:, None, :], sin[:, None, :]
        return _rotate(q, cos, sin), _rotate(k, cos, sin)

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def store_kv(self, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
        """k, v (num_tokens, num_kv_heads, head_dim) into caches (num_blocks, num_kv_heads, block_size, head_dim)."""
        block_size = k_cache.shape[2]
        blocks, offsets = slot_mapping // block_size, slot_mapping % block_size
        k_cache[blocks, :, offsets] = k
        v_cache[blocks, :, offsets] = v

    def rope_and_store_kv(
        self, qkv: Tensor, angles: Tensor, k_cache: Tensor, v_cache: Tensor, plan: AttentionPlan, heads: HeadShape
    ) -> Tensor:
        """Returns q (num_tokens, num_heads, head_dim)."""
        counts = [heads.num_heads, heads.num_kv_heads, heads.num_kv_heads]
        q, k, v = torch.split(qkv.view(len(qkv), -1, heads.head_dim), counts, dim=1)
        cos, sin = angles.chunk(2, dim=-1)
        q, k = self.apply_rope(q, k, cos, sin)
        self.store_kv(k, v, k_cache, v_cache, plan.slot_mapping)
        return q

    def paged_attention(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, plan: AttentionPlan, heads: HeadShape, scale: float
    ) -> Tensor:
        """Requests with one query row go together, of similar length; a longer query goes alone."""
        out = torch.empty_like(q)
        starts = _starts(plan.query_lens_host)
        block_size = k_cache.shape[2]
        for group in _groups_of_single_rows(plan, block_size):
            rows = torch.tensor([starts[i] for i in group], device=q.device)
            out[rows] = _attend_rows(q[rows], k_cache, v_cache, plan, group, scale)
        for i, length in enumerate(plan.query_lens_host):
            if length > 1:
                rows_of_i = slice(starts[i], starts[i] + length)
                out[rows_of_i] = _attend_chunk(q[rows_of_i], k_cache, v_cache, plan, i, scale)
        return out.flatten(-2)

    def max_of_rows(self, scores: Tensor) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        best, token_ids = scores.max(dim=-1)
        return best.cpu().numpy(), token_ids.cpu().numpy()

    def draw_of_rows(self, scores: Tensor, draws: GumbelDraws) -> NDArray[np.int64]:
        return gumbel.draw_of_rows(scores, draws)

    def top_of_rows(self, scores: Tensor, draws: GumbelDraws, width: int) -> TopOfRows:
        return gumbel.top_of_rows(scores, draws, width)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    first, second, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
    return turned if rest.shape[-1] == 0 else torch.cat((turned, rest), dim=-1)


def _starts(lengths: Sequence[int]) -> list[int]:
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    return starts


def _groups_of_single_rows(plan: AttentionPlan, block_size: int) -> Iterator[list[int]]:
    """Requests with one query row, in groups whose longest has less than twice the pages of the shortest."""
    buckets: dict[int, list[int]] = {}
    for i, (query_len, seq_len) in enumerate(zip(plan.query_lens_host, plan.seq_lens_host, strict=True)):
        if query_len == 1:
            num_blocks = -(-seq_len // block_size)
            buckets.setdefault(num_blocks.bit_length(), []).append(i)
    for bits, members in buckets.items():
        size = max(1, MAX_GATHERED_TOKENS // (block_size << bits))
        for start in range(0, len(members), size):
            yield members[start : start + size]


def _attend_rows(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, plan: AttentionPlan, group: list[int], scale: float
) -> Tensor:
    """q (n, num_heads, head_dim), row j of request group[j]; pages are padded to the longest of the group.

    The query heads that share a K/V head are the rows of one small matrix product, so grouped heads cost no copy.
    """
    num_requests, num_heads, head_dim = q.shape
    num_kv_heads, block_size = k_cache.shape[1], k_cache.shape[2]
    seq_lens = torch.tensor([plan.seq_lens_host[i] for i in group], device=q.device)
    max_len = max(plan.seq_lens_host[i] for i in group)
    max_blocks = -(-max_len // block_size)
    tables = plan.block_tables[torch.tensor(group, device=q.device), :max_blocks].long()
    held = torch.arange(max_blocks, device=q.device) * block_size < seq_lens[:, None]
    # padding repeats the row's own first page: a masked page of another request could bring its NaN along
    tables = torch.where(held, tables, tables[:, :1])
    k = _gather(k_cache, tables)
    v = _gather(v_cache, tables)
    visible = torch.arange(max_blocks * block_size, device=q.device) < seq_lens[:, None]
    out = F.scaled_dot_product_attention(
        q.view(num_requests, num_kv_heads, num_heads // num_kv_heads, head_dim),
        k,
        v,
        attn_mask=visible[:, None, None, :],
        scale=scale,
    )
    return out.reshape(num_requests, num_heads, head_dim)


def _attend_chunk(q: Tensor, k_cache: Tensor, v_cache: Tensor, plan: AttentionPlan, i: int, scale: float) -> Tensor:
    """q (query_len, num_heads, head_dim): the last `query_len` positions of request i."""
    query_len, num_heads, head_dim = q.shape
    num_kv_heads, block_size = k_cache.shape[1], k_cache.shape[2]
    seq_len = plan.seq_lens_host[i]
    table = plan.block_tables[i : i + 1, : -(-seq_len // block_size)].long()
    # (num_kv_heads, group, seq_len, head_dim): K/V heads stand in the batch dimension, the group only as a view
    shape = (num_kv_heads, num_heads // num_kv_heads, seq_len, head_dim)
    k = _gather(k_cache, table)[0, :, None, :seq_len].expand(shape)
    v = _gather(v_cache, table)[0, :, None, :seq_len].expand(shape)
    grouped = q.transpose(0, 1).reshape(num_kv_heads, num_heads // num_kv_heads, query_len, head_dim)
    if query_len == seq_len:
        out = F.scaled_dot_product_attention(grouped, k, v, is_causal=True, scale=scale)
    else:
        positions = torch.arange(seq_len - query_len, seq_len, device=q.device)
        visible = torch.arange(seq_len, device=q.device) <= positions[:, None]
        out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=visible, scale=scale)
    return out.reshape(num_heads, query_len, head_dim).transpose(0, 1)


def _gather(cache: Tensor, tables: Tensor) -> Tensor:
    """Pages (num_blocks, num_kv_heads, block_size, head_dim) of tables (n, max_blocks), as
    (n, num_kv_heads, max_blocks * block_size, head_dim): one copy, a page of one head being one row of it."""
    num_kv_heads, block_size, head_dim = cache.shape[1:]
    num_requests, max_blocks = tables.shape
    heads = torch.arange(num_kv_heads, device=tables.device)
    page_rows = tables[:, None, :] * num_kv_heads + heads[None, :, None]
    pages = cache.view(-1, block_size * head_dim).index_select(0, page_rows.flatten())
    return pages.view(num_requests, num_kv_heads, max_blocks * block_size, head_dim)
