"""Whether a neighbour that passed the gate is near enough for its answer to be served. Pure; knows no text.

Issue 4's learned, per-entry estimate becomes a second implementation of `Decision`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class Decision(Protocol):
    @property
    def min_similarity(self) -> float:
        """No neighbour below this cosine is ever served: the search need not look at it."""
        ...

    def accepts(self, key: str, similarity: float) -> bool:
        """May the answer stored under `key` serve a question at this cosine similarity?"""
        ...


@dataclass(frozen=True, slots=True)
class ThresholdDecision:
    """One cosine threshold for all entries. Right for no entry in particular, hence the gate in front of it."""

    threshold: float = 0.94

    def __post_init__(self) -> None:
        if not 0.0 < self.threshold <= 1.0:
            raise ValueError(f"cache threshold must lie in (0, 1], not {self.threshold}")

    @property
    def min_similarity(self) -> float:
        return self.threshold

    def accepts(self, key: str, similarity: float) -> bool:
        return similarity >= self.threshold
