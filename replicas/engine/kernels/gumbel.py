"""Draws from whole rows of scores in plain torch: the oracle of the fused kernels.

A token's random number is a pure function of (seed, position, token id), so a draw does not depend on the batch.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from replicas.engine.kernels import GumbelDraws, TopOfRows
from replicas.engine.philox import WORDS_PER_BLOCK, philox4x32, split_words

_CHUNK_ELEMENTS = {"cpu": 1 << 16, "cuda": 1 << 25}
"""Elements of (rows, vocab) that one pass touches: about the CPU's cache, the GPU's spare memory."""


def draw_of_rows(scores: Tensor, draws: GumbelDraws) -> NDArray[np.int64]:
    """scores (num_samples, vocab_size) fp32 -> one token id per draw."""
    token_ids = np.empty(len(draws.rows), np.int64)
    for chunk in _chunks(scores, draws):
        scaled = _scaled(scores, draws, chunk)
        words = _words(draws.seed[chunk], draws.position[chunk], scores.shape[1], scores.device)
        keys = words.add_(0.5).mul_(2.0**-32).log_().neg_().log_().neg_().add_(scaled)
        keys.masked_fill_(scaled < _column(draws.threshold[chunk], scores), -torch.inf)
        token_ids[chunk] = keys.argmax(dim=-1).cpu().numpy()
    return token_ids


def top_of_rows(scores: Tensor, draws: GumbelDraws, width: int) -> TopOfRows:
    """The mass is summed in float64: the order of the sum, which may depend on the batch, then decides nothing."""
    shape = (len(draws.rows), width)
    top = TopOfRows(np.empty(shape, np.float32), np.empty(shape, np.int64), np.empty(shape[0], np.float64))
    for chunk in _chunks(scores, draws):
        scaled = _scaled(scores, draws, chunk)
        values, token_ids = scaled.topk(width, dim=-1)
        top.scores[chunk], top.token_ids[chunk] = values.cpu().numpy(), token_ids.cpu().numpy()
        mass = scaled.exp().mul_(scaled >= _column(draws.threshold[chunk], scores))
        top.mass[chunk] = mass.sum(dim=-1, dtype=torch.float64).cpu().numpy()
    return top


def _chunks(scores: Tensor, draws: GumbelDraws) -> Iterator[slice]:
    size = max(1, _CHUNK_ELEMENTS.get(scores.device.type, 1 << 16) // scores.shape[1])
    for start in range(0, len(draws.rows), size):
        yield slice(start, start + size)


def _scaled(scores: Tensor, draws: GumbelDraws, chunk: slice) -> Tensor:
    """(draws in the chunk, vocab_size): the largest score becomes 0, so that no temperature overflows and min-p is a
    plain threshold."""
    some = scores[torch.from_numpy(draws.rows[chunk]).to(scores.device)]
    return (some - _column(draws.best[chunk], scores)) / _column(draws.temperature[chunk], scores)


def _column(values: NDArray[np.float32], scores: Tensor) -> Tensor:
    return torch.from_numpy(values).to(scores.device)[:, None]


def _words(seed: NDArray[np.uint64], position: NDArray[np.int64], vocab_size: int, device: torch.device) -> Tensor:
    """The random word of every token id, as float64: (num_draws, vocab_size)."""
    blocks = np.arange(-(-vocab_size // WORDS_PER_BLOCK), dtype=np.int64)[None, :]
    (seed_low, seed_high), (position_low, position_high) = split_words(seed), split_words(position)
    counter = (blocks, np.zeros((1, 1), np.int64), position_low[:, None], position_high[:, None])
    key = (seed_low[:, None], seed_high[:, None])
    if device.type == "cpu":  # numpy's integer loops are twice as fast as torch's there
        words = [torch.from_numpy(word) for word in philox4x32(counter, key)]
    else:
        c0, c1, c2, c3 = (torch.from_numpy(word).to(device) for word in counter)
        k0, k1 = (torch.from_numpy(word).to(device) for word in key)
        words = list(philox4x32((c0, c1, c2, c3), (k0, k1)))
    by_token = torch.empty((*words[0].shape, WORDS_PER_BLOCK), dtype=torch.float64, device=device)
    for i, word in enumerate(words):
        by_token[..., i] = word
    return by_token.reshape(len(seed), -1)[:, :vocab_size]
