"""Look up, choose, stream, store: over HTTP, with the fake replicas and cache."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from cache.types import CachedAnswer
from replicas.types import Chunk, EngineError, GenerateRequest, Overloaded, PromptTooLong, ReplicaStats
from router import gateway
from router.policy import FixedPolicy
from tests.router.fake_backend import CONTEXT, FakeBackend, answer_text, with_heartbeat
from tests.router.gateway_harness import MODELS, Exchange, Harness, chat, harness, sse_data


async def ask(h: Harness, body: dict[str, Any], **headers: str) -> Any:
    async with h.http() as client:
        reply = await client.post("/v1/chat/completions", json=body, headers=headers)
    await h.gateway.close()
    return reply


def text_of(reply: Any) -> str:
    return str(reply.json()["choices"][0]["message"]["content"])


async def test_a_repeated_question_is_answered_from_the_cache() -> None:
    h = harness()
    fresh = await ask(h, chat(temperature=0))
    again = await ask(h, chat(temperature=0))
    assert fresh.headers["x-millrace-cache"] == "miss"
    assert again.headers["x-millrace-cache"] == "hit-exact"
    assert (again.headers["x-millrace-model"], again.headers["x-millrace-route-reason"]) == ("small", "cached")
    assert float(again.headers["x-millrace-cost-usd"]) == 0.0 == again.json()["usage"]["cost_usd"]
    assert text_of(again) == text_of(fresh)
    assert again.json()["id"] != fresh.json()["id"]
    assert len(h.backend.attempts) == 1
    assert h.metric('millrace:cache_lookups_total{outcome="hit-exact"}') == 1
    assert h.metric("millrace:cache_saved_usd_total") == pytest.approx(fresh.json()["usage"]["cost_usd"])
    assert h.cache.flights == set()


async def test_a_cached_answer_streams_like_a_fresh_one() -> None:
    h = harness()
    fresh = await ask(h, chat(temperature=0))
    stream = await ask(h, chat(temperature=0, stream=True, stream_options={"include_usage": True}))
    events = sse_data(stream.text)
    assert stream.headers["x-millrace-cache"] == "hit-exact"
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in events[:-2]) == text_of(fresh)
    assert events[-3]["choices"][0]["finish_reason"] == "stop"
    assert events[-2]["usage"]["completion_tokens"] == fresh.json()["usage"]["completion_tokens"]
    assert events[-1] == "[DONE]"


NEIGHBOUR = CachedAnswer("Because of the mill.", "small", num_prompt_tokens=999, num_completion_tokens=6, cost_usd=0.1)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_neighbours_answer_is_billed_by_the_askers_own_prompt(stream: bool) -> None:
    h = harness()
    fresh = (await ask(h, chat("Why?"))).json()["usage"]
    h.cache.neighbour = NEIGHBOUR
    options = {"stream_options": {"include_usage": True}} if stream else {}
    reply = await ask(h, chat("Why?", temperature=0, stream=stream, **options))
    assert reply.headers["x-millrace-cache"] == "hit-semantic"
    usage = sse_data(reply.text)[-2]["usage"] if stream else reply.json()["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (fresh["prompt_tokens"], 6)
    assert len(h.backend.attempts) == 1


async def test_a_neighbours_text_does_not_wait_for_the_usage() -> None:
    counted = asyncio.Event()

    async def until_counted() -> None:
        await counted.wait()

    h = harness(backend=FakeBackend(tokenizing=until_counted))
    h.cache.neighbour = NEIGHBOUR
    exchange = Exchange(h.app, "/v1/chat/completions", json.dumps(chat(temperature=0, stream=True)).encode())
    first = await asyncio.wait_for(exchange.parts.get(), 5)
    assert NEIGHBOUR.text.encode() in first
    counted.set()
    await exchange.task


async def _never() -> None:
    await asyncio.Event().wait()


async def _broken() -> None:
    raise EngineError("broken")


@pytest.mark.parametrize(
    "backend", [FakeBackend(down={"small"}), FakeBackend(tokenizing=_never), FakeBackend(tokenizing=_broken)]
)
async def test_where_nobody_can_count_the_stored_figure_stands(
    backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway, "MAX_COUNT_S", 0.05)
    h = harness(backend=backend)
    h.cache.neighbour = NEIGHBOUR
    reply = await ask(h, chat(temperature=0))
    assert text_of(reply) == NEIGHBOUR.text
    assert reply.json()["usage"]["prompt_tokens"] == 999


@pytest.mark.parametrize(
    ("body", "headers", "outcome", "is_stored"),
    [
        ({"temperature": 1.0}, {}, "bypass", False),
        ({}, {}, "bypass", False),
        ({"temperature": 0, "n": 2}, {}, "bypass", False),
        ({"temperature": 0, "logprobs": True}, {}, "bypass", False),
        ({"temperature": 0}, {"cache-control": "no-cache"}, "bypass", True),
        ({"temperature": 0}, {"cache-control": "no-store"}, "miss", False),
        ({"temperature": 0, "max_tokens": 1}, {}, "miss", False),
    ],
)
async def test_what_is_looked_up_and_stored(
    body: dict[str, Any], headers: dict[str, str], outcome: str, is_stored: bool
) -> None:
    h = harness()
    reply = await ask(h, chat("What is a mill?", **body), **headers)
    assert reply.status_code == 200
    assert reply.headers["x-millrace-cache"] == outcome
    assert bool(h.cache.answers) == is_stored
    assert h.cache.flights == set()


async def test_lines_of_cache_control_count_together() -> None:
    h = harness()
    lines = [("cache-control", "max-age=60"), ("cache-control", "no-cache, no-store")]
    async with h.http() as client:
        for _ in range(2):
            reply = await client.post("/v1/chat/completions", json=chat(temperature=0), headers=lines)
    assert reply.headers["x-millrace-cache"] == "bypass"
    assert (h.cache.num_lookups, h.cache.answers) == (0, {})


async def test_a_failed_or_abandoned_answer_frees_its_flight() -> None:
    failing = harness(backend=FakeBackend(error=EngineError("sampling failed")))
    assert (await ask(failing, chat(temperature=0))).status_code == 500
    failing_midway = harness(backend=FakeBackend(error_after=(2, EngineError("sampling failed"))))
    assert (await ask(failing_midway, chat(temperature=0))).status_code == 500
    for h in (failing, failing_midway):
        assert (h.cache.flights, h.cache.answers, h.backend.num_open) == (set(), {}, 0)


async def test_without_a_cache_everything_bypasses() -> None:
    h = harness(with_cache=False)
    assert (await ask(h, chat(temperature=0))).headers["x-millrace-cache"] == "bypass"


async def test_auto_takes_the_cheapest_capable_model() -> None:
    h = harness()
    easy = await ask(h, chat("What is a river?", model="auto"))
    hard = await ask(h, chat("First derive, then prove step by step and implement it: 12345 * 9876", model="auto"))
    assert (easy.headers["x-millrace-model"], easy.headers["x-millrace-route-reason"]) == ("small", "cheapest-capable")
    assert hard.headers["x-millrace-model"] == "large" == hard.json()["model"]
    assert (
        h.metric('millrace:routes_total{model="large",reason="best-quality"}')
        + h.metric('millrace:routes_total{model="large",reason="cheapest-capable"}')
        == 1
    )


async def test_auto_passes_over_models_that_are_down_or_silent() -> None:
    down = harness(backend=FakeBackend(down={"small"}))
    assert (await ask(down, chat(model="auto"))).headers["x-millrace-model"] == "large"
    silent = harness(backend=FakeBackend(stats_change=with_heartbeat(99.0)))
    reply = await ask(silent, chat(model="auto"))
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "2")


async def test_auto_falls_back_when_a_model_fails_before_its_first_chunk() -> None:
    class OneReplicaLies(FakeBackend):
        """Stats still show a replica that is gone."""

        def stats(self, model: str) -> Sequence[ReplicaStats]:
            return [replace(reading, model=model) for reading in FakeBackend().stats(model)]

    h = harness(backend=OneReplicaLies(down={"small"}))
    reply = await ask(h, chat(model="auto"))
    assert (reply.headers["x-millrace-model"], reply.headers["x-millrace-route-reason"]) == ("large", "fallback")


async def test_a_named_model_falls_back_only_where_the_catalogue_says_so() -> None:
    alone = harness(backend=FakeBackend(down={"small"}))
    assert (await ask(alone, chat())).status_code == 503
    models = (replace(MODELS[0], fallbacks=("large",)), MODELS[1])
    backed = harness(models=models, backend=FakeBackend(down={"small"}))
    reply = await ask(backed, chat())
    assert (reply.headers["x-millrace-model"], reply.headers["x-millrace-route-reason"]) == ("large", "fallback")


@pytest.mark.parametrize(
    "policy", [None, FixedPolicy("small", ("large",))], ids=["cheapest capable model is down", "fixed model is down"]
)
@pytest.mark.parametrize("model", ["small", "auto"])
@pytest.mark.parametrize("stats_lie", [False, True])
async def test_the_answer_of_a_substitute_is_not_cached(
    model: str, policy: FixedPolicy | None, stats_lie: bool
) -> None:
    class Backend(FakeBackend):
        def stats(self, model: str) -> Sequence[ReplicaStats]:
            return FakeBackend().stats(model) if stats_lie else super().stats(model)

    models = (replace(MODELS[0], fallbacks=("large",)), MODELS[1])
    h = harness(models=models, policy=policy, backend=Backend(down={"small"}))
    reply = await ask(h, chat(model=model, temperature=0))
    assert reply.headers["x-millrace-model"] == "large"
    assert reply.json()["choices"][0]["finish_reason"] == "stop"
    assert (h.cache.answers, h.cache.flights) == ({}, set())
    h.backend.down.clear()
    for outcome in ("miss", "hit-exact"):
        again = await ask(h, chat(model=model, temperature=0))
        assert (again.headers["x-millrace-cache"], again.headers["x-millrace-model"]) == (outcome, "small")


async def test_who_waits_for_a_substitutes_answer_goes_on_as_soon_as_it_begins() -> None:
    models = (replace(MODELS[0], fallbacks=("large",)), MODELS[1])
    h = harness(models=models, backend=FakeBackend(down={"small"}, stall_after=1))
    asked = asyncio.create_task(ask(h, chat(temperature=0)))
    await h.until_open(1)
    for _ in range(20):
        await asyncio.sleep(0)
    assert h.cache.flights == set()
    h.backend.release.set()
    await asked


async def test_an_alias_is_answered_by_its_model() -> None:
    h = harness()
    assert (await ask(h, chat(model="tiny"))).json()["model"] == "small"
    assert h.backend.attempts[0].model == "small"


async def test_a_fixed_policy() -> None:
    h = harness(policy=FixedPolicy("large"))
    reply = await ask(h, chat(model="auto"))
    assert (reply.headers["x-millrace-model"], reply.headers["x-millrace-route-reason"]) == ("large", "fixed")


async def test_a_death_midway_costs_the_client_nothing() -> None:
    calm = await ask(harness(), chat(seed=5, temperature=1.0))
    h = harness(backend=FakeBackend(deaths=[3, 0, 2]))
    stormy = await ask(h, chat(seed=5, temperature=1.0))
    assert text_of(stormy) == text_of(calm)
    assert stormy.json()["usage"] == calm.json()["usage"]
    assert h.metric('millrace:resumptions_total{model="small"}') == 3


async def test_siblings_keep_their_order_and_are_counted_once() -> None:
    h = harness()
    reply = await ask(h, chat(n=4, seed=11))
    assert h.backend.attempts[0].sampling.seed == 11
    texts = [choice["message"]["content"] for choice in reply.json()["choices"]]
    by_id = sorted(h.backend.attempts, key=lambda attempt: attempt.request_id)
    assert texts == [answer_text(attempt) for attempt in by_id]
    assert len(set(texts)) == 4
    single = await ask(harness(), chat(seed=11))
    assert texts[0] == text_of(single)
    assert reply.json()["usage"]["prompt_tokens"] == single.json()["usage"]["prompt_tokens"]


async def test_one_failing_sibling_fails_the_answer_and_stops_the_others() -> None:
    class SecondFails(FakeBackend):
        async def stream_once(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
            if request.request_id.endswith("-1"):
                raise EngineError("sampling failed")
            async for chunk in super().stream_once(request):
                yield chunk

    h = harness(backend=SecondFails(stall_after=2))
    reply = await ask(h, chat(n=3))
    assert reply.status_code == 500
    assert reply.json()["error"]["code"] == "engine_error"
    await asyncio.sleep(0)
    assert h.backend.num_open == 0


@pytest.mark.parametrize("model", ["small", "auto"])
@pytest.mark.parametrize(
    ("path", "prompt", "param"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a" * 20 * CONTEXT}]}, "messages"),
        ("/v1/completions", {"prompt": ["a", "a" * 20 * CONTEXT]}, "prompt"),
        ("/v1/completions", {"prompt": [1] * CONTEXT}, "prompt"),
    ],
)
async def test_a_prompt_too_long_is_named_as_such_whoever_finds_out(
    model: str, path: str, prompt: dict[str, Any], param: str
) -> None:
    async with harness().http() as client:
        reply = await client.post(path, json={"model": model, **prompt})
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", param)


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (PromptTooLong("The prompt is too long.", "messages"), 400, "context_length_exceeded"),
        (Overloaded("full", 7.2), 429, "overloaded"),
        (EngineError("out of memory"), 500, "engine_error"),
        (RuntimeError("secret detail"), 500, "internal_error"),
    ],
)
async def test_early_failures_are_statuses(error: Exception, status: int, code: str) -> None:
    h = harness(backend=FakeBackend(error=error))
    for body in (chat(), chat(stream=True)):
        reply = await ask(h, body)
        assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)
        assert "secret" not in reply.text
    if status == 429:
        assert reply.headers["retry-after"] == "8"
    if code == "internal_error":
        assert reply.headers["x-request-id"] in reply.json()["error"]["message"]


async def test_a_late_failure_ends_the_stream_with_an_error_event() -> None:
    h = harness(backend=FakeBackend(error_after=(2, EngineError("sampling failed"))))
    reply = await ask(h, chat("four", seed=3, stream=True))
    events = sse_data(reply.text)
    assert reply.status_code == 200
    assert events[-1]["error"] == {
        "message": "sampling failed",
        "type": "server_error",
        "param": None,
        "code": "engine_error",
    }
    assert "[DONE]" not in events
    assert h.metric('vllm:request_success_total{finished_reason="abort",model_name="small"}') == 1
