"""Paged attention in Triton over caches (num_blocks, num_kv_heads, block_size, head_dim): which program, which tiles.

`attend_varlen` takes any mix of query lengths: a program is a tile of queries of one request times the query heads of
one K/V head, so that these share every K/V tile. `attend_decode` takes one query per request and splits the cached
tokens over programs (Dao et al. 2023, "Flash-Decoding for long-context inference"), because a batch of few requests
leaves a GPU empty. The sizes of tiles are those that `ptxas` for sm_90 compiles without spilling registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from replicas.engine.kernels import AttentionPlan, HeadShape
from replicas.engine.kernels.triton_attention_programs import merge_kernel, split_kernel, varlen_kernel

MAX_SPLITS = 64
SPLIT_TOKENS = 16_384
"""A request longer than this is split even where the batch alone fills the GPU."""


def attend_varlen(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    plan: AttentionPlan,
    heads: HeadShape,
    scale: float,
    *,
    window: int = 0,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """q (num_tokens, num_heads, head_dim) -> (num_tokens, num_heads x head_dim).

    A query sees the `window` newest tokens up to itself (0: all); scores are bent into (-soft_cap, soft_cap) (0: not);
    sinks (num_heads,) fp32 are scores of one more token per head that has no value.
    """
    group = heads.num_heads // heads.num_kv_heads
    padded_dim = max(16, triton.next_power_of_2(heads.head_dim))
    most_rows, tile = _tile(q.element_size(), padded_dim)
    # few sizes, for each is compiled on its own
    wanted = max(plan.query_lens_host) * group
    rows = min(most_rows, 16 if wanted <= 16 else 64 if wanted <= 64 else 128)
    rows = max(rows, triton.next_power_of_2(group))
    queries = rows // group
    out = torch.empty_like(q)
    # request i's tiles begin at query_start_loc[i] // queries + i: an upper bound that needs no table of tiles
    num_tiles = len(q) // queries + len(plan.query_lens_host)
    varlen_kernel[(num_tiles, heads.num_kv_heads)](
        out,
        q,
        k_cache,
        v_cache,
        plan.block_tables,
        plan.query_start_loc,
        plan.seq_lens,
        sinks,
        scale,
        len(plan.query_lens_host),
        plan.block_tables.stride(0),
        k_cache.stride(0),
        NUM_HEADS=heads.num_heads,
        GROUP=group,
        BLOCK_SIZE=k_cache.shape[2],
        HEAD_DIM=heads.head_dim,
        PADDED_DIM=padded_dim,
        ROWS=rows,
        QUERIES=queries,
        TILE=tile,
        WINDOW=window,
        SOFT_CAP=soft_cap,
        DOT=_dot_dtype(q),
        num_warps=8 if rows * padded_dim >= 128 * 128 else 4,
        num_stages=3,
    )
    return out.flatten(-2)


def attend_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    plan: AttentionPlan,
    heads: HeadShape,
    scale: float,
    *,
    window: int = 0,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """As `attend_varlen` for one query per request. A request of length 0 is padding: its row is zero.

    The launch depends on the host's lengths through `num_splits` alone, so a captured one serves all lengths up to
    those of its plan.
    """
    num_requests, num_heads, head_dim = q.shape
    padded_dim = max(16, triton.next_power_of_2(head_dim))
    splits = num_splits(num_requests, heads.num_kv_heads, max(plan.seq_lens_host), _num_cores(q.device))
    tile = _tile(q.element_size(), padded_dim)[1]
    out = torch.empty_like(q)
    # (num_requests, num_heads, splits, head_dim): each split's own mean of values, and log2 of its sum of exponentials
    means = torch.empty((num_requests, num_heads, splits, head_dim), dtype=torch.float32, device=q.device)
    log_sums = torch.empty((num_requests, num_heads, splits), dtype=torch.float32, device=q.device)
    group = num_heads // heads.num_kv_heads
    split_kernel[(num_requests, heads.num_kv_heads, splits)](
        out,
        means,
        log_sums,
        q,
        k_cache,
        v_cache,
        plan.block_tables,
        plan.seq_lens,
        sinks,
        scale,
        plan.block_tables.stride(0),
        k_cache.stride(0),
        NUM_HEADS=num_heads,
        GROUP=group,
        BLOCK_SIZE=k_cache.shape[2],
        HEAD_DIM=head_dim,
        PADDED_DIM=padded_dim,
        ROWS=max(16, triton.next_power_of_2(group)),
        TILE=tile,
        NUM_SPLITS=splits,
        WINDOW=window,
        SOFT_CAP=soft_cap,
        DOT=_dot_dtype(q),
        num_warps=4,
        num_stages=3,
    )
    if splits > 1:
        merge_kernel[(num_requests, num_heads)](
            out,
            means,
            log_sums,
            plan.seq_lens,
            HEAD_DIM=head_dim,
            PADDED_DIM=padded_dim,
            TILE=tile,
            NUM_SPLITS=splits,
            WINDOW=window,
            num_warps=4,
        )
    return out.flatten(-2)


def num_splits(num_requests: int, num_kv_heads: int, max_len: int, num_cores: int) -> int:
    """A power of two: two programs for each core of the GPU, and more where a request is very long."""
    to_fill = -(-2 * num_cores // (num_requests * num_kv_heads))
    return min(MAX_SPLITS, int(triton.next_power_of_2(max(to_fill, -(-max_len // SPLIT_TOKENS)))))


def length_bound(max_len: int) -> int:
    """The longest request for which `num_splits` says the same as for one of `max_len` tokens, for every batch."""
    return SPLIT_TOKENS * int(triton.next_power_of_2(max(1, -(-max_len // SPLIT_TOKENS))))


def _tile(element_size: int, padded_dim: int) -> tuple[int, int]:
    """Most rows of a query tile, and the tokens of a K/V tile."""
    shift = int(padded_dim > 128)
    return (128 >> shift, 64 >> shift) if element_size == 2 else (32 >> shift, 32 >> shift)


def _num_cores(device: torch.device) -> int:
    if device.type != "cuda":
        return 8  # the interpreter's tests see splits too
    return torch.cuda.get_device_properties(device).multi_processor_count


def _dot_dtype(q: Tensor) -> tl.dtype:
    """What tiles are multiplied in: their own dtype, but Triton's interpreter multiplies bf16 bits as integers."""
    if q.dtype == torch.bfloat16 and triton.knobs.runtime.interpret:
        return tl.float32
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[q.dtype]
