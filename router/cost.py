"""What an answer costs: pure arithmetic from token counts and a price to US dollars. Unknown stays None, never 0."""

from __future__ import annotations

from collections.abc import Sequence

from replicas.types import Usage
from router.catalog import Price

USD_PER_TOKEN = 1e-6  # prices are per million tokens


def cost_usd(price: Price | None, usage: Usage) -> float | None:
    """Cost of an answer from its exact counts. Each token stands in one bucket: cached tokens are part of the prompt
    and are priced once, as cached.
    """
    assert 0 <= usage.num_cached_tokens <= usage.num_prompt_tokens, f"cached tokens exceed the prompt: {usage}"
    if price is None:
        return None
    cached_usd = price.prompt_usd if price.cached_usd is None else price.cached_usd
    num_fresh_tokens = usage.num_prompt_tokens - usage.num_cached_tokens
    return USD_PER_TOKEN * (
        num_fresh_tokens * price.prompt_usd
        + usage.num_cached_tokens * cached_usd
        + usage.num_completion_tokens * price.completion_usd
    )


def predicted_cost_usd(
    price: Price | None, *, num_prompt_tokens: int, max_tokens: int | None, expected_tokens: int, num_answers: int
) -> float | None:
    """Before the answer exists: the whole prompt uncached, and answers of the expected length, cut at `max_tokens`."""
    num_each = expected_tokens if max_tokens is None else min(max_tokens, expected_tokens)
    return cost_usd(price, Usage(num_prompt_tokens, 0, num_answers * num_each))


def total_usage(prompts: Sequence[Sequence[Usage]]) -> Usage:
    """Of a client's request: for each prompt the usages of its sibling answers.

    A prompt counts once, however many answers were drawn from it. Siblings find each other's blocks in the prefix
    cache, which is no saving of the client's: the smallest of their cached counts is the one that the first prompt
    pass found.
    """
    return Usage(
        num_prompt_tokens=sum(max(usage.num_prompt_tokens for usage in siblings) for siblings in prompts),
        num_cached_tokens=sum(min(usage.num_cached_tokens for usage in siblings) for siblings in prompts),
        num_completion_tokens=sum(usage.num_completion_tokens for siblings in prompts for usage in siblings),
    )
