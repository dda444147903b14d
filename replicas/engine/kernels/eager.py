"""A model run operation by operation, on any device."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from replicas.engine.batch import Batch
from replicas.engine.kernels import AttentionPlan, StepModel


class EagerForward:
    """The `Forward` of kernels that compute at once: columns become tensors on the cache's device."""

    def __init__(self, model: StepModel, kv_cache: Tensor) -> None:
        self._model = model
        self._kv_cache = kv_cache

    def __call__(self, batch: Batch) -> Tensor:
        self._clear_fresh_tails(batch)
        rows = (batch.query_start_loc[1:] - 1)[batch.sampled_requests].astype(np.int64)
        token_ids, positions = self._tensor(batch.token_ids), self._tensor(batch.positions)
        hidden = self._model(token_ids, positions, self._kv_cache, self._plan(batch), self._tensor(rows))
        return self._model.logits(hidden)

    def _clear_fresh_tails(self, batch: Batch) -> None:
        """Zero the blocks that this step begins and leaves partly filled.

        So the unwritten slots of a held block are zero in every layer, and what a former owner left there (NaN, for
        one) never reaches a masked product.
        """
        blocks = _fresh_partial_blocks(batch, self._kv_cache.shape[4])
        if len(blocks):
            self._kv_cache.index_fill_(2, self._tensor(blocks), 0)

    def _plan(self, batch: Batch) -> AttentionPlan:
        return AttentionPlan(
            query_start_loc=self._tensor(batch.query_start_loc),
            seq_lens=self._tensor(batch.seq_lens),
            block_tables=self._tensor(batch.block_tables),
            slot_mapping=self._tensor(batch.slot_mapping),
            query_lens_host=tuple(np.diff(batch.query_start_loc).tolist()),
            seq_lens_host=tuple(batch.seq_lens.tolist()),
        )

    def _tensor(self, column: NDArray[np.int64] | NDArray[np.int32]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(column)).to(self._kv_cache.device, non_blocking=True)


def _fresh_partial_blocks(batch: Batch, block_size: int) -> NDArray[np.int64]:
    seq_lens = batch.seq_lens.astype(np.int64)
    last_block = (seq_lens - 1) // block_size
    num_computed = seq_lens - np.diff(batch.query_start_loc)
    is_fresh = (num_computed <= last_block * block_size) & (seq_lens % block_size != 0)
    requests = np.flatnonzero(is_fresh)
    return batch.block_tables[requests, last_block[requests]].astype(np.int64)
