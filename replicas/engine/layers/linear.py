"""A matrix whose output rows come from one or several checkpoint tensors (q, k and v; gate and up).

It owns the shape, the bias and the place of each part; the bytes are its method's (`quant/base.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from replicas.engine.quant.base import LinearMethod


class Linear(nn.Module):
    """x (num_tokens, in_features) -> (num_tokens, sum of the parts' features).

    Raises ValueError if the method's granularity does not divide `in_features` and every part.
    """

    bias: nn.Parameter | None

    def __init__(
        self, in_features: int, parts: Sequence[int], method: LinearMethod, dtype: torch.dtype, bias: bool = False
    ) -> None:
        super().__init__()
        for features in (in_features, *parts):
            if features % method.granularity:
                raise ValueError(
                    f"a weight of {in_features} inputs and parts of {list(parts)} outputs cannot be cut into "
                    f"blocks of {method.granularity}: {features} is not a multiple"
                )
        self.in_features = in_features
        self.parts = tuple(parts)
        self.out_features = sum(parts)
        self.method = method
        method.create(self, in_features, self.out_features, dtype)
        values = torch.zeros(self.out_features, dtype=dtype) if bias else None
        self.bias = None if values is None else nn.Parameter(values, requires_grad=False)

    def load_weight(self, tensor: Tensor, part: int = 0) -> None:
        """tensor (parts[part], in_features). Raises ValueError on another shape."""
        _check_shape(tensor, (self.parts[part], self.in_features))
        self.method.load(self, tensor, sum(self.parts[:part]))

    def load_bias(self, tensor: Tensor, part: int = 0) -> None:
        """tensor (parts[part],). Raises ValueError on another shape."""
        assert self.bias is not None, "this layer was built without a bias"
        _check_shape(tensor, (self.parts[part],))
        start = sum(self.parts[:part])
        self.bias[start : start + self.parts[part]].copy_(tensor)

    def finalize(self) -> None:
        self.method.finalize(self)

    def forward(self, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        """In fp32 or the dtype of x."""
        return self.method.apply(self, x, self.bias, out_dtype)


def _check_shape(tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"has shape {tuple(tensor.shape)}, the configuration asks for {shape}")
