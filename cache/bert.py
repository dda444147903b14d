"""The BERT encoder in plain torch, for the embedder alone. Knows neither text nor pooling.

`transformers` has it too, and is what the test compares with; here it costs the start of the cache 3.9 s of imports,
and one question 8.1 ms of a two-core machine where this takes 4.5 (bf16, 17 tokens).
Architecture: Devlin et al. 2018 (arXiv 1810.04805); weight names: Hugging Face's `BertModel`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class _Affine:
    weight: Tensor
    bias: Tensor


@dataclass(frozen=True, slots=True)
class _Layer:
    qkv: _Affine
    attention_out: _Affine
    attention_norm: _Affine
    up: _Affine
    down: _Affine
    out_norm: _Affine


class BertEncoder:
    """Token ids to hidden states. Raises ValueError for a configuration it does not implement."""

    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        if not can_encode(config):
            raise ValueError("not a BERT encoder with absolute positions and gelu")
        self.dim: int = config["hidden_size"]
        self._num_heads: int = config["num_attention_heads"]
        self._eps: float = config.get("layer_norm_eps", 1e-12)
        weights = {name.removeprefix("bert."): tensor.to(dtype) for name, tensor in weights.items()}
        self._words = weights["embeddings.word_embeddings.weight"]
        # Every token has type 0: its row is added to the positions once and for all.
        self._positions = (
            weights["embeddings.position_embeddings.weight"] + weights["embeddings.token_type_embeddings.weight"][0]
        )
        self._norm = _affine(weights, "embeddings.LayerNorm")
        self._layers = [_layer(weights, i) for i in range(config["num_hidden_layers"])]

    def __call__(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """`ids` (n, length) int64, `mask` (n, length) bool, True at real tokens, None: no padding.

        Returns the last hidden states, (n, length, dim).
        """
        x = self._normed(self._words[ids] + self._positions[: ids.shape[1]], self._norm)
        heads_mask = None if mask is None else mask[:, None, None, :]
        for layer in self._layers:
            x = self._normed(x + self._attend(x, layer, heads_mask), layer.attention_norm)
            hidden = F.gelu(F.linear(x, layer.up.weight, layer.up.bias))
            x = self._normed(x + F.linear(hidden, layer.down.weight, layer.down.bias), layer.out_norm)
        return x

    def _attend(self, x: Tensor, layer: _Layer, mask: Tensor | None) -> Tensor:
        n, length, dim = x.shape
        qkv = F.linear(x, layer.qkv.weight, layer.qkv.bias).view(n, length, 3, self._num_heads, dim // self._num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (n, heads, length, head_dim)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        mixed = mixed.transpose(1, 2).reshape(n, length, dim)
        return F.linear(mixed, layer.attention_out.weight, layer.attention_out.bias)

    def _normed(self, x: Tensor, norm: _Affine) -> Tensor:
        return F.layer_norm(x, (self.dim,), norm.weight, norm.bias, self._eps)


def can_encode(config: Mapping[str, Any]) -> bool:
    """Whether `config` (a `config.json`) is of the one variant implemented here."""
    return (
        config.get("model_type") == "bert"
        and config.get("hidden_act", "gelu") == "gelu"
        and config.get("position_embedding_type", "absolute") == "absolute"
        and not config.get("is_decoder", False)
    )


def _layer(weights: Mapping[str, Tensor], i: int) -> _Layer:
    prefix = f"encoder.layer.{i}."
    parts = [_affine(weights, f"{prefix}attention.self.{name}") for name in ("query", "key", "value")]
    return _Layer(
        qkv=_Affine(torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts])),
        attention_out=_affine(weights, prefix + "attention.output.dense"),
        attention_norm=_affine(weights, prefix + "attention.output.LayerNorm"),
        up=_affine(weights, prefix + "intermediate.dense"),
        down=_affine(weights, prefix + "output.dense"),
        out_norm=_affine(weights, prefix + "output.LayerNorm"),
    )


def _affine(weights: Mapping[str, Tensor], name: str) -> _Affine:
    return _Affine(weights[name + ".weight"], weights[name + ".bias"])
