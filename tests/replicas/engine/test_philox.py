"""Philox against its published known answers and against a transcription of the paper in Python integers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from replicas.engine.philox import philox4x32, split_words

# Random123's kat_vectors, the lines `philox4x32 10`: counter, key, answer.
KNOWN_ANSWERS = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]

word = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(counter: list[int], key: list[int], answer: list[int]) -> None:
    assert philox_numpy(counter, key) == answer
    assert philox_torch(counter, key) == answer


@settings(deadline=None, derandomize=True)
@given(st.lists(word, min_size=4, max_size=4), st.lists(word, min_size=2, max_size=2))
def test_numpy_torch_and_the_paper_agree(counter: list[int], key: list[int]) -> None:
    expected = philox_of_the_paper(counter, key)
    assert philox_numpy(counter, key) == expected
    assert philox_torch(counter, key) == expected


@settings(deadline=None, derandomize=True)
@given(st.integers(0, 2**64 - 1))
def test_split_words(value: int) -> None:
    low, high = split_words(np.array([value], np.uint64))
    assert (int(high[0]) << 32) | int(low[0]) == value


def test_arguments_broadcast() -> None:
    blocks = np.arange(5, dtype=np.int64)[None, :]
    keys = np.array([[3], [4]], np.int64)
    zero = np.zeros((1, 1), np.int64)
    words = philox4x32((blocks, zero, zero, zero), (keys, zero))
    for row in range(2):
        for block in range(5):
            alone = philox_of_the_paper([block, 0, 0, 0], [3 + row, 0])
            assert [int(w[row, block]) for w in words] == alone


def philox_numpy(counter: list[int], key: list[int]) -> list[int]:
    c0, c1, c2, c3 = (np.array([c], np.int64) for c in counter)
    k0, k1 = (np.array([k], np.int64) for k in key)
    return [int(w[0]) for w in philox4x32((c0, c1, c2, c3), (k0, k1))]


def philox_torch(counter: list[int], key: list[int]) -> list[int]:
    c0, c1, c2, c3 = (torch.tensor([c]) for c in counter)
    k0, k1 = (torch.tensor([k]) for k in key)
    return [int(w[0]) for w in philox4x32((c0, c1, c2, c3), (k0, k1))]


def philox_of_the_paper(counter: list[int], key: list[int]) -> list[int]:
    left_0, right_0, left_1, right_1 = counter[1], counter[0], counter[3], counter[2]
    k0, k1 = key
    for _ in range(10):
        high_0, low_0 = divmod(right_0 * 0xD2511F53, 2**32)
        high_1, low_1 = divmod(right_1 * 0xCD9E8D57, 2**32)
        right_0, left_0, right_1, left_1 = high_1 ^ left_0 ^ k0, low_1, high_0 ^ left_1 ^ k1, low_0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [right_0, left_0, right_1, left_1]
