"""A weight format is a strategy of `Linear`: it owns the bytes, `Linear` owns the shape and its shards.

Tensor parallelism never sees a format, a format never sees a rank.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class LinearMethod(Protocol):
    granularity: int
    """Input and output features come in multiples of this (group, pack or block); `Linear` checks shards against it."""

    def create(self, layer: torch.nn.Module, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        """Register the parameters of a (out_features, in_features) weight on `layer`."""
        ...

    def load(self, layer: torch.nn.Module, tensor: Tensor, out_offset: int) -> None:
        """Copy a checkpoint's (rows, in_features) tensor into rows `out_offset:out_offset + rows`."""
        ...

    def finalize(self, layer: torch.nn.Module) -> None:
        """After all rows are loaded: pack into the form that `apply` reads fastest."""
        ...

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None, out_dtype: torch.dtype | None) -> Tensor:
        """x (num_tokens, in_features) -> (num_tokens, out_features), plus bias (out_features,); in fp32 or the dtype
        of x."""
        ...
