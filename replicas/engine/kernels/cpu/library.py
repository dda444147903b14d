"""The compiled kernels as Python sees them: `native/step.h` in ctypes, and a machine that runs operations.

A call releases the interpreter's lock for as long as it runs; one call may run a whole step.
"""

from __future__ import annotations

import ctypes
import enum
import weakref
from ctypes import POINTER, c_char_p, c_float, c_int, c_int32, c_int64, c_void_p

import numpy as np
import torch
from numpy.typing import NDArray

from replicas.engine.host import processors
from replicas.engine.kernels import GumbelDraws, TopOfRows
from replicas.engine.kernels.cpu.build import KernelsUnavailable, library_path
from replicas.engine.philox import split_words


class Kind(enum.IntEnum):
    """`millrace::Kind`, in its order."""

    EMBED = 0
    ROPE_ANGLES = 1
    RMS_NORM = 2
    LINEAR = 3
    LINEAR_SILU_AND_MUL = 4
    SILU_AND_MUL = 5
    ROPE_AND_STORE_KV = 6
    ATTENTION = 7
    MERGE_ATTENTION = 8
    TAKE_ROWS = 9
    CLEAR_FRESH_TAILS = 10


class Op(ctypes.Structure):
    """`millrace::Op`."""

    _fields_ = [
        *[(name, c_int32) for name in ("kind", "dtype", "is_sampled", "in0", "in1", "out0", "out1")],
        *[(name, c_int32) for name in ("in_features", "out_features")],
        *[(name, c_int32) for name in ("num_heads", "num_kv_heads", "head_dim", "rotary_dim")],
        *[(name, c_int32) for name in ("row_stride", "is_fp32_out")],
        ("scalar", c_float),
        ("weight", c_void_p),
        ("extra", c_void_p),
    ]


class Step(ctypes.Structure):
    """`millrace::Step`."""

    _fields_ = [
        *[(name, c_int32) for name in ("num_tokens", "num_requests", "num_samples", "block_size", "max_blocks")],
        *[(name, c_void_p) for name in ("token_ids", "positions", "slot_mapping", "query_start_loc", "seq_lens")],
        *[(name, c_void_p) for name in ("block_tables", "rows", "buffers")],
    ]


_DRAW_ROW = np.dtype(
    [
        ("scores", np.uint64),
        *[(name, np.float32) for name in ("best", "temperature", "threshold")],
        *[(name, np.uint32) for name in ("seed_low", "seed_high", "position_low", "position_high")],
    ],
    align=True,
)
"""`millrace::DrawRow`."""
DTYPES = {torch.bfloat16: 0, torch.float32: 1}
_ERRORS: dict[int, Exception] = {
    1: MemoryError("the CPU kernels ran out of memory"),
    2: IndexError("a token id is outside the vocabulary"),
}


