"""Decode steps as CUDA graphs: one launch replays the hundreds of small kernels of a step, whose launches from Python
would take longer than their work.

A graph is recorded for a number of requests and a bound of their length, when the first such batch comes. It reads its
inputs from one block of memory; rows that a batch does not fill are padding, which the kernels recognise: slot -1 is
not stored, length 0 attends to nothing. Steps with longer queries run operation by operation.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from replicas.engine.batch import Batch
from replicas.engine.kernels import AttentionPlan, StepModel
from replicas.engine.kernels.eager import EagerForward
from replicas.engine.kernels.triton_attention import length_bound

logger = logging.getLogger(__name__)

BATCH_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""A batch is padded to the next of these: at most by half, and few graphs to record."""


Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""Records a function; returns what replays it, and the tensor where its result stands after each replay."""


class CudaCapture:
    """Graphs that share one memory pool: only one runs at a time, and its result is read before the next one does."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        # once for real, on a stream of its own: kernels are compiled and workspaces made, which a capture forbids
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = run()
        return graph.replay, result


class GraphForward:
    """The `Forward` of a model on a CUDA device. Logits stay as they are until the next call."""

    def __init__(self, model: StepModel, kv_cache: Tensor, capture: Capture) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._eager = EagerForward(model, kv_cache)
        self._capture: Capture | None = capture
        self._steps: dict[tuple[int, int], DecodeStep] = {}

    def __call__(self, batch: Batch) -> Tensor:
        step = self._step_of(batch)
        if step is None:
            return self._eager(batch)
        hidden = step(batch)
        if len(batch.sampled_requests) < len(batch.seq_lens):
            hidden = hidden[torch.from_numpy(batch.sampled_requests.astype(np.int64)).to(hidden.device)]
        return self._model.logits(hidden)

    def _step_of(self, batch: Batch) -> DecodeStep | None:
        num_requests = len(batch.seq_lens)
        if len(batch.token_ids) > num_requests or num_requests > BATCH_SIZES[-1] or self._capture is None:
            return None
        size = BATCH_SIZES[bisect_left(BATCH_SIZES, num_requests)]
        key = size, length_bound(int(batch.seq_lens.max()))
        if key not in self._steps:
            try:
                self._steps[key] = DecodeStep(self._model, self._kv_cache, self._capture, *key)
            except Exception as error:
                logger.warning("no CUDA graph of %d requests, decode runs without graphs from here on: %s", size, error)
                self._capture = None
                return None
        return self._steps[key]


class DecodeStep:
    """One recorded step of up to `size` requests with one new token each, of up to `max_len` tokens."""

    def __init__(self, model: StepModel, kv_cache: Tensor, capture: Capture, size: int, max_len: int) -> None:
        max_blocks = max_len // kv_cache.shape[4]
        device, is_cuda = kv_cache.device, kv_cache.device.type == "cuda"
        # token ids, positions, slots, lengths, block tables: in one block, so that one copy brings them
        self._host = torch.zeros(size * (4 + max_blocks), dtype=torch.int32, pin_memory=is_cuda)
        self._inputs = torch.empty_like(self._host, device=device)
        self._has_copied = torch.cuda.Event() if is_cuda else None  # type: ignore[no-untyped-call]
        self._columns = self._host[: 4 * size].view(4, size).numpy()
        self._tables = self._host[4 * size :].view(size, max_blocks).numpy()
        self._pad_from(0)
        self._inputs.copy_(self._host)

        token_ids, positions, slots, seq_lens = self._inputs[: 4 * size].view(4, size)
        rows = torch.arange(size, device=device)
        plan = AttentionPlan(
            query_start_loc=torch.arange(size + 1, dtype=torch.int32, device=device),
            seq_lens=seq_lens,
            block_tables=self._inputs[4 * size :].view(size, max_blocks),
            slot_mapping=slots,
            query_lens_host=(1,) * size,
            seq_lens_host=(max_len,) * size,
        )
        self._replay, self._hidden = capture(lambda: model(token_ids, positions, kv_cache, plan, rows))

    def __call__(self, batch: Batch) -> Tensor:
        """Hidden states (num_requests, hidden_size), overwritten by the next step."""
        if self._has_copied is not None:
            self._has_copied.synchronize()  # the host's block may still be on its way to the device
        num_requests, width = batch.block_tables.shape
        width = min(width, self._tables.shape[1])
        columns = batch.token_ids, batch.positions, batch.slot_mapping, batch.seq_lens
        for mine, theirs in zip(self._columns, columns, strict=True):
            mine[:num_requests] = theirs
        self._tables[:num_requests, :width] = batch.block_tables[:, :width]
        self._pad_from(num_requests)
        self._inputs.copy_(self._host, non_blocking=True)
        if self._has_copied is not None:
            self._has_copied.record()
        self._replay()
        return self._hidden[:num_requests]

    def _pad_from(self, num_requests: int) -> None:
        self._columns[:, num_requests:] = np.array([[0], [0], [-1], [0]], np.int32)
