"""The contract of the semantic cache: what a gateway asks of it and what comes back. No HTTP, no torch, no Ray.

Who asks and what is asked stay apart: a query carries an exact `partition` (tenant, model class, system prompt,
history, tools, parameters) and the text that similarity may compare inside it, and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class CacheQuery:
    """One question, ready to be looked up; made by `cache.policy.plan`."""

    exact_key: str
    """Digest of everything that shapes the answer, partition and text included."""
    partition: str
    """Digest of everything but the last user turn."""
    text: str | None
    """The last user turn; None: only an exact match may answer."""
    max_age_s: float | None = None
    """The client accepts nothing older (`cache-control: max-age`)."""
    may_read: bool = True
    """False: `no-cache`, the answer is made afresh and stored."""
    may_store: bool = True
    """False: `no-store`."""


@dataclass(frozen=True, slots=True)
class CachedAnswer:
    """A finished answer (`finish_reason` is always "stop")."""

    text: str
    model: str
    num_prompt_tokens: int
    num_completion_tokens: int
    cost_usd: float | None
    """What making it cost; None: unknown."""
    stop_reason: str | int | None = None


@dataclass(frozen=True, slots=True)
class CacheHit:
    answer: CachedAnswer
    kind: Literal["hit-exact", "hit-semantic"]
    similarity: float
    age_s: float


@dataclass(frozen=True, slots=True)
class CacheMiss:
    flight: str | None = None
    """The asker leads: others with the same exact key wait for its `store` or `abandon` of this flight."""
    embedding: tuple[float, ...] | None = None
    """Of `CacheQuery.text`, L2-normalised, where it was computed; the router prices quality with it."""


LookupResult = CacheHit | CacheMiss

FLIGHT_LEASE_S = 15.0
"""How long a leader that is not heard of keeps its flight. Who holds flights renews them a few times in each lease."""
