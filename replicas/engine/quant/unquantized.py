"""Weights as they are, in bf16, fp16 or fp32, in the form that the kernels like best."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from replicas.engine.kernels import Kernels


class UnquantizedLinear:
    """The `LinearMethod` of one `weight` of shape (out_features, in_features), a parameter until it is packed."""

    granularity = 1

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels

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
        packed = self._kernels.pack(layer.get_parameter("weight").data)
        del layer.weight
        layer.packed = packed

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None, out_dtype: torch.dtype | None) -> Tensor:
        return self._kernels.linear(x, layer.packed, bias, out_dtype)
