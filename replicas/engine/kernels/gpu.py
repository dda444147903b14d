"""The kernels of a CUDA device: Triton's between the matrix products, cuBLAS for these, graphs for decode steps.

What `reference.py` does well enough in torch (embedding, taking rows, the angles of one step) is inherited. Inputs are
contiguous, as those operations and `linear` make them.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from replicas.engine.kernels import AttentionPlan, Forward, GumbelDraws, HeadShape, StepModel
from replicas.engine.kernels import triton_attention as attention
from replicas.engine.kernels import triton_rowwise as rowwise
from replicas.engine.kernels import triton_sampling as sampling
from replicas.engine.kernels.cuda_graphs import CudaCapture, GraphForward
from replicas.engine.kernels.eager import EagerForward
from replicas.engine.kernels.reference import ReferenceKernels


class GpuKernels(ReferenceKernels):
    """Raises ValueError for blocks that the attention cannot address."""

    name = "triton"

    def __init__(self, device: torch.device, block_size: int) -> None:
        if block_size < 16 or block_size & (block_size - 1):
            raise ValueError(
                f"the Triton kernels need blocks of a power of two of at least 16 tokens, not {block_size}"
            )
        if device.type == "cuda":
            torch.cuda.set_device(device)  # Triton launches on the thread's current device

    def compile(self, model: StepModel, kv_cache: Tensor) -> Forward:
        if kv_cache.device.type != "cuda":  # Triton's interpreter
            return EagerForward(model, kv_cache)
        return GraphForward(model, kv_cache, CudaCapture())

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rowwise.rms_norm(x, weight, eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return rowwise.add_rms_norm(x, residual, weight, eps)

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        return rowwise.silu_and_mul(gate_up)

    def rope_and_store_kv(
        self, qkv: Tensor, angles: Tensor, k_cache: Tensor, v_cache: Tensor, plan: AttentionPlan, heads: HeadShape
    ) -> Tensor:
        """Returns q (num_tokens, num_heads, head_dim)."""
        return rowwise.rope_and_store_kv(qkv, angles, k_cache, v_cache, plan, heads)

    def paged_attention(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, plan: AttentionPlan, heads: HeadShape, scale: float
    ) -> Tensor:
        is_decode = len(q) == len(plan.query_lens_host)
        attend = attention.attend_decode if is_decode else attention.attend_varlen
        return attend(q, k_cache, v_cache, plan, heads, scale)

    def max_of_rows(self, scores: Tensor) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        return sampling.max_of_rows(scores)

    def draw_of_rows(self, scores: Tensor, draws: GumbelDraws) -> NDArray[np.int64]:
        return sampling.draw_of_rows(scores, draws)
