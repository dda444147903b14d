"""Gumbel-max over whole rows of scores in plain torch: the oracle of the fused kernels.

A token's random number is a pure function of (seed, position, token id), so a draw does not depend on the batch.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from replicas.engine.kernels import GumbelDraws
from replicas.engine.philox import WORDS_PER_BLOCK, philox4x32, split_words

_CHUNK_ELEMENTS = {"cpu": 1 << 16, "cuda": 1 << 25}
"""Elements of (rows, vocab) that one pass touches: about the CPU's cache, the GPU's spare memory."""


def draw_of_rows(scores: Tensor, draws: GumbelDraws) -> NDArray[np.int64]:
    """scores (num_samples, vocab_size) fp32 -> one token id per draw."""
    vocab_size = scores.shape[1]
    token_ids = np.empty(len(draws.rows), np.int64)
    rows_per_chunk = max(1, _CHUNK_ELEMENTS.get(scores.device.type, 1 << 16) // vocab_size)
    for start in range(0, len(token_ids), rows_per_chunk):
        chunk = slice(start, start + rows_per_chunk)
        some = scores[torch.from_numpy(draws.rows[chunk]).to(scores.device)]
        scaled = (some - _column(draws.best[chunk], scores)) / _column(draws.temperature[chunk], scores)
        words = _words(draws.seed[chunk], draws.position[chunk], vocab_size, scores.device)
        keys = words.add_(0.5).mul_(2.0**-32).log_().neg_().log_().neg_().add_(scaled)
        keys.masked_fill_(scaled < _column(draws.threshold[chunk], scores), -torch.inf)
        token_ids[chunk] = keys.argmax(dim=-1).cpu().numpy()
    return token_ids


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
