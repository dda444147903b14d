"""The programs of paged attention, for `triton_attention.py` to launch: FlashAttention's running softmax (Dao 2023,
"FlashAttention-2") over tiles of a request's pages.

A token beyond a request's length is never read: what other owners left in a page cannot reach its softmax.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
HIDDEN = tl.constexpr(-1e30)
"""The score of a token that a query may not see. Finite: a whole tile of them leaves the running maximum a number, and
whatever is summed before the first visible token is forgotten by exp2(HIDDEN - maximum) = 0."""


@triton.jit
def _attend(
    acc,
    best,
    total,
    q,
    k_head,
    v_head,
    table,
    start,
    stop,
    positions,
    scale,
    block_stride,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    DOT: tl.constexpr,
    IS_MASKED: tl.constexpr,
):
    """The running softmax of q (rows, padded_dim) at `positions` (rows,) over cached tokens [start, stop).

    Scores are in units of log2. Without IS_MASKED every row sees every token and the range is a whole number of tiles.
    "tf32x3" concerns fp32 alone: three products of tensor cores, nearly as exact as fp32's own and many times faster.
    """
    channels = tl.arange(0, PADDED_DIM)
    is_channel = channels < HEAD_DIM
    for first in range(start, stop, TILE):
        tokens = first + tl.arange(0, TILE)
        is_held = tokens < stop
        pages = tl.load(table + tokens // BLOCK_SIZE, mask=is_held, other=0).to(tl.int64)
        offsets = pages * block_stride + (tokens % BLOCK_SIZE) * HEAD_DIM
        k_mask = is_channel[:, None] & is_held[None, :]
        k = tl.load(k_head + offsets[None, :] + channels[:, None], mask=k_mask, other=0.0).to(DOT)
        scores = tl.dot(q, k, input_precision="tf32x3") * scale
        if SOFT_CAP > 0:
            scores = SOFT_CAP * (2 * tl.sigmoid(2 * scores / SOFT_CAP) - 1)
        scores = scores * LOG2_E
        if IS_MASKED:
            is_visible = is_held[None, :] & (tokens[None, :] <= positions[:, None])
            if WINDOW > 0:
                is_visible = is_visible & (tokens[None, :] > positions[:, None] - WINDOW)
            scores = tl.where(is_visible, scores, HIDDEN)
        new_best = tl.maximum(best, tl.max(scores, 1))
        shares = tl.exp2(scores - new_best[:, None])
        kept = tl.exp2(best - new_best)
        v_mask = is_held[:, None] & is_channel[None, :]
        v = tl.load(v_head + offsets[:, None] + channels[None, :], mask=v_mask, other=0.0).to(DOT)
        total = total * kept + tl.sum(shares, 1)
        acc = acc * kept[:, None] + tl.dot(shares.to(DOT), v, input_precision="tf32x3")
        best = new_best
    return acc, best, total


@triton.jit
def _first_score(sinks, head, is_row, is_first, ROWS: tl.constexpr):
    """Where the running softmax of some rows begins: at nothing, or at the sink of their head if `is_first`."""
    best = tl.full((ROWS,), HIDDEN, tl.float32)
    total = tl.full((ROWS,), 0.0, tl.float32)
    if sinks is not None:
        sink = tl.load(sinks + head, mask=is_row, other=0.0) * LOG2_E
        best = tl.where(is_first, sink, best)
        total = tl.where(is_first, 1.0, total)
    return best, total


@triton.jit
def _request_of(query_start_loc, tile, num_requests, QUERIES: tl.constexpr):
    """The last request whose first tile is not after `tile`, by bisection."""
    low, high = 0, num_requests
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(query_start_loc + middle) // QUERIES + middle <= tile:
            low = middle
        else:
            high = middle
    return low


@triton.jit(do_not_specialize=["num_requests"])
def varlen_kernel(
    out,
    q,
    k_cache,
    v_cache,
    block_tables,
    query_start_loc,
    seq_lens,
    sinks,
    scale,
    num_requests,
    table_stride,
    block_stride,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    QUERIES: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    DOT: tl.constexpr,
):
    """Program (tile of QUERIES queries, K/V head); row r is query r // GROUP, head r % GROUP of the tile."""
    # a prompt's last tiles see most: they start first
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    request = _request_of(query_start_loc, tile, num_requests, QUERIES)
    first_row = tl.load(query_start_loc + request)
    num_queries = tl.load(query_start_loc + request + 1) - first_row
    first = (tile - (first_row // QUERIES + request)) * QUERIES
    if first >= num_queries:
        return
    seq_len = tl.load(seq_lens + request)

    rows, channels = tl.arange(0, ROWS), tl.arange(0, PADDED_DIM)
    query, head = first + rows // GROUP, kv_head * GROUP + rows % GROUP
    is_row = (rows < QUERIES * GROUP) & (query < num_queries)
    q_mask = is_row[:, None] & (channels < HEAD_DIM)[None, :]
    q_offsets = ((first_row + query).to(tl.int64) * NUM_HEADS + head)[:, None] * HEAD_DIM + channels[None, :]
    q_tile = tl.load(q + q_offsets, mask=q_mask, other=0.0).to(DOT)

    first_position = seq_len - num_queries + first
    positions = seq_len - num_queries + query
    stop = tl.minimum(seq_len, first_position + QUERIES)
    k_head = k_cache + kv_head * BLOCK_SIZE * HEAD_DIM
    v_head = v_cache + kv_head * BLOCK_SIZE * HEAD_DIM
    table = block_tables + request.to(tl.int64) * table_stride
    acc = tl.zeros((ROWS, PADDED_DIM), tl.float32)
    best, total = _first_score(sinks, head, is_row, True, ROWS)
    if WINDOW > 0:
        masked_from = tl.maximum(first_position - WINDOW + 1, 0) // TILE * TILE
    else:
        # every query of the tile sees the tokens before its first one
        masked_from = (first_position + 1) // TILE * TILE
    for is_masked in tl.static_range(2):
        if is_masked or WINDOW == 0:
            acc, best, total = _attend(
                acc,
                best,
                total,
                q_tile,
                k_head,
                v_head,
                table,
                masked_from if is_masked else 0,
                stop if is_masked else masked_from,
                positions,
                scale,
                block_stride,
                BLOCK_SIZE,
                HEAD_DIM,
                PADDED_DIM,
                TILE,
                WINDOW,
                SOFT_CAP,
                DOT,
                is_masked,
            )
    tl.store(out + q_offsets, (acc / total[:, None]).to(out.dtype.element_ty), mask=q_mask)


@triton.jit
def _split_range(seq_len, num_splits, TILE: tl.constexpr, WINDOW: tl.constexpr):
    """The first token that a request's newest query reads, in whole tiles, and the tokens of one split."""
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(seq_len - WINDOW, 0) // TILE * TILE
    return begin, tl.cdiv(tl.cdiv(seq_len - begin, num_splits), TILE) * TILE


@triton.jit(do_not_specialize=["num_splits"])
def split_kernel(
    out,
    means,
    log_sums,
    q,
    k_cache,
    v_cache,
    block_tables,
    seq_lens,
    sinks,
    scale,
    num_splits,
    table_stride,
    block_stride,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    DOT: tl.constexpr,
):
    """Program (request, K/V head, split); a row is a query head of that K/V head. With IS_WHOLE there is one split, and
    it writes the answer."""
    request, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    seq_len = tl.load(seq_lens + request)
    begin, length = _split_range(seq_len, num_splits, TILE, WINDOW)
    start = begin + split * length
    stop = tl.minimum(start + length, seq_len)
    if not IS_WHOLE and start >= stop:
        return

    rows, channels = tl.arange(0, ROWS), tl.arange(0, PADDED_DIM)
    head, is_row = kv_head * GROUP + rows, rows < GROUP
    mask = is_row[:, None] & (channels < HEAD_DIM)[None, :]
    row = request.to(tl.int64) * NUM_HEADS + head
    q_offsets = row[:, None] * HEAD_DIM + channels[None, :]
    q_tile = tl.load(q + q_offsets, mask=mask, other=0.0).to(DOT)
    best, total = _first_score(sinks, head, is_row, split == 0, ROWS)
    acc, best, total = _attend(
        tl.zeros((ROWS, PADDED_DIM), tl.float32),
        best,
        total,
        q_tile,
        k_cache + kv_head * BLOCK_SIZE * HEAD_DIM,
        v_cache + kv_head * BLOCK_SIZE * HEAD_DIM,
        block_tables + request.to(tl.int64) * table_stride,
        start,
        stop,
        tl.full((ROWS,), 0, tl.int32) + seq_len - 1,
        scale,
        block_stride,
        BLOCK_SIZE,
        HEAD_DIM,
        PADDED_DIM,
        TILE,
        WINDOW,
        SOFT_CAP,
        DOT,
        True,
    )
    total = tl.where(total > 0, total, 1.0)
    mean = acc / total[:, None]
    if IS_WHOLE:
        tl.store(out + q_offsets, mean.to(out.dtype.element_ty), mask=mask)
    else:
        slot = row * num_splits + split
        tl.store(means + slot[:, None] * HEAD_DIM + channels[None, :], mean, mask=mask)
        tl.store(log_sums + slot, best + tl.log2(total), mask=is_row)


@triton.jit
def merge_kernel(
    out,
    means,
    log_sums,
    seq_lens,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TILE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Program (request, query head): its splits' means, weighted by their sums of exponentials."""
    request = tl.program_id(0)
    row = request.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    seq_len = tl.load(seq_lens + request)
    begin, length = _split_range(seq_len, NUM_SPLITS, TILE, WINDOW)
    splits, channels = tl.arange(0, NUM_SPLITS), tl.arange(0, PADDED_DIM)
    is_used, is_channel = splits * length < seq_len - begin, channels < HEAD_DIM
    log_sum = tl.load(log_sums + row * NUM_SPLITS + splits, mask=is_used, other=HIDDEN)
    share = tl.where(is_used, tl.exp2(log_sum - tl.max(log_sum, 0)), 0.0)
    total = tl.sum(share, 0)
    total = tl.where(total > 0, total, 1.0)
    offsets = (row * NUM_SPLITS + splits)[:, None] * HEAD_DIM + channels[None, :]
    mean = tl.load(means + offsets, mask=is_used[:, None] & is_channel[None, :], other=0.0)
    merged = tl.sum(mean * share[:, None], 0) / total
    tl.store(out + row * HEAD_DIM + channels, merged.to(out.dtype.element_ty), mask=is_channel)
