"""Which model answers: a pure choice from candidates and their predicted quality. No clock, no I/O, no model calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Candidate:
    """One model as it stands when the request arrives."""

    model: str
    quality: float
    """Predicted probability that it answers well, in [0, 1]."""
    cost_usd: float | None
    """Predicted cost of this request; None: the model has no price, and is never the cheapest."""
    is_available: bool
    """A replica is running and its queue takes the request."""
    fits: bool
    """Context and features suffice."""


@dataclass(frozen=True, slots=True)
class Route:
    model: str
    reason: str
    """A short token for `x-millrace-route-reason`, e.g. `requested`, `fixed`, `cheapest-capable`, `fallback`."""
    fallbacks: tuple[str, ...] = ()
    """Models to try next, in order, should this one be unavailable."""


class RoutingPolicy(Protocol):
    def choose(self, candidates: Sequence[Candidate]) -> Route:
        """Raises `NoCapableModel` where no candidate can take the request."""
        ...
