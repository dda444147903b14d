"""Keys, tenants, request ids, logs, health and metrics."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import replace
from typing import Any

import openai
import pytest

from router.metrics import GatewayMetrics
from router.settings import ApiKey
from tests.router.fake_backend import FakeBackend, an_idle_replica
from tests.router.gateway_harness import chat, harness

KEYS = tuple(
    ApiKey(hashlib.sha256(key.encode()).hexdigest(), tenant) for key, tenant in (("key-a", "ann"), ("key-b", "ben"))
)
CHAT = "/v1/chat/completions"


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/docs", "/openapi.json", "/nowhere", "/v1/models/small"])
async def test_every_route_but_health_and_ready_needs_a_key(path: str) -> None:
    h = harness(settings={"api_keys": KEYS})
    async with h.http() as client:
        refusals = [
            await client.get(path),
            await client.get(path, headers={"authorization": "Bearer wrong"}),
            await client.get(path, headers={"authorization": "Bearer "}),
            await client.get(path, headers={"authorization": "Basic key-a"}),
            await client.get(path, headers={"x-api-key": "key-A"}),
            await client.get(path, headers={b"x-api-key": b"k\xff"}),
        ]
        passed = [
            await client.get(path, headers={"authorization": "Bearer key-a"}),
            await client.get(path, headers={"authorization": "bearer  key-b"}),
            await client.get(path, headers={"x-api-key": "key-b"}),
        ]
        open_paths = [await client.get("/health"), await client.get("/ready")]
    assert {reply.status_code for reply in refusals} == {401}
    assert {reply.json()["error"]["code"] for reply in refusals} == {"invalid_api_key"}
    assert not {reply.status_code for reply in passed} & {401}
    assert {reply.status_code for reply in open_paths} == {200}


async def test_an_unauthorized_body_is_never_read() -> None:
    h = harness(settings={"api_keys": KEYS})
    with pytest.raises(openai.AuthenticationError):
        await h.openai("wrong").chat.completions.create(model="small", messages=chat()["messages"])
    assert h.backend.attempts == []


async def test_tenants_share_neither_cache_nor_blocks() -> None:
    h = harness(settings={"api_keys": KEYS})
    outcomes = []
    async with h.http() as client:
        for key in ("key-a", "key-b", "key-a", "key-b"):
            reply = await client.post(CHAT, json=chat(temperature=0), headers={"x-api-key": key})
            outcomes.append(reply.headers["x-millrace-cache"])
            await h.gateway.close()
    assert outcomes == ["miss", "miss", "hit-exact", "hit-exact"]
    assert [attempt.cache_salt for attempt in h.backend.attempts] == ["ann", "ben"]


@pytest.mark.parametrize(
    ("given", "is_kept"), [("abc-1.2:3_x", True), ("a b", False), ("ü", False), ("x" * 129, False)]
)
async def test_request_ids(given: str, is_kept: bool) -> None:
    async with harness().http() as client:
        replies = [
            await client.post(CHAT, json=chat(stream=stream), headers={b"x-request-id": given.encode()})
            for stream in (False, True)
        ]
        replies.append(await client.get("/nowhere", headers={b"x-request-id": given.encode()}))
    for reply in replies:  # an id that is kept is sent back by whoever set it: Serve around us, or the client knows it
        assert ("x-request-id" not in reply.headers) == is_kept
        assert reply.headers.get("x-request-id", "").isascii()


async def test_two_requests_of_one_id_do_not_meet_in_the_engine() -> None:
    h = harness()
    async with h.http() as client:
        for _ in range(2):
            await client.post(CHAT, json=chat(), headers={"x-request-id": "same"})
    assert len({attempt.request_id for attempt in h.backend.attempts}) == 2


async def test_one_log_line_a_request_without_keys_or_prompts(caplog: pytest.LogCaptureFixture) -> None:
    h = harness(settings={"api_keys": KEYS}, backend=FakeBackend(error_after=(1, RuntimeError("broken"))))
    with caplog.at_level(logging.DEBUG):
        async with h.http() as client:
            await client.post(
                CHAT, json=chat("my secret prompt"), headers={"x-api-key": "key-a", "x-request-id": "id-1"}
            )
            await client.get("/health", headers={"x-request-id": "id-2"})
            await client.get("/v1/models", headers={"x-api-key": "key-wrong", "x-request-id": "id-3"})
    lines = [json.loads(r.getMessage()) for r in caplog.records if r.name == "millrace.gateway"]
    requests = {line["request_id"]: line for line in lines if line["event"] == "request"}
    assert {key: line["status"] for key, line in requests.items()} == {"id-1": 500, "id-2": 200, "id-3": 401}
    assert (requests["id-1"]["tenant"], requests["id-1"]["model"]) == ("ann", "small")
    assert [line["request_id"] for line in lines if line["event"] == "unexpected error"] == ["id-1"]
    assert not any(word in caplog.text for word in ("my secret prompt", "key-a", "key-wrong"))


async def test_a_resumption_is_found_by_the_requests_id(caplog: pytest.LogCaptureFixture) -> None:
    h = harness(backend=FakeBackend(deaths=[2]))
    with caplog.at_level(logging.INFO):
        async with h.http() as client:
            reply = await client.post(CHAT, json=chat("four", seed=3), headers={"x-request-id": "id-1"})
    lines = [json.loads(r.getMessage()) for r in caplog.records if r.name == "millrace.gateway"]
    (resumed,) = [line for line in lines if line["event"] == "resumed"]
    assert (resumed["request_id"], resumed["response_id"]) == ("id-1", reply.json()["id"])


async def test_ready_says_which_models_run() -> None:
    h = harness(backend=FakeBackend(down={"large"}))
    async with h.http() as client:
        starting = await client.get("/ready")
        h.backend.down.clear()
        ready = await client.get("/ready")
    assert (starting.status_code, starting.json()["status"]) == (503, "starting")
    assert [model["replicas"] for model in starting.json()["models"]] == [1, 0]
    assert (ready.status_code, ready.json()["models"][0]["kernels"]) == (200, ["fake"])


async def test_metrics_count_what_happened() -> None:
    h = harness()
    async with h.http() as client:
        reply = await client.post(CHAT, json=chat(seed=5))
        exposition = (await client.get("/metrics")).text
    usage: dict[str, Any] = reply.json()["usage"]
    small = '{model_name="small"}'
    assert h.metric(f"vllm:prompt_tokens_total{small}") == usage["prompt_tokens"]
    assert h.metric(f"vllm:generation_tokens_total{small}") == usage["completion_tokens"]
    assert h.metric(f"vllm:prompt_tokens_cached_total{small}") == usage["prompt_tokens_details"]["cached_tokens"]
    assert h.metric(f"vllm:time_to_first_token_seconds_count{small}") == 1
    assert h.metric(f"vllm:inter_token_latency_seconds_count{small}") == usage["completion_tokens"]
    assert h.metric(f"vllm:e2e_request_latency_seconds_count{small}") == 1
    assert h.metric('vllm:request_success_total{finished_reason="stop",model_name="small"}') == 1
    assert h.metric('millrace:cost_usd_total{model="small"}') == pytest.approx(usage["cost_usd"])
    assert h.metric(f"vllm:kv_cache_usage_perc{small}") == 0.25
    assert h.metric(f"vllm:num_requests_waiting{small}") == 2
    assert h.metric(f'millrace:http_requests_total{{route="{CHAT}",status="200"}}') == 1
    names = h.gateway.metrics.exported_names()
    shown = {line.partition("{")[0].partition(" ")[0] for line in exposition.splitlines() if not line.startswith("#")}
    assert {name for name in shown if not name.endswith("_created")} <= names
    assert {"vllm:time_to_first_token_seconds_bucket", "millrace:resumptions_total"} <= names


@pytest.mark.parametrize(
    ("path", "route", "status"),
    [
        ("/docs", "/docs", 200),
        ("/openapi.json", "/openapi.json", 200),
        ("/docs-assets/swagger-ui.css", "/docs-assets/*", 200),
        ("/docs-assets/none", "/docs-assets/*", 404),
        ("/docs-assetsx", "unknown", 404),
        ("/v1/models/small", "/v1/models/{model:path}", 200),
    ],
)
async def test_every_route_has_a_count_of_its_own(path: str, route: str, status: int) -> None:
    h = harness()
    async with h.http() as client:
        await client.get(path)
    assert h.metric(f'millrace:http_requests_total{{route="{route}",status="{status}"}}') == 1


def test_replica_counters_never_fall_when_a_replica_leaves() -> None:
    one, two, three = (replace(an_idle_replica("small"), replica=name) for name in "abc")
    replicas = [one, two]
    metrics = GatewayMetrics(["small"], lambda model: replicas)

    def preemptions() -> float:
        lines = metrics.exposition().decode().splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_preemptions_total{"))

    counts = []
    for running in ([one, two], [], [one, two], [one], [one, three]):  # a missed reading counts nothing twice
        replicas[:] = running
        counts.append(preemptions())
    assert counts == [6, 6, 6, 6, 9]


@pytest.mark.parametrize("sha256", ["", "ab", "Z" * 64, "A" * 64])
def test_an_api_key_is_a_digest(sha256: str) -> None:
    with pytest.raises(ValueError, match="sha256"):
        ApiKey(sha256, "ann")
