"""The largest score and the Gumbel-max draw of rows, in Triton: one launch and one copy to the host each.

A row is cut into tiles, so that one row keeps a whole GPU busy; a program writes its tile's winner, and the host takes
the best of a row's few tiles. Keys are computed in double precision as in `gumbel.py`, so that tokens differ from the
reference's only where two keys do in their last bits.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from replicas.engine.kernels import GumbelDraws

_MAX_TILE = 8192
_DRAW_TILE = 2048


def max_of_rows(scores: Tensor) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Of scores (num_rows, vocab_size) fp32 each row's largest, NaN if any is, and its lowest token id."""
    num_rows, vocab_size = scores.shape
    num_tiles = triton.cdiv(vocab_size, _MAX_TILE)
    winners = torch.empty((num_rows, num_tiles), dtype=torch.int64, device=scores.device)
    _max_kernel[(num_rows, num_tiles)](
        winners, scores, vocab_size, scores.stride(0), NUM_TILES=num_tiles, TILE=_MAX_TILE, num_warps=8
    )
    packed = winners.cpu().numpy().max(axis=1)
    ordered = (packed >> 32).astype(np.int32)
    best = (ordered ^ (ordered >> 31 & 0x7FFFFFFF)).view(np.float32)
    return best, 0x7FFFFFFF - (packed & 0xFFFFFFFF)


def draw_of_rows(scores: Tensor, draws: GumbelDraws) -> NDArray[np.int64]:
    """scores (num_rows, vocab_size) fp32 -> one token id per draw."""
    num_draws, vocab_size = len(draws.rows), scores.shape[1]
    num_tiles = triton.cdiv(vocab_size, _DRAW_TILE)
    # (2, num_draws, num_tiles): keys' bits, then token ids, so that one copy brings both
    winners = torch.empty((2, num_draws, num_tiles), dtype=torch.int64, device=scores.device)
    _draw_kernel[(num_draws, num_tiles)](
        winners,
        scores,
        _columns(draws).to(scores.device, non_blocking=True),
        vocab_size,
        scores.stride(0),
        num_draws,
        NUM_TILES=num_tiles,
        TILE=_DRAW_TILE,
        num_warps=4,
    )
    keys, token_ids = winners.cpu().numpy()
    # the first of equal keys is the lowest id: tiles stand in their order
    best = keys.view(np.float64).argmax(axis=1)
    drawn: NDArray[np.int64] = token_ids[np.arange(num_draws), best]
    return drawn


def _columns(draws: GumbelDraws) -> Tensor:
    """(6, num_draws) int64 in one block: rows, seeds, positions, and the bits of best, temperature, threshold."""
    columns = np.empty((6, len(draws.rows)), np.int64)
    columns[0], columns[1], columns[2] = draws.rows, draws.seed.view(np.int64), draws.position
    for i, values in enumerate((draws.best, draws.temperature, draws.threshold)):
        columns[3 + i] = values.astype(np.float32, copy=False).view(np.int32)
    return torch.from_numpy(columns)


@triton.jit
def _max_kernel(winners, scores, vocab_size, row_stride, NUM_TILES: tl.constexpr, TILE: tl.constexpr):
    """Program (row, tile). A winner is one integer that orders as (score, lower id first): the score's bits, made
    monotonic, over the complement of the id."""
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ids = tile * TILE + tl.arange(0, TILE)
    x = tl.load(scores + row * row_stride + ids, mask=ids < vocab_size, other=float("-inf"))
    x = tl.where(x == 0, 0.0, x)  # -0 equals 0, whose bits are larger
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(x != x, 0x7FC00000, bits)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    packed = (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - ids).to(tl.int64)
    tl.store(winners + row * NUM_TILES + tile, tl.max(packed, 0))


@triton.jit(do_not_specialize=["num_draws"])
def _draw_kernel(
    winners, scores, columns, vocab_size, row_stride, num_draws, NUM_TILES: tl.constexpr, TILE: tl.constexpr
):
    """Program (draw, tile). Philox counter (token id // 4, 0, position), key: the seed; word id % 4 is the token's."""
    draw, tile = tl.program_id(0), tl.program_id(1)
    row = tl.load(columns + draw)
    seed = tl.load(columns + num_draws + draw)
    position = tl.load(columns + 2 * num_draws + draw)
    best = tl.load(columns + 3 * num_draws + draw).to(tl.int32).to(tl.float32, bitcast=True)
    temperature = tl.load(columns + 4 * num_draws + draw).to(tl.int32).to(tl.float32, bitcast=True)
    threshold = tl.load(columns + 5 * num_draws + draw).to(tl.int32).to(tl.float32, bitcast=True)

    blocks = tile * (TILE // 4) + tl.arange(0, TILE // 4)
    zeros = tl.full((TILE // 4,), 0, tl.int32)
    low, high = zeros + position.to(tl.int32), zeros + (position >> 32).to(tl.int32)
    w0, w1, w2, w3 = tl.philox(seed, blocks, zeros, low, high)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))

    ids = tile * TILE + tl.arange(0, TILE)
    x = tl.load(scores + row * row_stride + ids, mask=ids < vocab_size, other=float("-inf"))
    scaled = tl.div_rn(x - best, tl.full((TILE,), 0.0, tl.float32) + temperature)
    uniform = (words.to(tl.float64) + 0.5) * 2.3283064365386963e-10  # 2**-32
    keys = scaled.to(tl.float64) - tl.log(-tl.log(uniform))
    keys = tl.where((scaled >= threshold) & (ids < vocab_size), keys, float("-inf"))
    key, index = tl.max(keys, 0, return_indices=True)
    place = draw * NUM_TILES + tile
    tl.store(winners + place, key.to(tl.int64, bitcast=True))
    tl.store(winners + num_draws * NUM_TILES + place, (tile * TILE + index).to(tl.int64))
