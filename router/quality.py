"""How likely a model answers a prompt well: a first estimate from the catalogue's prior and the look of the prompt.

It reads no model and was fitted to no data: it only says that long, numeric, technical and many-step prompts are
harder, and that hard prompts cost weak models more than strong ones. A calibrated predictor over the embedding
(`QualityEstimator.estimate` already receives it) takes its place later.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

TYPICAL_DIFFICULTY = 0.25
"""The difficulty at which a model's quality is its prior."""

STEEPNESS = 3.0
"""How fast quality falls with difficulty: a prior of 0.5 becomes 0.84 for the easiest prompt, 0.1 for the hardest."""

MAX_CHARS_READ = 8192

CODE = re.compile(r"```|\bdef \w|\bclass \w|#include|=>|\{\s*$|;\s*$|</\w+>|\bSELECT\b|\b\w+\(\)", re.MULTILINE)
MULTI_STEP = re.compile(
    r"\b(?:step[- ]by[- ]step|first|then|finally|prove|derive|compare|contrast|explain why|analy[sz]e|design|"
    r"implement|refactor|debug|optimi[sz]e|trade-?offs?|calculate|solve|justify|plan)\b",
    re.IGNORECASE,
)


class QualityEstimator(Protocol):
    def estimate(self, prior: float, text: str, embedding: Sequence[float] | None) -> float:
        """Predicted probability in [0, 1] that a model of that prior answers `text` well.
        `embedding` is the cache's, of the last user turn, where it was computed.
        """
        ...


@dataclass(frozen=True, slots=True)
class Features:
    num_chars: int
    digit_share: float
    num_code_marks: int
    num_step_marks: int


class FirstEstimate:
    """prior ** (0.25 + 3 × difficulty): increasing in the prior, decreasing in difficulty, never reordering models."""

    def estimate(self, prior: float, text: str, embedding: Sequence[float] | None) -> float:
        return quality_at(prior, difficulty(features_of(text)))


def quality_at(prior: float, difficulty: float) -> float:
    assert 0.0 <= prior <= 1.0, f"prior {prior} outside [0, 1]"
    assert 0.0 <= difficulty <= 1.0, f"difficulty {difficulty} outside [0, 1]"
    if prior == 0.0:
        return 0.0
    exponent = 1.0 + STEEPNESS * (difficulty - TYPICAL_DIFFICULTY)
    return float(prior**exponent)


def difficulty(features: Features) -> float:
    """In [0, 1), smooth in every feature: each saturates on its own, then they combine like independent hurdles."""
    hurdles = (
        0.45 * _saturate(features.num_chars, 2000.0),
        0.50 * _saturate(features.digit_share, 0.15),
        0.50 * _saturate(features.num_code_marks, 3.0),
        0.60 * _saturate(features.num_step_marks, 2.0),
    )
    return 1.0 - math.prod(1.0 - hurdle for hurdle in hurdles)


def features_of(text: str) -> Features:
    """Of a prompt's text; a very long one is judged by its length and its end, where the question usually stands."""
    read = text[-MAX_CHARS_READ:]
    return Features(
        num_chars=len(text),
        digit_share=sum(map(str.isdigit, read)) / max(1, len(read)),
        num_code_marks=len(CODE.findall(read)),
        num_step_marks=len(MULTI_STEP.findall(read)),
    )


def _saturate(value: float, half: float) -> float:
    """0 at 0, one half at `half`, towards 1 beyond."""
    return value / (value + half)
