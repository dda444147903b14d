"""Weights as they are, in bf16, fp16 or fp32: the plain product, and the oracle of every packed format."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class UnquantizedLinear:
    """The `LinearMethod` of one `weight` parameter of shape (out_features, in_features)."""

    granularity = 1

    def create(self, layer: nn.Module, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        layer.register_parameter(
            "weight", nn.Parameter(torch.empty(out_features, in_features, dtype=dtype), requires_grad=False)
        )

    def load(self, layer: nn.Module, tensor: Tensor, out_offset: int) -> None:
        """A whole `nn.Parameter` is shared rather than copied: so a tied head has the embedding's own storage."""
        weight = layer.get_parameter("weight")
        if isinstance(tensor, nn.Parameter) and tensor.shape == weight.shape and tensor.dtype == weight.dtype:
            layer.register_parameter("weight", tensor)
        else:
            weight[out_offset : out_offset + tensor.shape[0]].copy_(tensor)

    def finalize(self, layer: nn.Module) -> None:
        """Nothing to pack."""

    def apply(self, layer: nn.Module, x: Tensor) -> Tensor:
        return F.linear(x, layer.get_parameter("weight"))
