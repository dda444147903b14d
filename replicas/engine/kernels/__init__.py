"""The operations worth a kernel of their own, behind one protocol, and the only place that decides by hardware.

A model's forward is written in these operations and nothing else, so that a kernel set may run them one by one
(`eager.py`), record them once and run a whole step at a time (`cpu/`), or capture them in a graph.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from replicas.engine.batch import Batch

if TYPE_CHECKING:  # so that the kernels can be compiled without loading torch
    import torch
    from torch import Tensor

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """One step's shape, made once and shared by all layers. Tensors are on the device, lengths on the host too."""

    query_start_loc: Tensor
    """(num_requests + 1,) int32"""
    seq_lens: Tensor
    """(num_requests,) int32"""
    block_tables: Tensor
    """(num_requests, max_blocks) int32"""
    slot_mapping: Tensor
    """(num_tokens,) int64"""
    query_lens_host: tuple[int, ...]
    seq_lens_host: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class HeadShape:
    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class GumbelDraws:
    """One token each from some rows of a table of scores; every column has shape (num_draws,).

    Drawn is the token for which (score - best) / temperature, if it reaches the threshold, and the token's Gumbel
    number have the largest sum.
    """

    rows: NDArray[np.int64]
    """Distinct and rising."""
    best: NDArray[np.float32]
    """The row's largest score."""
    temperature: NDArray[np.float32]
    threshold: NDArray[np.float32]
    """-inf: none."""
    seed: NDArray[np.uint64]
    position: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class TopOfRows:
    """The likeliest tokens of some rows: scaled scores, (score - best) / temperature, falling."""

    scores: NDArray[np.float32]
    """(num_draws, width)"""
    token_ids: NDArray[np.int64]
    """(num_draws, width)"""
    mass: NDArray[np.float64]
    """(num_draws,): the sum of e**scaled over all tokens that reach the row's threshold."""


class StepModel(Protocol):
    """What a kernel set compiles: `models.transformer.Transformer` is one."""

    def __call__(
        self, token_ids: Tensor, positions: Tensor, kv_cache: Tensor, plan: AttentionPlan, rows: Tensor
    ) -> Tensor:
        """token_ids, positions (num_tokens,); kv_cache (num_layers, 2, num_blocks, num_kv_heads, block_size,
        head_dim); rows (num_samples,) -> hidden states of those rows (num_samples, hidden_size)."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """(num_samples, hidden_size) -> (num_samples, vocab_size)"""
        ...


Forward = Callable[[Batch], "Tensor"]
"""One step of one model over one cache: the logits (num_samples, vocab_size) of a batch."""


class Kernels(Protocol):
    """`reference.py` is the oracle of every other implementation. Nothing here knows layers or requests."""

    name: str

    def compile(self, model: StepModel, kv_cache: Tensor) -> Forward:
        """The fastest way to run steps of `model`, whose weights are loaded."""
        ...

    def pack(self, weight: Tensor) -> Any:
        """A weight (out_features, in_features) in the form that `linear` reads fastest. Raises ValueError for a shape
        that these kernels cannot pack."""
        ...

    def embed(self, token_ids: Tensor, table: Tensor) -> Tensor:
        """(num_tokens,) rows of table (vocab_size, hidden)."""
        ...

    def take_rows(self, x: Tensor, rows: Tensor) -> Tensor:
        """x (num_tokens, width), rows (num_samples,) -> (num_samples, width)"""
        ...

    def rope_angles(self, positions: Tensor, inv_freq: Tensor, factor: float) -> Tensor:
        """positions (num_tokens,), inv_freq (rotary_dim / 2,) fp32 -> (num_tokens, rotary_dim) fp32: cosines, then
        sines, both times `factor`."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x (num_tokens, hidden) -> the same; sums in fp32."""
        ...

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual)"""
        ...

    def linear(
        self, x: Tensor, weight: Any, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
    ) -> Tensor:
        """x (num_tokens, in_features), weight from `pack`, bias (out_features,) -> (num_tokens, out_features), in fp32
        or the dtype of x."""
        ...

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        """(num_tokens, 2 x intermediate) -> silu(first half) x second half."""
        ...

    def rope_and_store_kv(
        self, qkv: Tensor, angles: Tensor, k_cache: Tensor, v_cache: Tensor, plan: AttentionPlan, heads: HeadShape
    ) -> Tensor:
        """qkv (num_tokens, (num_heads + 2 num_kv_heads) x head_dim): rotates halves (NeoX order) of the first channels
        of each q and k head, as many as `angles` is wide; puts k and v into caches (num_blocks, num_kv_heads,
        block_size, head_dim). Returns the queries in the form that `paged_attention` takes; qkv is spent."""
        ...

    def paged_attention(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, plan: AttentionPlan, heads: HeadShape, scale: float
    ) -> Tensor:
        """Causal attention of each request's last query rows over its cached tokens, grouped heads allowed;
        (num_tokens, num_heads x head_dim)."""
        ...

    def max_of_rows(self, scores: Tensor) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Of scores (num_samples, vocab_size) fp32 each row's largest, NaN if any is, and its token id."""
        ...

    def draw_of_rows(self, scores: Tensor, draws: GumbelDraws) -> NDArray[np.int64]:
        """scores (num_samples, vocab_size) fp32 -> one token id per draw, a function of its own row alone."""
        ...

    def top_of_rows(self, scores: Tensor, draws: GumbelDraws, width: int) -> TopOfRows:
        """scores (num_samples, vocab_size) fp32 -> the `width` likeliest tokens of each draw's row."""
        ...


def select_kernels(
    device: torch.device, dtype: torch.dtype, block_size: int, num_threads: int, override: str | None = None
) -> Kernels:
    """The fastest kernels that run here. Raises ValueError naming the choices if `override` is not one, or saying why
    it cannot run here."""
    from replicas.engine.kernels.reference import ReferenceKernels

    fast = {"cpu": "cpu", "cuda": "triton"}.get(device.type)
    choices = ["reference", *([fast] if fast else [])]
    if override is not None and override not in choices:
        raise ValueError(f"kernels {override!r} are not available on {device.type}; choose from {', '.join(choices)}")
    if override == "reference" or fast is None:
        return ReferenceKernels()
    try:
        return _gpu_kernels(device, block_size) if fast == "triton" else _cpu_kernels(dtype, block_size, num_threads)
    except ValueError as error:
        if override is not None:
            raise
        logger.warning("%s; plain torch does the work, several times slower", error)
        return ReferenceKernels()


def _gpu_kernels(device: torch.device, block_size: int) -> Kernels:
    try:
        from replicas.engine.kernels.gpu import GpuKernels
    except ImportError as error:
        raise ValueError(f"the Triton kernels cannot be imported ({error})") from error
    return GpuKernels(device, block_size)


def _cpu_kernels(dtype: torch.dtype, block_size: int, num_threads: int) -> Kernels:
    from replicas.engine.kernels.cpu.kernels import CpuKernels
    from replicas.engine.kernels.cpu.library import DTYPES, Machine
    from replicas.engine.kernels.cpu.program import TILE

    if dtype not in DTYPES:
        raise ValueError(f"the CPU kernels compute in bfloat16 or float32, not in {str(dtype).removeprefix('torch.')}")
    if block_size % TILE:
        raise ValueError(f"the CPU kernels need blocks of a multiple of {TILE} tokens, not {block_size}")
    return CpuKernels(Machine(num_threads))
