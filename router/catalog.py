"""Which models the endpoint offers, what they cost and how good they are said to be. Frozen; knows no replica."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from replicas.types import InvalidRequest, ModelNotFound

AUTO = "auto"
"""The model name that leaves the choice to the routing policy."""


@dataclass(frozen=True, slots=True)
class Price:
    """US dollars per million tokens, in three buckets that never overlap.

    `cached_usd` is for prompt tokens whose KV was found in the prefix cache; None: no discount, they cost
    `prompt_usd`. A model without a price has no `Price` at all: unknown is not free.
    """

    prompt_usd: float
    completion_usd: float
    cached_usd: float | None = None

    def __post_init__(self) -> None:
        for name in ("prompt_usd", "completion_usd", "cached_usd"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value < float("inf"):
                raise ValueError(f"price: {name} must be a finite number of dollars, 0 or more, not {value!r}")


@dataclass(frozen=True, slots=True)
class ModelEntry:
    id: str
    """What `/v1/models` shows and requests name."""
    price: Price | None = None
    quality: float = 0.5
    """Prior probability in [0, 1] that it answers a question of middling difficulty well."""
    context_length: int | None = None
    """Tokens of prompt and answer together; None: ask a running replica."""
    aliases: tuple[str, ...] = ()
    fallbacks: tuple[str, ...] = ()
    """Ids of models that answer in its place while it is unavailable, in order."""
    revision: str = ""
    """Another one for other weights under the same id: cached answers are never used across revisions."""
    owned_by: str = "millrace"
    created: int = 0
    """Seconds since the epoch, for `/v1/models`."""

    def __post_init__(self) -> None:
        if not self.id or not self.id.isascii() or not self.id.isprintable():
            raise ValueError(f"model id {self.id!r} must be printable ASCII: it is sent in response headers")
        if not 0.0 <= self.quality <= 1.0:
            raise ValueError(f"model {self.id!r}: quality must lie in [0, 1], not {self.quality!r}")


class Catalog:
    """The models in the operator's order; names and aliases are unique, fallbacks exist.

    Raises `ValueError` otherwise: a mistake in the configuration, not of a client.
    """

    def __init__(self, models: Sequence[ModelEntry]) -> None:
        if not models:
            raise ValueError("the catalogue needs at least one model")
        self.models = tuple(models)
        self._by_name: dict[str, ModelEntry] = {}
        for model in self.models:
            for name in (model.id, *model.aliases):
                if name in self._by_name or name == AUTO:
                    raise ValueError(f"model name {name!r} is used twice (or is the reserved name {AUTO!r})")
                self._by_name[name] = model
        ids = {model.id for model in self.models}
        for model in self.models:
            if unknown := set(model.fallbacks) - (ids - {model.id}):
                raise ValueError(f"model {model.id!r}: fallbacks {sorted(unknown)} are not other models' ids")

    def resolve(self, name: str) -> ModelEntry:
        """The model of that id or alias. Raises `ModelNotFound`, also for `auto`, which is no model."""
        entry = self._by_name.get(name)
        if entry is None:
            raise ModelNotFound(f"The model {name[:200]!r} does not exist; GET /v1/models lists the models there are.")
        return entry

    def resolve_single(self, name: str | None) -> ModelEntry:
        """Like `resolve`, for routes that need one tokenizer: no name or `auto` will do where there is one model.

        Raises `ModelNotFound`, or `InvalidRequest` where several models stand behind `auto`.
        """
        if name is not None and name != AUTO:
            return self.resolve(name)
        if len(self.models) > 1:
            raise InvalidRequest("'model' should name one model here: token ids differ between models.", "model")
        return self.models[0]
