"""One HTTP request in domain terms, on its way through the gateway. Knows neither HTTP nor models."""

from __future__ import annotations

from dataclasses import dataclass, replace

from replicas.types import GenerateRequest, Prompt


@dataclass(frozen=True, slots=True)
class Question:
    """One `GenerateRequest` a choice, prompt by prompt, siblings side by side; never empty.

    All name the same model, as the client did: an id, an alias or `auto`.
    """

    requests: tuple[GenerateRequest, ...]
    tenant: str
    http_request_id: str = ""
    """Under which the logs have the client's request."""
    cache_control: str = ""
    """The client's header."""
    has_drawn_seed: bool = False
    """The client gave no seed, so any draw answers it; the requests carry one that the gateway drew."""

    @property
    def cache_request(self) -> GenerateRequest:
        """The first request as the cache knows it: without the seed that nobody asked for."""
        first = self.requests[0]
        # -1 is no seed a client could give (they are unsigned), so the two kinds never meet
        return replace(first, sampling=replace(first.sampling, seed=-1)) if self.has_drawn_seed else first

    @property
    def model(self) -> str:
        return self.requests[0].model

    @property
    def num_siblings(self) -> int:
        return self.requests[0].num_siblings

    @property
    def max_tokens(self) -> int | None:
        return self.requests[0].sampling.max_tokens

    @property
    def prompts(self) -> list[Prompt]:
        """Each prompt once: siblings share theirs."""
        return [request.prompt for request in self.requests[:: self.num_siblings]]
