"""From a question to the model that should answer it: gathers what the pure policy needs to know, and asks it.

Reads the replicas' latest stats; starts nothing and spends no token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from replicas.types import PromptTooLong, ReplicaStats
from router.catalog import AUTO, Catalog, ModelEntry
from router.cost import predicted_cost_usd
from router.policy import Candidate, Route, RoutingPolicy
from router.prompts import field_of, judged_text, least_num_tokens, likely_num_tokens
from router.quality import QualityEstimator
from router.question import Question
from router.settings import GatewaySettings


class ModelChooser:
    def __init__(
        self,
        catalog: Catalog,
        policy: RoutingPolicy,
        quality: QualityEstimator,
        settings: GatewaySettings,
        stats_of: Callable[[str], Sequence[ReplicaStats]],
    ) -> None:
        self._catalog = catalog
        self._policy = policy
        self._quality = quality
        self._settings = settings
        self._stats_of = stats_of

    def model_class(self, question: Question) -> str:
        """What the cache keeps apart: the model asked for in its revision, or all of them for `auto`.

        Raises `ModelNotFound`."""
        if question.model == AUTO:
            return " ".join([AUTO, *map(_revised, self._catalog.models)])
        return _revised(self._catalog.resolve(question.model))

    def choose(self, question: Question, embedding: Sequence[float] | None) -> Route:
        """A model that is asked for by name gets the request, and only its own fallbacks after it; `auto` is the
        policy's. Raises `ModelNotFound`, `PromptTooLong` or `NoCapableModel`."""
        if question.model != AUTO:
            named = self._catalog.resolve(question.model)
            return Route(named.id, "requested", named.fallbacks)
        self._refuse_prompt_beyond_all(question)
        return self._policy.choose([self._candidate(question, model, embedding) for model in self._catalog.models])

    def predicted_cost_usd(self, question: Question, model: str) -> float | None:
        return predicted_cost_usd(
            self._catalog.resolve(model).price,
            num_prompt_tokens=sum(map(likely_num_tokens, question.prompts)),
            max_tokens=question.max_tokens,
            expected_tokens=self._settings.expected_completion_tokens,
            num_answers=len(question.requests),
        )

    def _refuse_prompt_beyond_all(self, question: Question) -> None:
        contexts = [self._context(model) for model in self._catalog.models]
        longest = max((context for context in contexts if context is not None), default=0)
        least, prompt = max(((least_num_tokens(prompt), prompt) for prompt in question.prompts), key=lambda p: p[0])
        if None not in contexts and least >= longest:
            raise PromptTooLong(
                f"the prompt has at least {least} tokens and the longest context of all models {longest}; at least one "
                "token must be left for the answer, so shorten the prompt",
                field_of(prompt),
            )

    def _context(self, model: ModelEntry) -> int | None:
        """None: unknown as long as no replica of it runs."""
        return model.context_length or max((r.max_model_len for r in self._stats_of(model.id)), default=None)

    def _candidate(self, question: Question, model: ModelEntry, embedding: Sequence[float] | None) -> Candidate:
        stats = self._stats_of(model.id)
        context = self._context(model)
        least = max(map(least_num_tokens, question.prompts)) + (question.max_tokens or 1)
        texts = map(judged_text, question.prompts)
        return Candidate(
            model=model.id,
            quality=min(self._quality.estimate(model.quality, text, embedding) for text in texts),
            cost_usd=self.predicted_cost_usd(question, model.id),
            is_available=any(reading.heartbeat_age_s < self._settings.stale_heartbeat_s for reading in stats),
            fits=context is None or least <= context,
        )


def _revised(model: ModelEntry) -> str:
    return f"{model.id}@{model.revision}"
