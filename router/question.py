"""One HTTP request in domain terms, on its way through the gateway. Knows neither HTTP nor models."""

from __future__ import annotations

from dataclasses import dataclass

from replicas.types import GenerateRequest, Prompt


@dataclass(frozen=True, slots=True)
class Question:
    """One `GenerateRequest` a choice, prompt by prompt, siblings side by side; never empty.

    All name the same model, as the client did: an id, an alias or `auto`.
    """

    requests: tuple[GenerateRequest, ...]
    tenant: str
    cache_control: str | None = None
    """The client's header."""

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
