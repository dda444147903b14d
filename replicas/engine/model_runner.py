"""One step on one rank: tokens become logits, logits become drawn tokens.

Knows the model, the cache tensor and the sampler; not why a request is in the batch.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from replicas.engine.batch import Batch, SamplingColumns, StepOutput
from replicas.engine.models.transformer import Transformer


class DrawTokens(Protocol):
    """What the runner asks of a sampler (`sampler.py`)."""

    def sample(self, logits: Tensor, columns: SamplingColumns) -> StepOutput:
        """logits (num_samples, vocab_size); a row that fails on its own stands in `StepOutput.errors`."""
        ...


class ModelRunner:
    """Owns nothing but the way: model and cache are the worker's."""

    @torch.inference_mode()
    def __init__(self, model: Transformer, kv_cache: Tensor, sampler: DrawTokens) -> None:
        self.kv_cache = kv_cache
        self.sampler = sampler
        self.block_size = kv_cache.shape[4]
        self._forward = model.kernels.compile(model, kv_cache)

    @torch.inference_mode()
    def run(self, batch: Batch) -> StepOutput:
        """Raises whatever the forward pass raises: then the whole step failed."""
        self._clear_fresh_tails(batch)
        return self.sampler.sample(self._forward(batch), batch.sampling)

    def _clear_fresh_tails(self, batch: Batch) -> None:
        """Zero the blocks that this step begins and leaves partly filled.

        So the unwritten slots of a held block are zero in every layer, and what a former owner left there (NaN, for
        one) never reaches a masked product.
        """
        blocks = _fresh_partial_blocks(batch, self.block_size)
        if len(blocks):
            self.kv_cache.index_fill_(2, torch.from_numpy(blocks).to(self.kv_cache.device), 0)


def _fresh_partial_blocks(batch: Batch, block_size: int) -> NDArray[np.int64]:
    seq_lens = batch.seq_lens.astype(np.int64)
    last_block = (seq_lens - 1) // block_size
    num_computed = seq_lens - np.diff(batch.query_start_loc)
    is_fresh = (num_computed <= last_block * block_size) & (seq_lens % block_size != 0)
    requests = np.flatnonzero(is_fresh)
    return batch.block_tables[requests, last_block[requests]].astype(np.int64)
