"""Causal attention over the paged cache: store this step's K and V, then attend. Owns no weight and no cache."""

from __future__ import annotations

from torch import Tensor, nn

from replicas.engine.kernels import AttentionPlan, Kernels


class Attention(nn.Module):
    def __init__(self, head_dim: int, kernels: Kernels) -> None:
        super().__init__()
        self.scale = head_dim**-0.5
        self.kernels = kernels

    def forward(self, q: Tensor, k: Tensor, v: Tensor, cache: Tensor, plan: AttentionPlan) -> Tensor:
        """q (num_tokens, num_heads, head_dim), k and v (num_tokens, num_kv_heads, head_dim), cache (2, num_blocks,
        num_kv_heads, block_size, head_dim) of this layer -> (num_tokens, num_heads, head_dim)."""
        k_cache, v_cache = cache[0], cache[1]
        self.kernels.store_kv(k, v, k_cache, v_cache, plan.slot_mapping)
        return self.kernels.paged_attention(q, k_cache, v_cache, plan, self.scale)
