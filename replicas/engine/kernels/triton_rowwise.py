"""What a layer does between its matrix products, in Triton: each kernel reads its rows once and writes them once.

Rounding follows `reference.py`: sums and angles in fp32, every value that the reference keeps is rounded to its dtype.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from replicas.engine.kernels import AttentionPlan, HeadShape

_SILU_TILE = 1024
_HEADS_TILE = 8


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (num_tokens, hidden) -> the same."""
    out = torch.empty_like(x)
    _launch_norm(out, None, x, None, weight, eps)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(norm(x + residual), x + residual)"""
    out, total = torch.empty_like(x), torch.empty_like(x)
    _launch_norm(out, total, x, residual, weight, eps)
    return out, total


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """(num_tokens, 2 x width) -> silu(first half) x second half."""
    num_tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((num_tokens, width), dtype=gate_up.dtype, device=gate_up.device)
    _silu_kernel[(num_tokens, triton.cdiv(width, _SILU_TILE))](out, gate_up, width, TILE=_SILU_TILE, num_warps=4)
    return out


def rope_and_store_kv(
    qkv: Tensor, angles: Tensor, k_cache: Tensor, v_cache: Tensor, plan: AttentionPlan, heads: HeadShape
) -> Tensor:
    """Returns the rotated q (num_tokens, num_heads, head_dim). K and V of a row whose slot is -1 go nowhere."""
    num_tokens = len(qkv)
    q = torch.empty((num_tokens, heads.num_heads, heads.head_dim), dtype=qkv.dtype, device=qkv.device)
    num_rows = heads.num_heads + 2 * heads.num_kv_heads
    _rope_kernel[(num_tokens, triton.cdiv(num_rows, _HEADS_TILE))](
        q,
        k_cache,
        v_cache,
        qkv,
        angles,
        plan.slot_mapping,
        k_cache.stride(0),
        NUM_HEADS=heads.num_heads,
        NUM_KV_HEADS=heads.num_kv_heads,
        HEAD_DIM=heads.head_dim,
        PADDED_DIM=triton.next_power_of_2(heads.head_dim),
        ROTARY_DIM=angles.shape[1],
        BLOCK_SIZE=k_cache.shape[2],
        TILE=_HEADS_TILE,
        num_warps=4,
    )
    return q


def _launch_norm(
    out: Tensor, total: Tensor | None, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> None:
    num_tokens, width = x.shape
    padded = triton.next_power_of_2(width)
    num_warps = min(max(padded // 512, 1), 16)
    _norm_kernel[(num_tokens,)](out, total, x, residual, weight, eps, WIDTH=width, PADDED=padded, num_warps=num_warps)


@triton.jit
def _norm_kernel(out, total, x, residual, weight, eps, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Program (token): a whole row at once."""
    start = tl.program_id(0).to(tl.int64) * WIDTH
    columns = tl.arange(0, PADDED)
    mask = columns < WIDTH
    row = tl.load(x + start + columns, mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        row += tl.load(residual + start + columns, mask=mask, other=0.0).to(tl.float32)
        rounded = row.to(out.dtype.element_ty)
        tl.store(total + start + columns, rounded, mask=mask)
        row = rounded.to(tl.float32)
    normed = row * tl.rsqrt(tl.sum(row * row, 0) / WIDTH + eps)
    normed = normed.to(out.dtype.element_ty).to(tl.float32)
    scaled = normed * tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + start + columns, scaled.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _silu_kernel(out, gate_up, width, TILE: tl.constexpr):
    """Program (token, tile of columns)."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = columns < width
    gate = tl.load(gate_up + token * 2 * width + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + token * 2 * width + width + columns, mask=mask, other=0.0).to(tl.float32)
    silu = (gate * tl.sigmoid(gate)).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + token * width + columns, (silu * up).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _rope_kernel(
    q,
    k_cache,
    v_cache,
    qkv,
    angles,
    slots,
    block_stride,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Program (token, tile of heads): the heads of q, k and v in one row. Channel c < half turns with channel
    c + half; reading both for every channel costs a second read from the cache line, and no exchange in between."""
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * TILE + tl.arange(0, TILE)
    channels = tl.arange(0, PADDED_DIM)
    is_channel = (channels < HEAD_DIM)[None, :]
    half: tl.constexpr = ROTARY_DIM // 2
    is_first, is_turned = channels < half, channels < 2 * half
    partners = tl.where(is_first, channels + half, tl.where(is_turned, channels - half, channels))

    row = qkv + token * (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
    mask = (heads < NUM_HEADS + 2 * NUM_KV_HEADS)[:, None] & is_channel
    x = tl.load(row + heads[:, None] * HEAD_DIM + channels[None, :], mask=mask, other=0.0)
    partner = tl.load(row + heads[:, None] * HEAD_DIM + partners[None, :], mask=mask, other=0.0).to(tl.float32)
    cos = tl.load(angles + token * ROTARY_DIM + channels % half, mask=is_turned, other=1.0)
    sin = tl.load(angles + token * ROTARY_DIM + half + channels % half, mask=is_turned, other=0.0)
    sin = tl.where(is_first, -sin, sin)
    turned = (x.to(tl.float32) * cos[None, :] + partner * sin[None, :]).to(x.dtype)

    is_q = (heads < NUM_HEADS)[:, None] & is_channel
    tl.store(q + token * NUM_HEADS * HEAD_DIM + heads[:, None] * HEAD_DIM + channels[None, :], turned, mask=is_q)
    slot = tl.load(slots + token).to(tl.int64)
    kv_head = heads - NUM_HEADS
    is_k = ((kv_head >= 0) & (kv_head < NUM_KV_HEADS))[:, None] & is_channel & (slot >= 0)
    is_v = (kv_head >= NUM_KV_HEADS)[:, None] & mask & (slot >= 0)
    kv_head = kv_head % NUM_KV_HEADS
    place = slot // BLOCK_SIZE * block_stride + slot % BLOCK_SIZE * HEAD_DIM
    offsets = place + kv_head[:, None] * BLOCK_SIZE * HEAD_DIM + channels[None, :]
    tl.store(k_cache + offsets, turned, mask=is_k)
    tl.store(v_cache + offsets, x, mask=is_v)
