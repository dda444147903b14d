"""Counter-based random numbers: Philox4x32-10. A number is a pure function of (key, counter), so it can be drawn
anywhere, in any order, any number of times. Knows nothing about logits; `sampler.py` decides what a counter means.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC '11, section 3.3 and table 2.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

IntArray = TypeVar("IntArray", NDArray[np.int64], torch.Tensor)
"""32-bit words held in int64, as numpy arrays or as tensors: the arithmetic is the same, bit for bit."""

WORDS_PER_BLOCK = 4

_NUM_ROUNDS = 10
_MULTIPLIER_0 = 0xD2511F53
_MULTIPLIER_1 = 0xCD9E8D57
_WEYL_0 = 0x9E3779B9  # golden ratio
_WEYL_1 = 0xBB67AE85  # sqrt(3) - 1
_LOW_32 = 0xFFFFFFFF


def philox4x32(
    counter: tuple[IntArray, IntArray, IntArray, IntArray], key: tuple[IntArray, IntArray]
) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    """Four random 32-bit words for every counter block; all arguments broadcast, each word is in [0, 2**32).

    A product of two 32-bit words overflows int64 into its sign, which two's complement undoes: the low half is
    masked out, and the arithmetic shift that gives the high half is masked as well.
    """
    k0, k1 = key
    zeros = 0 * (counter[0] + counter[1] + counter[2] + counter[3] + k0 + k1)
    # In the full shape, so that the rounds can work in place: this is bound by memory, not by arithmetic.
    c0, c1, c2, c3 = (word + zeros for word in counter)
    for _ in range(_NUM_ROUNDS):
        product_0 = c0 * _MULTIPLIER_0
        product_1 = c2 * _MULTIPLIER_1
        high_0 = product_0 >> 32
        high_1 = product_1 >> 32
        for high, word, subkey in ((high_1, c1, k0), (high_0, c3, k1)):
            high &= _LOW_32
            high ^= word
            high ^= subkey
        product_0 &= _LOW_32
        product_1 &= _LOW_32
        c0, c1, c2, c3 = high_1, product_1, high_0, product_0
        k0 = (k0 + _WEYL_0) & _LOW_32
        k1 = (k1 + _WEYL_1) & _LOW_32
    return c0, c1, c2, c3


def split_words(values: NDArray[np.int64] | NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Low and high 32-bit words of 64-bit integers, as `philox4x32` takes them. Same shape as `values`."""
    bits = values.astype(np.uint64, copy=False)
    return (bits & np.uint64(_LOW_32)).astype(np.int64), (bits >> np.uint64(32)).astype(np.int64)
