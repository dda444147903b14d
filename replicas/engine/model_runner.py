"""One step on one rank: tokens become logits, logits become drawn tokens.

Knows the model, the cache tensor and the sampler; not why a request is in the batch.
"""

from __future__ import annotations

from typing import Protocol

import torch
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
        self.sampler = sampler
        self._forward = model.kernels.compile(model, kv_cache)

    @torch.inference_mode()
    def run(self, batch: Batch) -> StepOutput:
        """Raises whatever the forward pass raises: then the whole step failed."""
        return self.sampler.sample(self._forward(batch), batch.sampling)
