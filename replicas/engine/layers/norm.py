"""Root-mean-square norm, alone or after adding the residual stream."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from replicas.engine.kernels import Kernels


class RMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float, kernels: Kernels, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=dtype), requires_grad=False)
        self.eps = eps
        self.kernels = kernels

    def load_weight(self, tensor: Tensor) -> None:
        """tensor (hidden_size,). Raises ValueError on another shape."""
        if tensor.shape != self.weight.shape:
            raise ValueError(f"has shape {tuple(tensor.shape)}, the configuration asks for {tuple(self.weight.shape)}")
        self.weight.copy_(tensor)

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """x, residual (num_tokens, hidden_size) -> (norm(x + residual), x + residual)."""
        if residual is None:
            return self.kernels.rms_norm(x, self.weight, self.eps), x
        return self.kernels.add_rms_norm(x, residual, self.weight, self.eps)
