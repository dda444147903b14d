"""Token ids to vectors. Knows nothing of the head that may share its table."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from replicas.engine.kernels import Kernels


class Embedding(nn.Module):
    """token_ids (num_tokens,) int64 -> (num_tokens, hidden_size)."""

    def __init__(self, vocab_size: int, hidden_size: int, kernels: Kernels, dtype: torch.dtype) -> None:
        super().__init__()
        self.kernels = kernels
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size, dtype=dtype), requires_grad=False)

    def load_weight(self, tensor: Tensor) -> None:
        """tensor (vocab_size, hidden_size). Raises ValueError on another shape."""
        if tensor.shape != self.weight.shape:
            raise ValueError(f"has shape {tuple(tensor.shape)}, the configuration asks for {tuple(self.weight.shape)}")
        self.weight.copy_(tensor)

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.kernels.embed(token_ids, self.weight)
