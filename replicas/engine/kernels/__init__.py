"""The operations worth a kernel of their own, behind one protocol, and the only place that decides by hardware."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """One step's shape, made once and shared by all layers. Tensors are on the device, lengths on the host too."""

    query_start_loc: Tensor
    """(num_requests + 1,) int32"""
    seq_lens: Tensor
    """(num_requests,) int32"""
    block_tables: Tensor
    """(num_requests, max_blocks) int32"""
    slot_mapping: Tensor
    """(num_tokens,) int64"""
    query_lens_host: tuple[int, ...]
    seq_lens_host: tuple[int, ...]


class Kernels(Protocol):
    """`reference.py` is the oracle of every other implementation. Nothing here knows layers or requests."""

    name: str

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x (num_tokens, hidden) -> the same; sums in fp32."""
        ...

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual)"""
        ...

    def apply_rope(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """q (num_tokens, num_heads, head_dim), k (num_tokens, num_kv_heads, head_dim); cos, sin (num_tokens,
        rotary_dim / 2) rotate halves (NeoX order) of the first `rotary_dim` channels."""
        ...

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        """(num_tokens, 2 x intermediate) -> silu(first half) x second half."""
        ...

    def store_kv(self, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
        """k, v (num_tokens, num_kv_heads, head_dim) into caches (num_blocks, num_kv_heads, block_size, head_dim)."""
        ...

    def paged_attention(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
        """Causal attention of each request's last query rows over its cached tokens, grouped heads allowed.
        q (num_tokens, num_heads, head_dim) -> the same."""
        ...


def select_kernels(device: torch.device, override: str | None = None) -> Kernels:
    """The fastest kernels that run on `device`. Raises ValueError naming the choices if `override` is not one."""
    from replicas.engine.kernels.reference import ReferenceKernels

    available = {"reference": ReferenceKernels}
    name = override or "reference"
    if name not in available:
        raise ValueError(f"kernels {name!r} are not available on {device.type}; choose from {sorted(available)}")
    return available[name]()
