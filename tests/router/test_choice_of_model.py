"""The arithmetic that picks a model: cost, quality, policies, catalogue."""

from __future__ import annotations

import dataclasses
import math
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicas.types import InvalidRequest, ModelNotFound, ReplicaUnavailable, Usage
from router.catalog import Catalog, ModelEntry, Price
from router.cost import cost_usd, predicted_cost_usd, total_usage
from router.policy import (
    Candidate,
    CheapestCapablePolicy,
    FixedPolicy,
    NoCapableModel,
    NoModelAvailable,
    NoModelFits,
)
from router.quality import Features, FirstEstimate, difficulty, features_of, quality_at

dollars = st.floats(0, 1000, allow_nan=False)
prices = st.builds(Price, dollars, dollars, st.none() | dollars)
usages = st.tuples(st.integers(0, 10**6), st.integers(0, 10**6), st.floats(0, 1)).map(
    lambda t: Usage(t[0], int(t[0] * t[2]), t[1])
)
candidates = st.lists(
    st.builds(
        Candidate,
        model=st.sampled_from("abcdefgh"),
        quality=st.floats(0, 1),
        cost_usd=st.none() | st.floats(0, 1),
        is_available=st.booleans(),
        fits=st.booleans(),
    ),
    max_size=8,
    unique_by=lambda candidate: candidate.model,
)


def test_cost_of_a_known_bill() -> None:
    price = Price(prompt_usd=2.0, completion_usd=8.0, cached_usd=0.5)
    # 600 fresh at 2, 400 cached at 0.5, 100 drawn at 8 dollars a million
    assert cost_usd(price, Usage(1000, 400, 100)) == pytest.approx((1200 + 200 + 800) / 1e6)
    assert cost_usd(Price(2.0, 8.0), Usage(1000, 400, 100)) == pytest.approx((2000 + 800) / 1e6)
    assert cost_usd(None, Usage(1000, 400, 100)) is None


@given(prices, usages)
def test_each_prompt_token_is_priced_once(price: Price, usage: Usage) -> None:
    got = cost_usd(price, usage)
    cached = price.prompt_usd if price.cached_usd is None else price.cached_usd
    one_by_one = math.fsum(
        [
            1e-6 * price.prompt_usd * (usage.num_prompt_tokens - usage.num_cached_tokens),
            1e-6 * cached * usage.num_cached_tokens,
            1e-6 * price.completion_usd * usage.num_completion_tokens,
        ]
    )
    assert got == pytest.approx(one_by_one)
    dearest = max(price.prompt_usd, cached)
    assert got is not None
    assert got <= 1e-6 * (dearest * usage.num_prompt_tokens + price.completion_usd * usage.num_completion_tokens) + 1e-9


@given(prices, st.integers(0, 10**5), st.none() | st.integers(1, 10**5), st.integers(1, 4096), st.integers(1, 8))
def test_a_prediction_grows_with_everything_and_knows_no_unknown_price(
    price: Price, num_prompt_tokens: int, max_tokens: int | None, expected_tokens: int, num_answers: int
) -> None:
    def predict(price: Price | None, extra: int = 0) -> float | None:
        return predicted_cost_usd(
            price,
            num_prompt_tokens=num_prompt_tokens + extra,
            max_tokens=max_tokens,
            expected_tokens=expected_tokens,
            num_answers=num_answers + extra,
        )

    small, large = predict(price), predict(price, extra=1)
    assert small is not None
    assert large is not None
    assert small <= large
    assert predict(None) is None


def test_a_prompt_counts_once_however_many_answers_it_has() -> None:
    siblings = [Usage(100, 10, 5), Usage(100, 96, 7)]
    assert total_usage([siblings, [Usage(3, 0, 1)]]) == Usage(103, 10, 13)


@given(candidates, st.floats(0, 1))
def test_cheapest_capable(candidates: list[Candidate], target: float) -> None:
    by_model = {candidate.model: candidate for candidate in candidates}
    usable = [c for c in candidates if c.fits and c.is_available]
    capable = [c for c in usable if c.quality >= target]
    try:
        route = CheapestCapablePolicy(target).choose(candidates)
    except NoModelFits:
        assert not any(c.fits for c in candidates)
        return
    except NoModelAvailable:
        assert not usable
        return
    chosen = by_model[route.model]
    assert chosen in usable
    assert {route.model, *route.fallbacks} == {c.model for c in usable}
    assert len(route.fallbacks) == len(usable) - 1
    all_up = [dataclasses.replace(candidate, is_available=True) for candidate in candidates]
    assert route.is_substitute == (CheapestCapablePolicy(target).choose(all_up).model != route.model)
    if not capable:
        assert route.reason == "best-quality"
        assert chosen.quality == max(c.quality for c in usable)
        return
    assert route.reason == "cheapest-capable"
    assert chosen in capable
    priced = [c.cost_usd for c in capable if c.cost_usd is not None]
    if priced:
        assert chosen.cost_usd == min(priced)
    else:
        assert chosen.quality == max(c.quality for c in capable)


