"""The C++ kernels behind the `Kernels` protocol. An operation is written down in the recording that its operands belong
to (`program.py`) and computed when the program runs; packing and sampling are done at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from replicas.engine.host import advise_huge_pages
from replicas.engine.kernels import AttentionPlan, Forward, GumbelDraws, HeadShape, StepModel, TopOfRows
from replicas.engine.kernels.cpu.library import DTYPES, Kind, Machine, Op
from replicas.engine.kernels.cpu.program import ALIGNMENT, TILE, Buffer, Program


class PackedMemory:
    """Room for packed weights, one behind the other in pieces large enough for huge pages: a step reads all weights
    once, and at the end of each page the processor stops reading ahead. Nothing is handed back."""

    PIECE_BYTES = 64 * 2**20

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8)

    def empty(self, num_values: int, dtype: torch.dtype) -> Tensor:
        """(num_values,), not initialised."""
        num_bytes = -(-num_values * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        if num_bytes > len(self._free):
            self._free = torch.empty(max(num_bytes, self.PIECE_BYTES), dtype=torch.uint8)
            advise_huge_pages(self._free.data_ptr(), len(self._free))
        values, self._free = self._free[:num_bytes], self._free[num_bytes:]
        return values[: num_values * dtype.itemsize].view(dtype)


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """(tiles, in_features / pair, 32, pair): pairs along in_features in bf16, single values in fp32."""

    data: Tensor
    out_features: int
    in_features: int


class CpuKernels:
    """For bfloat16 and float32. Activations, `Tensor` to the model, are `Buffer`s here. A cache that these kernels have
    written is theirs alone: within a block K and V lie in tiles (`native/rowwise.h`)."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._memory = PackedMemory()
        threads = "1 thread" if machine.num_threads == 1 else f"{machine.num_threads} threads"
        self.name = f"cpu ({machine.instruction_set}, {threads})"

    def compile(self, model: StepModel, kv_cache: Tensor) -> Forward:
        return Program(self._machine, model, kv_cache)

    def pack(self, weight: Tensor) -> PackedWeight:
        """Raises ValueError for an odd number of input features."""
        out_features, in_features = weight.shape
        if in_features % 2:
            raise ValueError(f"the CPU kernels need an even number of input features, not {in_features}")
        data = self._memory.empty(-(-out_features // TILE) * TILE * in_features, weight.dtype)
        self._machine.pack(weight.contiguous(), data)
        return PackedWeight(data, out_features, in_features)

    def embed(self, token_ids: Tensor, table: Tensor) -> Tensor:
        vocab_size, width = table.shape
        out = _buffer_beside(token_ids, width, table.dtype)
        return _recorded(out, Op(Kind.EMBED, in_features=vocab_size, out_features=width), [], [table])

    def take_rows(self, x: Tensor, rows: Tensor) -> Tensor:
        out = _buffer_beside(x, _width(x), x.dtype, is_sampled=True)
        return _recorded(out, Op(Kind.TAKE_ROWS, in_features=_width(x)), [x])

    def rope_angles(self, positions: Tensor, inv_freq: Tensor, factor: float) -> Tensor:
        out = _buffer_beside(positions, 2 * len(inv_freq), torch.float32)
        return _recorded(out, Op(Kind.ROPE_ANGLES, rotary_dim=2 * len(inv_freq), scalar=factor), [], [inv_freq])

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out = _buffer_beside(x, _width(x), x.dtype)
        return _recorded(out, Op(Kind.RMS_NORM, in_features=_width(x), scalar=eps), [x], [weight])

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        out, total = (_buffer_beside(x, _width(x), x.dtype) for _ in range(2))
        op = Op(Kind.RMS_NORM, in_features=_width(x), scalar=eps)
        return _recorded(out, op, [x, residual], [weight], total), total

    def linear(
        self, x: Tensor, weight: PackedWeight, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
    ) -> Tensor:
        out = _buffer_beside(x, weight.out_features, out_dtype or x.dtype)
        op = Op(
            Kind.LINEAR,
            in_features=weight.in_features,
            out_features=weight.out_features,
            is_fp32_out=out.dtype == torch.float32,
        )
        return _recorded(out, op, [x], [weight.data] if bias is None else [weight.data, bias])

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        out = _buffer_beside(gate_up, _width(gate_up) // 2, gate_up.dtype)
        return _recorded(out, Op(Kind.SILU_AND_MUL, out_features=_width(out)), [gate_up])

    def rope_and_store_kv(
        self, qkv: Tensor, angles: Tensor, k_cache: Tensor, v_cache: Tensor, plan: AttentionPlan, heads: HeadShape
    ) -> Tensor:
        op = _attention_op(Kind.ROPE_AND_STORE_KV, heads)
        op.rotary_dim = _width(angles)
        return _recorded(qkv, op, [qkv, angles], [k_cache, v_cache])

    def paged_attention(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, plan: AttentionPlan, heads: HeadShape, scale: float
    ) -> Tensor:
        out = _buffer_beside(q, heads.num_heads * heads.head_dim, q.dtype)
        for kind in (Kind.ATTENTION, Kind.MERGE_ATTENTION):
            op = _attention_op(kind, heads)
            op.row_stride, op.scalar = _width(q), scale
            _recorded(out, op, [q], [k_cache, v_cache])
        return out

    def max_of_rows(self, scores: Tensor) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        return self._machine.max_of_rows(scores)

    def draw_of_rows(self, scores: Tensor, draws: GumbelDraws) -> NDArray[np.int64]:
        return self._machine.draw_of_rows(scores, draws)

    def top_of_rows(self, scores: Tensor, draws: GumbelDraws, width: int) -> TopOfRows:
        return self._machine.top_of_rows(scores, draws, width)


def _attention_op(kind: Kind, heads: HeadShape) -> Op:
    return Op(kind, num_heads=heads.num_heads, num_kv_heads=heads.num_kv_heads, head_dim=heads.head_dim)


def _recorded(
    out: Tensor, op: Op, inputs: list[Tensor], constants: list[Tensor] | None = None, second_out: Tensor | None = None
) -> Tensor:
    """Completes `op` with its operands and writes it down; returns `out`."""
    constants = constants or []
    target = _buffer(out)
    op.dtype = DTYPES[(inputs or constants)[0].dtype]
    op.is_sampled = target.is_sampled
    op.in0, op.in1 = ([_buffer(x).index for x in inputs] + [-1, -1])[:2]
    op.out0, op.out1 = target.index, -1 if second_out is None else _buffer(second_out).index
    op.weight, op.extra = ([constant.data_ptr() for constant in constants] + [None, None])[:2]
    target.recording.append(op, constants)
    return out


def _buffer_beside(x: Tensor, width: int, dtype: torch.dtype, is_sampled: bool | None = None) -> Tensor:
    """A new activation with a row for each row of `x`, or for each sampled one."""
    beside = _buffer(x)
    sampled = beside.is_sampled if is_sampled is None else is_sampled
    return cast("Tensor", beside.recording.buffer(width, dtype, sampled))


def _buffer(x: Tensor) -> Buffer:
    buffer = cast("Buffer", x)
    assert isinstance(buffer, Buffer), "these kernels record; a model runs through `compile`"
    return buffer


def _width(x: Tensor) -> int:
    return _buffer(x).width