class Machine:
    """Threads and scratch memory for one instruction set. One call at a time.

    Raises KernelsUnavailable if the library cannot be built or `instruction_set` (None: the best) does not run here.
    """

    def __init__(self, num_threads: int, instruction_set: str | None = None) -> None:
        self._library = _open_library()
        here = instruction_sets()
        self.instruction_set = instruction_set or here[0]
        self.num_threads = num_threads
        if self.instruction_set not in here:
            raise KernelsUnavailable(f"this processor does not run {self.instruction_set}; it runs {', '.join(here)}")
        numbers = np.array(processors(), np.int32)
        self._handle = self._library.millrace_open(
            self.instruction_set.encode(), num_threads, numbers.ctypes.data, len(numbers)
        )
        if not self._handle:
            raise KernelsUnavailable(f"no threads or memory for {num_threads} compute threads")
        weakref.finalize(self, self._library.millrace_close, self._handle)

    def run(self, ops: ctypes.Array[Op], step: Step) -> None:
        """Raises MemoryError, or IndexError for a token id outside the vocabulary."""
        self._check(self._library.millrace_run(self._handle, ops, len(ops), ctypes.byref(step)))

    def pack(self, weight: torch.Tensor, packed: torch.Tensor) -> None:
        """weight (out_features, in_features) into tiles of 32 output features, one after the other."""
        dtype = DTYPES[weight.dtype]
        status = self._library.millrace_pack(self._handle, weight.data_ptr(), packed.data_ptr(), *weight.shape, dtype)
        self._check(status)

    def max_of_rows(self, scores: torch.Tensor) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """scores (num_rows, vocab_size) fp32 -> largest (NaN if any is) and its id, (num_rows,) each."""
        num_rows, size = scores.shape
        best, ids = np.empty(num_rows, np.float32), np.empty(num_rows, np.int64)
        addresses = scores.data_ptr(), num_rows, size, best.ctypes.data, ids.ctypes.data
        assert scores.is_contiguous(), "scores lie in one piece"
        self._check(self._library.millrace_max_of_rows(self._handle, *addresses))
        return best, ids

    def draw_of_rows(self, scores: torch.Tensor, draws: GumbelDraws) -> NDArray[np.int64]:
        """scores (num_rows, vocab_size) fp32 -> (num_draws,) token ids."""
        rows, ids = _draw_rows(scores, draws), np.empty(len(draws.rows), np.int64)
        addresses = rows.ctypes.data, len(rows), scores.shape[1], ids.ctypes.data
        self._check(self._library.millrace_draw_of_rows(self._handle, *addresses))
        return ids

    def top_of_rows(self, scores: torch.Tensor, draws: GumbelDraws, width: int) -> TopOfRows:
        """scores (num_rows, vocab_size) fp32, `width` at most vocab_size."""
        rows = _draw_rows(scores, draws)
        shape = (len(rows), width)
        top = TopOfRows(np.empty(shape, np.float32), np.empty(shape, np.int64), np.empty(len(rows), np.float64))
        outputs = top.scores.ctypes.data, top.token_ids.ctypes.data, top.mass.ctypes.data
        status = self._library.millrace_top_of_rows(
            self._handle, rows.ctypes.data, len(rows), scores.shape[1], width, *outputs
        )
        self._check(status)
        return top

    def _check(self, status: int) -> None:
        if status:
            raise _ERRORS[status]


def _draw_rows(scores: torch.Tensor, draws: GumbelDraws) -> NDArray[np.void]:
    assert scores.is_contiguous(), "scores lie in one piece"
    table = np.empty(len(draws.rows), _DRAW_ROW)
    table["scores"] = scores.data_ptr() + draws.rows * (scores.shape[1] * scores.element_size())
    for name in ("best", "temperature", "threshold"):
        table[name] = getattr(draws, name)
    table["seed_low"], table["seed_high"] = split_words(draws.seed)
    table["position_low"], table["position_high"] = split_words(draws.position)
    return table


def instruction_sets() -> list[str]:
    """What this processor can run, best first. Raises KernelsUnavailable."""
    names: bytes = _open_library().millrace_instruction_sets()
    return names.decode().split()


def _open_library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(library_path()))
    library.millrace_instruction_sets.restype = c_char_p
    library.millrace_open.argtypes, library.millrace_open.restype = [c_char_p, c_int, c_void_p, c_int], c_void_p
    library.millrace_close.argtypes, library.millrace_close.restype = [c_void_p], None
    library.millrace_run.argtypes = [c_void_p, POINTER(Op), c_int, POINTER(Step)]
    library.millrace_pack.argtypes = [c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int]
    library.millrace_max_of_rows.argtypes = [c_void_p, c_void_p, c_int, c_int64, c_void_p, c_void_p]
    library.millrace_draw_of_rows.argtypes = [c_void_p, c_void_p, c_int, c_int64, c_void_p]
    library.millrace_top_of_rows.argtypes = [*[c_void_p] * 2, c_int, c_int64, c_int64, *[c_void_p] * 3]
    return library
