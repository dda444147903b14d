"""The GGUF container: metadata, tensor directory and block formats. Knows no architecture.

Format: the GGUF specification of the ggml project, versions 2 and 3, little-endian. Our own reader of the header,
because gguf-py spends three seconds on a 49k-token vocabulary; its dequantisation serves the formats not in `_EXPAND`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray
from torch import Tensor

_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_CHUNK_VALUES = 1 << 15
"""Values expanded at a time: the fp32 values in between stay in the core's cache, and no operation is large enough
for torch to share it out, which on a busy machine costs more in waiting than it saves."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    name: str
    shape: tuple[int, ...]
    """In torch's order; the file stores it reversed."""
    type: GGMLQuantizationType
    offset: int
    """From the start of the file, in bytes."""
    num_bytes: int


class GgufFile:
    """Header read at birth, tensors through a memory map. Raises ValueError if the file is damaged or not GGUF."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._data: NDArray[np.uint8] = np.memmap(path, dtype=np.uint8, mode="r")
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        cursor = _Cursor(self._data)
        try:
            self.fields, self.tensors = _read_header(cursor)
        except (struct.error, UnicodeDecodeError, _Malformed) as error:
            raise ValueError(f"{path} is truncated or is not a GGUF file: {error}") from error
        for info in self.tensors.values():
            if info.offset + info.num_bytes > len(self._data):
                raise ValueError(
                    f"{path} is truncated: tensor {info.name} ends at byte {info.offset + info.num_bytes}, "
                    f"the file at {len(self._data)}"
                )

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """The tensor's values, expanded in fp32 and rounded to `dtype`."""
        info = self.tensors[name]
        packed = self._data[info.offset : info.offset + info.num_bytes]
        block_values, block_bytes = GGML_QUANT_SIZES[info.type]
        out = torch.empty(info.num_bytes // block_bytes, block_values, dtype=dtype)
        blocks = packed.reshape(-1, block_bytes)
        step = max(1, _CHUNK_VALUES // block_values)
        for start in range(0, len(blocks), step):
            out[start : start + step] = _expand(blocks[start : start + step], info.type)
        return out.view(info.shape)


class _Malformed(Exception):
    pass


class _Cursor:
    def __init__(self, data: NDArray[np.uint8]) -> None:
        self._view = memoryview(data)  # type: ignore[arg-type]  # numpy's stubs lack the buffer protocol before 3.12
        self.position = 0

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self._view, self.position)
        self.position += struct.calcsize("<" + code)
        return value

    def take(self, num_bytes: int) -> bytes:
        end = self.position + num_bytes
        if end > len(self._view):
            raise _Malformed(f"{num_bytes} bytes wanted at {self.position}, the file ends at {len(self._view)}")
        taken = bytes(self._view[self.position : end])
        self.position = end
        return taken

    def text(self) -> str:
        return self.take(self.scalar("Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self._array(self.scalar("I"), self.scalar("Q"))
        if kind not in _SCALARS:
            raise _Malformed(f"unknown metadata type {kind} at byte {self.position}")
        return self.scalar(_SCALARS[kind])

    def _array(self, kind: int, length: int) -> list[Any]:
        if kind in _SCALARS:
            dtype = np.dtype("<" + _SCALARS[kind]) if kind != 7 else np.dtype(np.bool_)
            values: list[Any] = np.frombuffer(self.take(length * dtype.itemsize), dtype=dtype).tolist()
            return values
        if kind == _ARRAY:
            raise _Malformed(f"an array of arrays at byte {self.position}, which no reader of GGUF supports")
        if length > len(self._view):
            raise _Malformed(f"an array of {length} values at byte {self.position}")
        return [self.value(kind) for _ in range(length)]


def _read_header(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    if cursor.take(4) != b"GGUF":
        raise _Malformed("it does not begin with 'GGUF'")
    version = cursor.scalar("I")
    if version not in (2, 3):
        raise _Malformed(f"version {version} (2 and 3, little-endian, are supported)")
    num_tensors, num_fields = cursor.scalar("Q"), cursor.scalar("Q")
    fields: dict[str, Any] = {}
    for _ in range(num_fields):
        key = cursor.text()
        fields[key] = cursor.value(cursor.scalar("I"))
    infos = [_read_tensor_info(cursor) for _ in range(num_tensors)]
    alignment = fields.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0:
        raise _Malformed(f"general.alignment is {alignment!r}")
    data_start = -(-cursor.position // alignment) * alignment
    tensors = {
        name: TensorInfo(name, shape, kind, data_start + offset, num_bytes)
        for name, shape, kind, offset, num_bytes in infos
    }
    return fields, tensors


def _read_tensor_info(cursor: _Cursor) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int, int]:
    name = cursor.text()
    num_dims = cursor.scalar("I")
    if num_dims > 8:
        raise _Malformed(f"tensor {name} has {num_dims} dimensions")
    shape = tuple(cursor.scalar("Q") for _ in range(num_dims))[::-1]
    number, offset = cursor.scalar("I"), cursor.scalar("Q")
    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        raise _Malformed(f"tensor {name} has the unknown type {number}") from None
    block_values, block_bytes = GGML_QUANT_SIZES[kind]
    if 0 in shape:
        raise _Malformed(f"tensor {name} of shape {shape} has no values")
    if not shape or shape[-1] % block_values:
        raise _Malformed(f"tensor {name} of shape {shape} does not divide into {kind.name} blocks of {block_values}")
    return name, shape, kind, offset, prod(shape) // block_values * block_bytes


def _expand(blocks: NDArray[np.uint8], kind: GGMLQuantizationType) -> Tensor:
    """(num_blocks, block_bytes) -> (num_blocks, block_values), bit for bit what gguf-py gives."""
    if kind in _EXPAND:
        return _EXPAND[kind](torch.from_numpy(np.ascontiguousarray(blocks).copy()))
    from gguf.quants import dequantize

    try:
        return torch.from_numpy(np.ascontiguousarray(dequantize(blocks, kind)))
    except NotImplementedError as error:
        raise ValueError(f"tensors of type {kind.name} are not supported: {error}") from error


def _expand_q4_0(blocks: Tensor) -> Tensor:
    """18 bytes: fp16 scale, 32 nibbles (low halves first); value = scale * (nibble - 8)."""
    return _scale(blocks, 0) * (_nibbles(blocks[:, 2:]) - 8)


def _expand_q4_1(blocks: Tensor) -> Tensor:
    """20 bytes: fp16 scale, fp16 minimum, 32 nibbles; value = scale * nibble + minimum."""
    return (_nibbles(blocks[:, 4:]).mul_(_scale(blocks, 0))).add_(_scale(blocks, 2))


def _expand_q8_0(blocks: Tensor) -> Tensor:
    """34 bytes: fp16 scale, 32 signed bytes; value = scale * byte."""
    return blocks[:, 2:].view(torch.int8).float().mul_(_scale(blocks, 0))


def _scale(blocks: Tensor, start: int) -> Tensor:
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    return torch.cat((packed & 15, packed >> 4), dim=-1).float()


def _plain(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda blocks: blocks.view(dtype)


_EXPAND: dict[GGMLQuantizationType, Callable[[Tensor], Tensor]] = {
    GGMLQuantizationType.F32: _plain(torch.float32),
    GGMLQuantizationType.F16: _plain(torch.float16),
    GGMLQuantizationType.BF16: _plain(torch.bfloat16),
    GGMLQuantizationType.Q4_0: _expand_q4_0,
    GGMLQuantizationType.Q4_1: _expand_q4_1,
    GGMLQuantizationType.Q8_0: _expand_q8_0,
}
