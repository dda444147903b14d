"""Compiles what the launchers would launch on an H100, on a machine without a GPU, and prints one line per kernel:
name, bytes of stack, bytes of shared memory. A process of its own, because here Triton must not interpret.

Stack is what `ptxas` gives to registers that it must spill.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from replicas.engine.kernels import AttentionPlan, GumbelDraws, HeadShape
from replicas.engine.kernels import triton_attention as attention
from replicas.engine.kernels import triton_rowwise as rowwise
from replicas.engine.kernels import triton_sampling as sampling

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
BF16, FP32 = torch.bfloat16, torch.float32


class AbsentDriver:
    """As much of a driver as a compilation asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_instead(kernel: JITFunction, grid: tuple[int, ...]) -> Any:
    def launch(*args: Any, **kwargs: Any) -> None:
        compiled = kernel.run(*args, grid=grid, warmup=True, **kwargs)
        print(kernel.fn.__name__, stack_bytes(compiled.asm["cubin"]), compiled.metadata.shared, flush=True)

    return launch


def stack_bytes(cubin: bytes) -> int:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    (stack,) = re.findall(r"STACK:(\d+)", usage)
    return int(stack)


def plan(query_lens: tuple[int, ...], seq_lens: tuple[int, ...]) -> AttentionPlan:
    numbers = torch.zeros(4096, dtype=torch.int32)
    slots = torch.zeros(sum(query_lens), dtype=torch.int64)
    return AttentionPlan(numbers, numbers, numbers.view(8, -1), slots, query_lens, seq_lens)


def compile_attention() -> None:
    for (head_dim, group), dtype in product([(64, 2), (80, 3), (128, 4), (256, 8)], [BF16, FP32]):
        heads = HeadShape(2 * group, 2, head_dim)
        cache = torch.zeros(2, 2, 32, head_dim, dtype=dtype)
        for query_lens in ((1, 2), (100, 1)) if dtype == BF16 else ((100, 1),):
            q = torch.zeros(sum(query_lens), heads.num_heads, head_dim, dtype=dtype)
            attention.attend_varlen(q, cache, cache, plan(query_lens, (100, 100)), heads, 1.0)
        for count in (1, 800):
            q = torch.zeros(count, heads.num_heads, head_dim, dtype=dtype)
            attention.attend_decode(q, cache, cache, plan((1,) * count, (100,) * count), heads, 1.0)


def compile_rowwise() -> None:
    heads = HeadShape(32, 8, 128)
    cache = torch.zeros(2, 8, 32, 128, dtype=BF16)
    x, weight = torch.zeros(2, 4096, dtype=BF16), torch.zeros(4096, dtype=BF16)
    rowwise.rms_norm(x, weight, 1e-5)
    rowwise.add_rms_norm(x, x, weight, 1e-5)
    rowwise.silu_and_mul(torch.zeros(2, 28672, dtype=BF16))
    qkv = torch.zeros(2, 48 * 128, dtype=BF16)
    rowwise.rope_and_store_kv(qkv, torch.zeros(2, 128), cache, cache, plan((2,), (2,)), heads)


def compile_sampling() -> None:
    scores = torch.zeros(2, 151_936)
    column = np.zeros(2, np.float32)
    integers = np.zeros(2, np.int64)
    sampling.max_of_rows(scores)
    sampling.draw_of_rows(scores, GumbelDraws(integers, column, column, column, integers.view(np.uint64), integers))


if __name__ == "__main__":
    triton.runtime.driver.set_active(AbsentDriver())
    JITFunction.__getitem__ = compile_instead
    compile_attention()
    compile_rowwise()
    compile_sampling()
