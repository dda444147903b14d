"""Causal attention over the paged cache: store this step's K and V, then attend. Owns no weight and no cache."""

from __future__ import annotations

from torch import Tensor, nn

from replicas.engine.kernels import AttentionPlan, HeadShape, Kernels


class Attention(nn.Module):
    def __init__(self, heads: HeadShape, kernels: Kernels) -> None:
        super().__init__()
        self.heads = heads
        self.scale = heads.head_dim**-0.5
        self.kernels = kernels

    def forward(self, qkv: Tensor, angles: Tensor, cache: Tensor, plan: AttentionPlan) -> Tensor:
        """qkv (num_tokens, (num_heads + 2 num_kv_heads) x head_dim), cache (2, num_blocks, num_kv_heads, block_size,
        head_dim) of this layer -> (num_tokens, num_heads x head_dim)."""
        k_cache, v_cache = cache[0], cache[1]
        q = self.kernels.rope_and_store_kv(qkv, angles, k_cache, v_cache, plan, self.heads)
        return self.kernels.paged_attention(q, k_cache, v_cache, plan, self.heads, self.scale)