@given(candidates, st.randoms())
def test_the_order_of_candidates_does_not_matter(candidates: list[Candidate], random: Random) -> None:
    shuffled = list(candidates)
    random.shuffle(shuffled)
    policy = CheapestCapablePolicy(0.5)
    try:
        route = policy.choose(candidates)
    except NoCapableModel as error:
        with pytest.raises(type(error)):
            policy.choose(shuffled)
    else:
        assert policy.choose(shuffled) == route


def test_fixed_policy() -> None:
    up = Candidate("a", 0.1, None, is_available=True, fits=True)
    down = Candidate("a", 0.1, None, is_available=False, fits=True)
    other = Candidate("b", 0.9, 0.0, is_available=True, fits=True)
    policy = FixedPolicy("a", fallbacks=("b",))
    assert (policy.choose([up, other]).model, policy.choose([up, other]).reason) == ("a", "fixed")
    assert policy.choose([up, other]).fallbacks == ("b",)
    assert (policy.choose([down, other]).model, policy.choose([down, other]).reason) == ("b", "fallback")
    too_small = Candidate("a", 0.1, None, is_available=True, fits=False)
    # the same prompt is too long on any day: no substitute
    assert [policy.choose([a, other]).is_substitute for a in (up, down, too_small)] == [False, True, False]
    with pytest.raises(NoModelAvailable):
        FixedPolicy("a").choose([down, other])


def test_no_capable_model_is_the_clients_or_the_clusters_fault() -> None:
    assert issubclass(NoModelFits, InvalidRequest)
    assert issubclass(NoModelAvailable, ReplicaUnavailable)
    too_small = Candidate("a", 0.5, 0.1, is_available=True, fits=False)
    with pytest.raises(NoModelFits) as caught:
        CheapestCapablePolicy(0.5).choose([too_small])
    assert caught.value.param == "max_tokens"


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_quality_rises_with_the_prior_and_falls_with_difficulty(p: float, q: float, d: float, e: float) -> None:
    p, q = sorted((p, q))
    d, e = sorted((d, e))
    assert 0.0 <= quality_at(p, d) <= quality_at(q, d) <= 1.0
    assert quality_at(p, e) <= quality_at(p, d)


@given(st.text(max_size=300))
def test_difficulty_stays_in_range(text: str) -> None:
    assert 0.0 <= difficulty(features_of(text)) < 1.0


@given(st.integers(0, 5000), st.floats(0, 1), st.integers(0, 9), st.integers(0, 9))
def test_difficulty_is_monotone(chars: int, digits: float, code: int, steps: int) -> None:
    here = difficulty(Features(chars, digits, code, steps))
    assert here <= difficulty(Features(chars + 100, digits, code, steps))
    assert here <= difficulty(Features(chars, digits, code + 1, steps))
    assert here <= difficulty(Features(chars, digits, code, steps + 1))


def test_hard_prompts_look_harder_than_easy_ones() -> None:
    easy = "What is the capital of France?"
    hard = "First derive the gradient step by step, then implement it:\n```python\ndef loss(w): ...\n```\nand prove it."
    estimate = FirstEstimate().estimate
    assert estimate(0.5, easy, None) > 0.7 > 0.3 > estimate(0.5, hard, None)
    assert estimate(0.95, hard, None) > 0.8


def test_catalogue_resolves_ids_and_aliases_only() -> None:
    catalog = Catalog([ModelEntry("a/b", aliases=("b",)), ModelEntry("c", fallbacks=("a/b",))])
    assert catalog.resolve("b").id == catalog.resolve("a/b").id == "a/b"
    for unknown in ("auto", "", "B"):
        with pytest.raises(ModelNotFound):
            catalog.resolve(unknown)
    with pytest.raises(InvalidRequest):
        catalog.resolve_single("auto")
    assert Catalog([ModelEntry("only")]).resolve_single(None).id == "only"


@pytest.mark.parametrize(
    "models",
    [
        [],
        [ModelEntry("a"), ModelEntry("a")],
        [ModelEntry("a"), ModelEntry("b", aliases=("a",))],
        [ModelEntry("auto")],
        [ModelEntry("a", fallbacks=("a",))],
        [ModelEntry("a", fallbacks=("gone",))],
    ],
)
def test_catalogue_refuses_ambiguity(models: list[ModelEntry]) -> None:
    with pytest.raises(ValueError, match=r"model|catalogue"):
        Catalog(models)


@pytest.mark.parametrize("bad", [{"quality": 1.5}, {"quality": math.nan}, {"id": ""}, {"id": "a\nb"}, {"id": "ü"}])
def test_a_model_entry_is_checked(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="model"):
        ModelEntry(**{"id": "a", **bad})  # type: ignore[arg-type]
