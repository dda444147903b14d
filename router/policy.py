"""Which model answers: a pure choice from candidates and their predicted quality. No clock, no I/O, no model calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from replicas.types import InvalidRequest, MillraceError, ReplicaUnavailable


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
    is_substitute: bool = False
    """Another model would have been chosen, had it been available."""


class RoutingPolicy(Protocol):
    def choose(self, candidates: Sequence[Candidate]) -> Route:
        """Raises `NoCapableModel` where no candidate can take the request."""
        ...


class NoCapableModel(MillraceError):
    """No candidate can take the request; which of the two below says whose fault it is."""


class NoModelFits(NoCapableModel, InvalidRequest):
    """The request is too large for every model."""


class NoModelAvailable(NoCapableModel, ReplicaUnavailable):
    """Some model would do, but none of those has a running replica."""


@dataclass(frozen=True, slots=True)
class FixedPolicy:
    """Always the same model; while it cannot take the request, the first of `fallbacks` that can."""

    model: str
    fallbacks: tuple[str, ...] = ()

    def choose(self, candidates: Sequence[Candidate]) -> Route:
        usable = {candidate.model for candidate in usable_candidates(candidates)}
        fitting = {candidate.model for candidate in candidates if candidate.fits}
        wanted = [model for model in (self.model, *self.fallbacks) if model in fitting]
        order = [model for model in wanted if model in usable]
        if not order:
            raise NoModelAvailable(f"The model {self.model!r} is not available now.")
        reason = "fixed" if order[0] == self.model else "fallback"
        return Route(order[0], reason, tuple(order[1:]), is_substitute=order[0] != wanted[0])


@dataclass(frozen=True, slots=True)
class CheapestCapablePolicy:
    """The cheapest model whose predicted quality clears the target; where none does, the best there is.

    Models without a price come after all priced ones that clear the target. The rest of the order are the fallbacks.
    """

    quality_target: float

    def choose(self, candidates: Sequence[Candidate]) -> Route:
        order = self._order(usable_candidates(candidates))
        wanted = self._order([candidate for candidate in candidates if candidate.fits])[0]
        reason = "cheapest-capable" if order[0].quality >= self.quality_target else "best-quality"
        models = [candidate.model for candidate in order]
        return Route(models[0], reason, tuple(models[1:]), is_substitute=models[0] != wanted.model)

    def _order(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        capable = sorted((c for c in candidates if c.quality >= self.quality_target), key=_by_cost)
        others = sorted((c for c in candidates if c.quality < self.quality_target), key=_by_quality)
        return [*capable, *others]


def usable_candidates(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that fit and are available, never empty. Raises `NoModelFits` or `NoModelAvailable`."""
    fitting = [candidate for candidate in candidates if candidate.fits]
    if not fitting:
        raise NoModelFits("The prompt and max_tokens together exceed the context of every model.", "max_tokens")
    usable = [candidate for candidate in fitting if candidate.is_available]
    if not usable:
        raise NoModelAvailable("No model that could take this request is available now.")
    return usable


def _by_cost(candidate: Candidate) -> tuple[bool, float, float, str]:
    unpriced = candidate.cost_usd is None
    return (unpriced, candidate.cost_usd or 0.0, -candidate.quality, candidate.model)


def _by_quality(candidate: Candidate) -> tuple[float, bool, float, str]:
    unpriced = candidate.cost_usd is None
    return (-candidate.quality, unpriced, candidate.cost_usd or 0.0, candidate.model)
