"""A repeated question is answered without a GPU, and only when it should be."""

from __future__ import annotations

import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.e2e


def ask(http: httpx.Client, question: str, **more: object) -> httpx.Response:
    body: dict[str, Any] = {"model": "smollm2-135m", "messages": [{"role": "user", "content": question}]}
    body |= {"temperature": 0, "max_tokens": 100, "stop": [" ", ".", "\n"]}  # ends soon, by `stop`: that is cacheable
    body |= more
    headers = body.pop("headers", {})
    answer = http.post("/v1/chat/completions", json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer


def outcome(answer: httpx.Response) -> str:
    return answer.headers["x-millrace-cache"]


def test_exact_then_semantic(http: httpx.Client) -> None:
    first = ask(http, "What is the capital of Zubrowka?")
    assert outcome(first) == "miss"
    again = ask(http, "What is the capital of Zubrowka?")
    assert outcome(again) == "hit-exact"
    assert again.json()["choices"] == first.json()["choices"]
    assert float(again.headers["x-millrace-cost-usd"]) == 0
    close = ask(http, "what's the capital of Zubrowka?")  # a cosine of 0.99, whatever the day
    assert outcome(close) == "hit-semantic"
    assert close.json()["choices"][0]["message"] == first.json()["choices"][0]["message"]


def test_a_hit_streams_like_an_answer(http: httpx.Client) -> None:
    question = f"Who wrote the book {uuid.uuid4().hex}?"
    whole = ask(http, question)
    streamed = ask(http, question, stream=True)
    assert outcome(streamed) == "hit-exact"
    assert streamed.headers["content-type"].startswith("text/event-stream")
    assert streamed.text.rstrip().endswith("data: [DONE]")
    assert whole.json()["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    "other",
    [{"temperature": 0.8}, {"headers": {"cache-control": "no-store, no-cache"}}, {"logprobs": True}],
    ids=["sampled", "no-store", "logprobs"],
)
def test_what_may_not_be_cached_is_not(http: httpx.Client, other: dict[str, object]) -> None:
    question = f"How old is {uuid.uuid4().hex}?"
    assert outcome(ask(http, question, **other)) == "bypass"
    assert outcome(ask(http, question, **other)) == "bypass"


def test_another_system_prompt_is_another_partition(http: httpx.Client) -> None:
    question = f"What colour is {uuid.uuid4().hex}?"
    assert outcome(ask(http, question)) == "miss"
    messages = [{"role": "system", "content": "Answer in French."}, {"role": "user", "content": question}]
    assert outcome(ask(http, question, messages=messages)) == "miss"


def test_no_cache_renews_and_max_age_limits(http: httpx.Client) -> None:
    question = f"Where is {uuid.uuid4().hex}?"
    assert outcome(ask(http, question, headers={"cache-control": "no-cache"})) == "bypass"
    assert outcome(ask(http, question)) == "hit-exact", "no-cache asks for a fresh answer, which is stored"
    assert outcome(ask(http, question, headers={"cache-control": "max-age=0"})) == "bypass"
    assert outcome(ask(http, question, headers={"cache-control": "max-age=600"})) == "hit-exact"


def test_identical_requests_in_flight_are_computed_once(http: httpx.Client) -> None:
    question = f"Why does {uuid.uuid4().hex} matter?"
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: ask(http, question), range(8)))
    assert sorted(map(outcome, answers)) == ["hit-exact"] * 7 + ["miss"]
    assert len({a.json()["choices"][0]["message"]["content"] for a in answers}) == 1
