"""A model's whole step as one list of operations: recorded once from its own forward, run in one native call.

The CPU's counterpart of a CUDA graph. While recording, activations are `Buffer`s instead of tensors, and what the model
does with them through its kernels is written down. Replaying costs Python one call a step and gives up the
interpreter's lock once, however many layers there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from replicas.engine.batch import Batch
from replicas.engine.kernels import AttentionPlan, StepModel
from replicas.engine.kernels.cpu.library import DTYPES, Kind, Machine, Op, Step

ALIGNMENT = 64
"""Bytes of a cache line and of the widest register."""
TILE = 32
"""Output features of a packed weight's tile and keys of a tile of the cache, whose blocks are a multiple of it."""


@dataclass(frozen=True, eq=False, slots=True)
class Buffer:
    """An activation to be: (rows, width), a row for each token or for each sampled one."""

    recording: Recording
    index: int
    width: int
    dtype: torch.dtype
    is_sampled: bool = False


class Recording:
    """Operations in order, over numbered buffers. Attention's columns belong to every step and have no buffer."""

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self.buffers: list[Buffer] = []
        self.constants: list[Tensor] = []

    def buffer(self, width: int, dtype: torch.dtype, is_sampled: bool = False) -> Buffer:
        buffer = Buffer(self, len(self.buffers), width, dtype, is_sampled)
        self.buffers.append(buffer)
        return buffer

    def append(self, op: Op, constants: Sequence[Tensor]) -> None:
        self.constants.extend(constants)  # operations hold addresses only
        previous = self.ops[-1] if self.ops else None
        if op.kind == Kind.SILU_AND_MUL and previous is not None and self._can_fuse(previous, op):
            previous.kind, previous.out0 = Kind.LINEAR_SILU_AND_MUL, op.out0
            previous.out_features = op.out_features
        else:
            self.ops.append(op)

    def offsets(self, output: int) -> tuple[np.ndarray[Any, np.dtype[np.int64]], int]:
        """Bytes per row before each buffer, and in all: buffers share memory where one is read for the last time
        before the other is written. `output` lies elsewhere."""
        last_use = {index: i for i, op in enumerate(self.ops) for index in (op.in0, op.in1, op.out0, op.out1)}
        offsets = np.zeros(len(self.buffers), np.int64)
        taken: list[tuple[int, int, int]] = []  # (offset, bytes per row, buffer) in rising order
        total = 0
        for i, op in enumerate(self.ops):
            for index in (op.out0, op.out1):
                if index < 0 or index == output or any(index == held for *_, held in taken):
                    continue
                buffer = self.buffers[index]
                size = -(-buffer.width * buffer.dtype.itemsize // ALIGNMENT) * ALIGNMENT
                offsets[index] = _first_gap(taken, size)
                taken.append((int(offsets[index]), size, index))
                taken.sort()
                total = max(total, int(offsets[index]) + size)
            taken = [entry for entry in taken if last_use[entry[2]] > i]
        return offsets, total

    @staticmethod
    def _can_fuse(linear: Op, silu: Op) -> bool:
        if linear.kind != Kind.LINEAR or linear.out0 != silu.in0:
            return False
        return bool(silu.out_features % TILE == 0 and linear.out_features == 2 * silu.out_features)


class Program:
    """The `Forward` of a model on the CPU. Owns the memory of its activations."""

    def __init__(self, machine: Machine, model: StepModel, kv_cache: Tensor) -> None:
        recording = Recording()
        recording.append(_clear_fresh_tails(kv_cache), [kv_cache])
        token_ids, positions, rows = (cast("Tensor", recording.buffer(0, torch.int64)) for _ in range(3))
        plan = cast("AttentionPlan", None)  # its columns are the step's, for all operations alike
        logits = cast("Buffer", model.logits(model(token_ids, positions, kv_cache, plan, rows)))
        self._machine = machine
        self._block_size = kv_cache.shape[4]
        self._constants = recording.constants
        self._ops = (Op * len(recording.ops))(*recording.ops)
        self._output, self._vocab_size = logits.index, logits.width
        self._offsets, self._bytes_per_row = recording.offsets(logits.index)
        self._arena = np.empty(0, np.uint8)
        self._logits = np.empty((0, self._vocab_size), np.float32)

    def __call__(self, batch: Batch) -> Tensor:
        """(num_samples, vocab_size) fp32, overwritten by the next step. Raises IndexError for a token id outside the
        vocabulary."""
        # No torch until the native call: its functions give up the interpreter's lock, and whoever takes it then keeps
        # the kernels waiting.
        num_tokens, num_samples = len(batch.token_ids), len(batch.sampled_requests)
        num_bytes = num_tokens * self._bytes_per_row + ALIGNMENT
        if num_bytes > len(self._arena):
            self._arena = np.empty(num_bytes, np.uint8)
        if num_samples > len(self._logits):
            self._logits = np.empty((num_samples, self._vocab_size), np.float32)
        logits = self._logits[:num_samples]
        base = -(-_address(self._arena, np.uint8) // ALIGNMENT) * ALIGNMENT
        buffers = self._offsets * num_tokens + base
        buffers[self._output] = _address(logits, np.float32)
        rows = (batch.query_start_loc[1:][batch.sampled_requests] - 1).astype(np.int64)
        self._machine.run(self._ops, step_of(batch, rows, buffers, self._block_size))
        return torch.from_numpy(logits)


def _clear_fresh_tails(kv_cache: Tensor) -> Op:
    num_layers, _, num_blocks, num_kv_heads, _, head_dim = kv_cache.shape
    return Op(
        Kind.CLEAR_FRESH_TAILS,
        dtype=DTYPES[kv_cache.dtype],
        **dict.fromkeys(("in0", "in1", "out0", "out1"), -1),
        in_features=num_blocks,
        out_features=num_layers,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        weight=kv_cache.data_ptr(),
    )


def step_of(
    batch: Batch,
    rows: np.ndarray[Any, np.dtype[np.int64]],
    buffers: np.ndarray[Any, np.dtype[np.int64]],
    block_size: int,
) -> Step:
    """The addresses of a batch's columns; they must outlive the step."""
    return Step(
        num_tokens=len(batch.token_ids),
        num_requests=len(batch.seq_lens),
        num_samples=len(rows),
        block_size=block_size,
        max_blocks=batch.block_tables.shape[1],
        token_ids=_address(batch.token_ids, np.int64),
        positions=_address(batch.positions, np.int64),
        slot_mapping=_address(batch.slot_mapping, np.int64),
        query_start_loc=_address(batch.query_start_loc, np.int32),
        seq_lens=_address(batch.seq_lens, np.int32),
        block_tables=_address(batch.block_tables, np.int32),
        rows=_address(rows, np.int64),
        buffers=_address(buffers, np.int64),
    )


def _address(column: np.ndarray[Any, Any], dtype: type) -> int:
    assert column.dtype == dtype, f"a column of {column.dtype}, expected {dtype}"
    assert column.flags.c_contiguous, "a column has gaps"
    address: int = column.__array_interface__["data"][0]
    return address


def _first_gap(taken: Sequence[tuple[int, int, int]], size: int) -> int:
    start = 0
    for offset, length, _ in taken:
        if offset - start >= size:
            return start
        start = max(start, offset + length)
    return start
