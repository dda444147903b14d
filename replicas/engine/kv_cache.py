"""How large the paged KV cache is and the one tensor that it is. Which block belongs to whom is `BlockManager`'s."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from replicas.engine.config import CacheConfig
from replicas.engine.host import advise_huge_pages
from replicas.engine.models.transformer import TransformerConfig

GIB = 1 << 30
_CPU_SHARE = 0.25
"""Of the memory that is free when the cache is made."""
_CPU_USUAL_BYTES = GIB
_CPU_MAX_BYTES = 4 * GIB
_SLACK_VALUES = 64
"""Kernels read whole vectors: the last head's last one may reach beyond the cache."""


@dataclass(frozen=True, slots=True)
class KVShape:
    """Of one model's cache: `num_layers` x (K, V) x blocks x `num_kv_heads` x `block_size` x `head_dim`."""

    num_layers: int
    num_kv_heads: int
    block_size: int
    head_dim: int
    dtype: torch.dtype

    @classmethod
    def of(cls, model: TransformerConfig, cache: CacheConfig, dtype: torch.dtype) -> KVShape:
        return cls(model.num_layers, model.num_kv_heads, cache.block_size, model.head_dim, dtype)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in all layers, K and V."""
        values = self.num_layers * 2 * self.num_kv_heads * self.block_size * self.head_dim
        return values * self.dtype.itemsize

    def num_blocks_of(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)


def choose_num_blocks(
    shape: KVShape, config: CacheConfig, available_bytes: int, max_model_len: int, max_num_seqs: int
) -> int:
    """The first that is set of `num_blocks`, `memory_bytes`, `available_bytes` decides; never more than
    `max_num_seqs` sequences of `max_model_len` tokens can use, unless `num_blocks` asks for it.

    Raises ValueError with the numbers if not one sequence of `max_model_len` tokens fits.
    """
    needed = shape.num_blocks_of(max_model_len)
    if config.num_blocks is not None:
        num_blocks, origin = config.num_blocks, f"num_blocks is {config.num_blocks}"
    else:
        is_set = config.memory_bytes is not None
        budget = config.memory_bytes if config.memory_bytes is not None else available_bytes
        num_blocks = min(max(budget, 0) // shape.block_bytes, needed * max_num_seqs)
        origin = f"{'memory_bytes is' if is_set else 'the memory for it is'} {budget / GIB:.2f} GiB"
    if num_blocks < needed:
        raise ValueError(
            f"the KV cache cannot hold one sequence of {max_model_len} tokens: that takes {needed} blocks of "
            f"{shape.block_size} tokens ({needed * shape.block_bytes / GIB:.2f} GiB), but {origin} "
            f"({num_blocks} blocks); lower max_model_len or give the cache more memory"
        )
    return num_blocks


def cpu_budget_bytes(shape: KVShape, free_bytes: int, max_model_len: int) -> int:
    """Room for the cache beside everything else on the machine: 1 GiB, more (up to 4) where two full sequences take
    it, never over a quarter of the free memory."""
    two_sequences = 2 * shape.num_blocks_of(max_model_len) * shape.block_bytes
    wanted = min(max(_CPU_USUAL_BYTES, two_sequences), _CPU_MAX_BYTES)
    return min(wanted, int(free_bytes * _CPU_SHARE))


def allocate(shape: KVShape, num_blocks: int, device: torch.device) -> Tensor:
    """(num_layers, 2, num_blocks, num_kv_heads, block_size, head_dim), zero: written once, so the pages are really
    there before the first request counts on them.

    Raises ValueError if the memory is not there after all.
    """
    size = (shape.num_layers, 2, num_blocks, shape.num_kv_heads, shape.block_size, shape.head_dim)
    try:
        num_values = num_blocks * shape.block_bytes // shape.dtype.itemsize
        values = torch.empty(num_values + _SLACK_VALUES, dtype=shape.dtype, device=device)
        if device.type == "cpu":
            advise_huge_pages(values.data_ptr(), values.nbytes)
        values.zero_()
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        raise ValueError(
            f"no memory for a KV cache of {num_blocks} blocks ({num_blocks * shape.block_bytes / GIB:.2f} GiB) "
            f"on {device}; set num_blocks or memory_bytes lower"
        ) from error
    return values[:num_values].view(size)
