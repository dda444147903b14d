"""What may be cached, and that keys separate what must stay apart."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.policy import Bypass, CacheControl, digest, plan
from cache.types import CacheQuery
from replicas.engine.sampling_params import SamplingParams
from replicas.types import ChatPrompt, Emitted, GenerateRequest, Prompt, TextPrompt, TokenPrompt

GREEDY = SamplingParams(temperature=0.0, max_tokens=64)


def chat(*turns: str, system: str = "Be brief.", **options: Any) -> ChatPrompt:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return ChatPrompt(({"role": "system", "content": system}, *messages), **options)


def request(prompt: Prompt | None = None, sampling: SamplingParams = GREEDY, **fields: Any) -> GenerateRequest:
    return GenerateRequest(
        "id", "model", chat("Why is the sky blue?") if prompt is None else prompt, sampling, **fields
    )


def planned(
    asked: GenerateRequest | None = None,
    *,
    tenant: str = "t",
    model_class: str = "auto",
    control: CacheControl | None = None,
    allow_sampled: bool = False,
) -> CacheQuery | Bypass:
    control = CacheControl() if control is None else control
    asked = request() if asked is None else asked
    return plan(asked, tenant=tenant, model_class=model_class, control=control, allow_sampled=allow_sampled)


def query(asked: GenerateRequest | None = None, **options: Any) -> CacheQuery:
    result = planned(asked, **options)
    assert isinstance(result, CacheQuery), result
    return result


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (None, CacheControl()),
        ("", CacheControl()),
        ("no-cache", CacheControl(no_cache=True)),
        (" NO-Store ,No-Cache", CacheControl(no_cache=True, no_store=True)),
        ("max-age=60", CacheControl(max_age_s=60.0)),
        ('max-age="60"', CacheControl(max_age_s=60.0)),
        ("max-age=60, max-age=10", CacheControl(max_age_s=10.0)),
        ("max-age=0", CacheControl(no_cache=True)),
        ("max-age", CacheControl(no_cache=True)),
        ("max-age=", CacheControl(no_cache=True)),
        ("max-age=-1", CacheControl(no_cache=True)),
        ("max-age=1.5", CacheControl(no_cache=True)),
        ("max-age=ten", CacheControl(no_cache=True)),
        ("max-age=" + "9" * 5000, CacheControl(max_age_s=float(2**31))),
        ("only-if-cached, max-stale=3, ,,;=,", CacheControl()),
        ('x="a, no-store, b", no-cache', CacheControl(no_cache=True)),
        ("no-caches", CacheControl()),
    ],
)
def test_cache_control_is_read_as_http_says(header: str | None, expected: CacheControl) -> None:
    assert CacheControl.parse(header) == expected


@given(st.text())
def test_cache_control_never_raises(header: str) -> None:
    CacheControl.parse(header)


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (request(sampling=dataclasses.replace(GREEDY, temperature=0.7)), "sampled"),
        (request(sampling=dataclasses.replace(GREEDY, temperature=None)), "sampled"),
        (request(sampling=dataclasses.replace(GREEDY, logprobs=0)), "logprobs"),
        (request(num_siblings=2), "n"),
        (request(emitted=Emitted((1, 2), 3)), "resumed"),
        (request(chat("hi", tools=({"type": "function"},))), "tools"),
        (request(ChatPrompt(({"role": "user", "content": object()},))), "prompt"),
    ],
)
def test_what_may_not_be_cached_bypasses(asked: GenerateRequest, reason: str) -> None:
    assert planned(asked) == Bypass(reason)


def test_control_decides_reading_and_storing() -> None:
    assert (query().may_read, query().may_store, query().max_age_s) == (True, True, None)
    afresh = query(control=CacheControl(no_cache=True))
    assert (afresh.may_read, afresh.may_store) == (False, True)
    private = query(control=CacheControl(no_store=True, max_age_s=9.0))
    assert (private.may_read, private.may_store, private.max_age_s) == (True, False, 9.0)
    assert planned(control=CacheControl(no_cache=True, no_store=True)) == Bypass("no-store")


def test_only_the_last_user_turn_is_compared() -> None:
    one, other = query(request(chat("Hi", "Hello", "Why?"))), query(request(chat("Hi", "Hello", "How?")))
    assert (one.text, other.text) == ("Why?", "How?")
    assert one.partition == other.partition
    assert one.exact_key != other.exact_key
    parts = [{"type": "text", "text": "Why"}, {"type": "text", "text": "not?"}]
    assert query(request(ChatPrompt(({"role": "user", "content": parts},)))).text == "Why\nnot?"


@pytest.mark.parametrize(
    "prompt",
    [
        TextPrompt("Once upon a time"),
        TokenPrompt((1, 2, 3)),
        chat("Hi", "Hello"),  # the assistant's turn is to be continued
        chat("   "),
        chat("Hi", add_generation_prompt=False),
        ChatPrompt(({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},)),
        ChatPrompt(({"role": "user", "content": None},)),
        ChatPrompt(()),
    ],
)
def test_other_prompts_match_exactly_or_not_at_all(prompt: Prompt) -> None:
    assert query(request(prompt)).text is None


def test_everything_else_separates_partitions() -> None:
    sampled = dataclasses.replace(GREEDY, temperature=0.5)
    variants = [
        query(),
        query(tenant="u"),
        query(model_class="model"),
        query(request(chat("Why is the sky blue?", system="Be verbose."))),
        query(request(chat("Hi", "Hello", "Why is the sky blue?"))),
        query(request(chat("Hi", "Hello!", "Why is the sky blue?"))),
        query(request(chat("Why is the sky blue?", template_kwargs={"enable_thinking": False}))),
        query(request(ChatPrompt(({"role": "user", "content": "Why is the sky blue?"},)))),
        query(request(ChatPrompt(({"role": "user", "name": "Ann", "content": "Why is the sky blue?"},)))),
        query(request(ChatPrompt(({"role": "user", "content": [{"type": "text", "text": "Why is the sky blue?"}]},)))),
        query(request(TextPrompt("Why is the sky blue?"))),
        query(request(cache_salt="adapter")),
        query(request(sampling=dataclasses.replace(GREEDY, max_tokens=65))),
        query(request(sampling=dataclasses.replace(GREEDY, stop=("\n",)))),
        query(request(sampling=dataclasses.replace(GREEDY, logit_bias={3: 1.0}))),
        query(request(sampling=dataclasses.replace(GREEDY, repetition_penalty=1.1))),
        query(request(sampling=sampled), allow_sampled=True),
        query(request(sampling=dataclasses.replace(sampled, seed=7)), allow_sampled=True),
        query(request(sampling=dataclasses.replace(sampled, top_p=0.9)), allow_sampled=True),
    ]
    assert len({variant.partition for variant in variants}) == len(variants)
    assert len({variant.exact_key for variant in variants}) == len(variants)


def test_what_cannot_shape_the_answer_does_not_separate() -> None:
    same = [
        request(sampling=dataclasses.replace(GREEDY, seed=7, top_p=0.9, top_k=5, min_p=0.1)),
        request(sampling=dataclasses.replace(GREEDY, temperature=0)),
        dataclasses.replace(request(), request_id="other", model="another"),
    ]
    assert {query(asked) for asked in same} == {query()}


def test_every_sampling_field_is_in_the_key_of_a_sampled_answer() -> None:
    changed: dict[str, Any] = {"logit_bias": {1: 2.0}, "stop": ("x",), "stop_token_ids": (9,)}
    sampled = SamplingParams(temperature=0.5)
    for field in dataclasses.fields(SamplingParams):
        if field.name == "logprobs":
            continue  # bypasses
        default = getattr(sampled, field.name)
        value = changed.get(field.name, (not default) if isinstance(default, bool) else (default or 0) + 1)
        other = dataclasses.replace(sampled, **{field.name: value})
        one, two = (query(request(sampling=params), allow_sampled=True) for params in (sampled, other))
        assert one.partition != two.partition, field.name


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def canonical(value: Any) -> Any:
    """An independent notion of sameness: types kept apart, order of mappings forgotten."""
    if isinstance(value, dict):
        return ("map", frozenset((key, canonical(item)) for key, item in value.items()))
    if isinstance(value, list):
        return ("list", tuple(canonical(item) for item in value))
    return (type(value).__name__, repr(value))


@given(PLAIN, PLAIN)
def test_different_data_have_different_digests(a: Any, b: Any) -> None:
    assert (digest(a) == digest(b)) == (canonical(a) == canonical(b))


@given(st.lists(st.text(alphabet="a:;0123sl", max_size=4), max_size=5), st.data())
def test_field_boundaries_cannot_be_forged(fields: list[str], data: st.DataObject) -> None:
    joined = "".join(fields)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(joined)), max_size=4)))
    recut = [joined[start:end] for start, end in zip([0, *cuts], [*cuts, len(joined)], strict=True)]
    assert (digest(fields) == digest(recut)) == (fields == recut)


def test_digest_refuses_what_has_no_canonical_form() -> None:
    with pytest.raises(TypeError, match="plain data"):
        digest([{1, 2}])
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest("\ud800") != digest("?")
