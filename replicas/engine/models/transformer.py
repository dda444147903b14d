"""The Llama family: pre-norm decoder with rotary grouped-query attention and a gated MLP.

One class serves Llama 2 and 3, SmolLM2, Mistral and Qwen2; where they differ, `TransformerConfig` says so. It knows
neither files nor requests: `weight_slots` names the tensors it needs, a step comes as tensors and a plan.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from replicas.engine.kernels import AttentionPlan, HeadShape, Kernels
from replicas.engine.layers.attention import Attention
from replicas.engine.layers.embedding import Embedding
from replicas.engine.layers.linear import Linear
from replicas.engine.layers.norm import RMSNorm
from replicas.engine.layers.rotary import RopeConfig, RotaryEmbedding
from replicas.engine.quant.base import LinearMethod

WeightSlots = dict[str, Callable[[Tensor], None]]


@dataclass(frozen=True, slots=True)
class TransformerConfig:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position: int
    """Tokens of context that the model was made for, rope scaling included."""
    rope: RopeConfig
    tie_word_embeddings: bool = False
    has_qkv_bias: bool = False
    has_output_bias: bool = False
    has_mlp_bias: bool = False
    dtype: str = "bfloat16"
    """The checkpoint's."""


class Transformer(nn.Module):
    """Build it under `torch.device(...)`; parameters are uninitialised until every slot has been loaded."""

    def __init__(
        self, config: TransformerConfig, kernels: Kernels, method: LinearMethod, head_method: LinearMethod
    ) -> None:
        super().__init__()
        dtype = getattr(torch, config.dtype)
        self.config = config
        self.kernels = kernels
        self.embed = Embedding(config.vocab_size, config.hidden_size, kernels, dtype)
        self.rotary = RotaryEmbedding(config.rope, kernels)
        self.layers = nn.ModuleList(DecoderLayer(config, kernels, method, dtype) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels, dtype)
        self.lm_head = Linear(config.hidden_size, [config.vocab_size], head_method, dtype)

    def forward(
        self, token_ids: Tensor, positions: Tensor, kv_cache: Tensor, plan: AttentionPlan, rows: Tensor
    ) -> Tensor:
        """token_ids, positions (num_tokens,); kv_cache (num_layers, 2, num_blocks, num_kv_heads, block_size,
        head_dim); rows (num_rows,) -> last hidden states (num_rows, hidden_size), normed."""
        angles = self.rotary(positions)
        x, residual = self.embed(token_ids), None
        for layer, cache in zip(self.layers, kv_cache, strict=True):
            x, residual = layer(x, residual, angles, cache, plan)
        assert residual is not None, "a transformer has at least one layer"
        hidden: Tensor = self.norm(self.kernels.take_rows(x, rows), self.kernels.take_rows(residual, rows))[0]
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """(num_rows, hidden_size) -> (num_rows, vocab_size) fp32."""
        logits: Tensor = self.lm_head(hidden, torch.float32)
        return logits

    def weight_slots(self) -> WeightSlots:
        """By Hugging Face's Llama names, what loads each tensor that this model needs."""
        slots: WeightSlots = {
            "model.embed_tokens.weight": self.embed.load_weight,
            "model.norm.weight": self.norm.load_weight,
        }
        if not self.config.tie_word_embeddings:
            slots["lm_head.weight"] = self.lm_head.load_weight
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            slots |= {f"model.layers.{index}.{name}": load for name, load in layer.weight_slots().items()}
        return slots

    def finalize(self) -> None:
        """After all slots are loaded: tie the head, let every method pack its weights."""
        if self.config.tie_word_embeddings:
            self.lm_head.load_weight(self.embed.weight)
        for module in self.modules():
            if isinstance(module, Linear):
                module.finalize()


class DecoderLayer(nn.Module):
    def __init__(self, config: TransformerConfig, kernels: Kernels, method: LinearMethod, dtype: torch.dtype) -> None:
        super().__init__()
        self.kernels = kernels
        hidden, eps = config.hidden_size, config.rms_norm_eps
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        intermediate = config.intermediate_size
        self.input_norm = RMSNorm(hidden, eps, kernels, dtype)
        self.qkv_proj = Linear(hidden, [q_size, kv_size, kv_size], method, dtype, config.has_qkv_bias)
        self.attention = Attention(HeadShape(config.num_heads, config.num_kv_heads, config.head_dim), kernels)
        self.o_proj = Linear(q_size, [hidden], method, dtype, config.has_output_bias)
        self.post_norm = RMSNorm(hidden, eps, kernels, dtype)
        self.gate_up_proj = Linear(hidden, [intermediate, intermediate], method, dtype, config.has_mlp_bias)
        self.down_proj = Linear(intermediate, [hidden], method, dtype, config.has_mlp_bias)

    def forward(
        self, x: Tensor, residual: Tensor | None, angles: Tensor, cache: Tensor, plan: AttentionPlan
    ) -> tuple[Tensor, Tensor]:
        """x, residual (num_tokens, hidden_size): the residual stream before this layer is their sum."""
        x, residual = self.input_norm(x, residual)
        x = self.o_proj(self.attention(self.qkv_proj(x), angles, cache, plan))
        x, residual = self.post_norm(x, residual)
        x = self.down_proj(self.kernels.silu_and_mul(self.gate_up_proj(x)))
        assert residual is not None
        return x, residual

    def weight_slots(self) -> WeightSlots:
        slots: WeightSlots = {
            "input_layernorm.weight": self.input_norm.load_weight,
            "post_attention_layernorm.weight": self.post_norm.load_weight,
        }
        merged = (
            (self.qkv_proj, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            (self.o_proj, ("self_attn.o_proj",)),
            (self.gate_up_proj, ("mlp.gate_proj", "mlp.up_proj")),
            (self.down_proj, ("mlp.down_proj",)),
        )
        for linear, names in merged:
            for part, name in enumerate(names):
                slots[f"{name}.weight"] = partial(linear.load_weight, part=part)
                if linear.bias is not None:
                    slots[f"{name}.bias"] = partial(linear.load_bias, part=part)
        return slots
