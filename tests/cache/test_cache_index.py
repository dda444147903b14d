"""The index against brute force in numpy, under random additions and removals."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.index import VectorIndex

DIM = 8
Vectors = npt.NDArray[np.float32]


def random_vector(rng: np.random.Generator) -> Vectors:
    vector = rng.standard_normal(DIM).astype(np.float32)
    return np.asarray(vector / np.linalg.norm(vector), np.float32)


def brute_force(
    held: dict[int, tuple[str, Vectors]], partition: str, vector: Vectors, k: int
) -> list[tuple[int, float]]:
    scored = [(id, float(row @ vector)) for id, (owner, row) in held.items() if owner == partition]
    return sorted(scored, key=lambda item: -item[1])[:k]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), num_steps=st.integers(1, 60), num_partitions=st.integers(1, 5))
def test_search_agrees_with_brute_force(seed: int, num_steps: int, num_partitions: int) -> None:
    rng = np.random.default_rng(seed)
    index, held = VectorIndex(DIM), dict[int, tuple[str, Vectors]]()
    for id in range(num_steps):
        if held and rng.random() < 0.4:
            doomed = [int(key) for key in rng.choice(list(held), size=rng.integers(1, len(held) + 1), replace=False)]
            index.remove(doomed)
            for key in doomed:
                del held[key]
        partition = f"p{rng.integers(num_partitions)}"
        held[id] = (partition, random_vector(rng))
        index.add(id, *held[id])

        asked, question, k = f"p{rng.integers(num_partitions)}", random_vector(rng), int(rng.integers(1, 6))
        found, expected = index.search(asked, question, k), brute_force(held, asked, question, k)
        assert [id for id, _ in found] == [id for id, _ in expected]
        np.testing.assert_allclose([s for _, s in found], [s for _, s in expected], atol=1e-5)
        assert index.ids() == set(held)
        assert len(index) == len(held)
        assert index.num_partitions == len({owner for owner, _ in held.values()})
        assert index.size(asked) == sum(owner == asked for owner, _ in held.values())


def test_an_empty_partition_gives_its_memory_back() -> None:
    index, rng = VectorIndex(DIM), np.random.default_rng(0)
    for id in range(100):
        index.add(id, f"p{id % 10}", random_vector(rng))
    index.remove(range(100))
    assert (len(index), index.num_partitions, index.ids()) == (0, 0, set())
    assert index.search("p1", random_vector(rng), 3) == []


def test_misuse_is_refused() -> None:
    index, rng = VectorIndex(DIM), np.random.default_rng(0)
    index.add(1, "p", random_vector(rng))
    with pytest.raises(AssertionError, match="already indexed"):
        index.add(1, "q", random_vector(rng))
    with pytest.raises(AssertionError, match="expected a vector of 8"):
        index.search("p", np.ones(3, np.float32), 1)
