"""What an operator may set about the gateway: frozen values, read by nobody but the constructors they are given to.

Knows neither the YAML they come from (`cluster/config.py`) nor the environment.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key is known by its SHA-256 (64 hex digits) only; `tenant` names whom it admits."""

    sha256: str
    tenant: str

    def __post_init__(self) -> None:
        if len(self.sha256) != 64 or any(c not in "0123456789abcdef" for c in self.sha256):
            raise ValueError(f"api key of tenant {self.tenant!r}: sha256 must be 64 lower-case hex digits")
        if not self.tenant:
            raise ValueError("api key: tenant must not be empty")


@dataclass(frozen=True, slots=True)
class FailoverSettings:
    """How stubbornly a stream is resumed when its replica is lost.

    The waits double from `first_wait_s` to `max_wait_s`. With the defaults an answer that has not begun is given up
    after about five seconds without a replica, one that has begun after about forty: longer than a lone replica takes
    to be replaced. An attempt that brought at least one token starts the count afresh.

    `max_losses` bounds what one request may cost the cluster: nobody knows whether the replicas that were lost under
    it fell by chance or by the request itself. Waiting for a deployment that has no replica costs none.
    """

    max_attempts_before_first_token: int = 8
    max_attempts_amid_answer: int = 25
    max_losses: int = 5
    first_wait_s: float = 0.05
    max_wait_s: float = 2.0


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    api_keys: tuple[ApiKey, ...] = ()
    """Empty: no authentication, everybody is the tenant `default`."""
    max_concurrent: int = 256
    """Requests in work at once; a stream counts until its last byte."""
    max_queued: int = 1024
    """Requests that may wait for one of those places; the next gets 429."""
    max_body_bytes: int = 8 * 1024 * 1024
    embedder: str | None = None
    """The model id behind /v1/embeddings: the embedder of the semantic cache."""
    cache_sampled: bool = False
    """Answers drawn at a temperature above 0 may be cached, too."""
    expected_completion_tokens: int = 256
    """Of an answer whose `max_tokens` is larger or absent; used to predict cost before the answer exists."""
    stale_heartbeat_s: float = 30.0
    """A replica whose step loop was silent for longer takes no `auto` request."""
    failover: FailoverSettings = field(default_factory=FailoverSettings)
