"""Nonsense gets a 4xx in OpenAI's shape that names the field, and reaches no replica."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from replicas.types import ChatPrompt, InvalidRequest
from tests.router.fake_backend import FakeBackend
from tests.router.gateway_harness import chat, harness

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def text(**more: Any) -> dict[str, Any]:
    return {"model": "small", "prompt": "hello", **more}


BAD_FIELDS: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, chat(temperature="1"), "temperature"),
    (CHAT, chat(temperature=True), "temperature"),
    (CHAT, chat(temperature=-0.1), "temperature"),
    (CHAT, chat(temperature=2.1), "temperature"),
    (CHAT, chat(top_p=1.5), "top_p"),
    (CHAT, chat(max_tokens=0), "max_tokens"),
    (CHAT, chat(max_tokens=-1), "max_tokens"),
    (CHAT, chat(max_tokens=1.5), "max_tokens"),
    (CHAT, chat(max_tokens=10**30), "max_tokens"),
    (CHAT, chat(max_completion_tokens=0), "max_completion_tokens"),
    (CHAT, chat(n=0), "n"),
    (CHAT, chat(n=129), "n"),
    (CHAT, chat(n=True), "n"),
    (CHAT, chat(presence_penalty=3), "presence_penalty"),
    (CHAT, chat(frequency_penalty=-3), "frequency_penalty"),
    (CHAT, chat(repetition_penalty=0), "repetition_penalty"),
    (CHAT, chat(min_p=2), "min_p"),
    (CHAT, chat(top_k=-2), "top_k"),
    (CHAT, chat(min_tokens=5, max_tokens=4), "min_tokens"),
    (CHAT, chat(logit_bias={"x": 1}), "logit_bias"),
    (CHAT, chat(logit_bias={"5": 101}), "logit_bias.5"),
    (CHAT, chat(logit_bias=[1]), "logit_bias"),
    (CHAT, chat(logprobs=1), "logprobs"),
    (CHAT, chat(top_logprobs=2), "top_logprobs"),
    (CHAT, chat(logprobs=True, top_logprobs=21), "top_logprobs"),
    (CHAT, chat(seed=2**63), "seed"),
    (CHAT, chat(stop=""), "stop"),
    (CHAT, chat(stop=["a", 1]), "stop"),
    (CHAT, chat(stop=["a"] * 17), "stop"),
    (CHAT, chat(stop_token_ids=[-1]), "stop_token_ids.0"),
    (CHAT, chat(stream="yes"), "stream"),
    (CHAT, chat(stream_options={"include_usage": True}), "stream_options"),
    (CHAT, chat(stream=True, stream_options={"nope": 1}), "stream_options.nope"),
    (CHAT, chat(nonsense=1), "nonsense"),
    (CHAT, chat(tools=[{"type": "function"}]), "tools"),
    (CHAT, chat(response_format={"type": "json_object"}), "response_format"),
    (CHAT, chat(modalities=["text", "audio"]), "modalities.1"),
    (CHAT, chat(audio={}), "audio"),
    (CHAT, chat(functions=[{}]), "functions"),
    (CHAT, chat(prediction={}), "prediction"),
    (CHAT, chat(moderation={"model": "omni-moderation-latest"}), "moderation"),
    (CHAT, chat(web_search_options={}), "web_search_options"),
    (CHAT, chat(tool_choice="required"), "tool_choice"),
    (CHAT, chat(echo=True), "echo"),
    (CHAT, chat(chat_template_kwargs={"messages": []}), "chat_template_kwargs.messages"),
    (CHAT, chat(stop_token_ids=[1] * 129), "stop_token_ids"),
    (CHAT, {"model": "small"}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": "a"}]}, "model"),
    (CHAT, chat(model=""), "model"),
    (CHAT, chat(model=7), "model"),
    (CHAT, {"model": "small", "messages": []}, "messages"),
    (CHAT, {"model": "small", "messages": "hello"}, "messages"),
    (CHAT, {"model": "small", "messages": [{"role": "user"}]}, "messages.0.content"),
    (CHAT, {"model": "small", "messages": [{"role": "robot", "content": ""}]}, "messages.0.role"),
    (CHAT, {"model": "small", "messages": [{"role": "user", "content": None}]}, "messages.0.content"),
    (CHAT, {"model": "small", "messages": [{"role": "user", "content": []}]}, "messages.0.content"),
    (
        CHAT,
        {"model": "small", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages.0.content",
    ),
    (
        CHAT,
        {"model": "small", "messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
        "messages.0.tool_calls",
    ),
    (TEXT, text(prompt=""), "prompt"),
    (TEXT, text(prompt=[]), "prompt"),
    (TEXT, text(prompt=[[]]), "prompt"),
    (TEXT, text(prompt=["a", ""]), "prompt"),
    (TEXT, text(prompt=["a", 1]), "prompt"),
    (TEXT, text(prompt=[1, "a"]), "prompt"),
    (TEXT, text(prompt=[-1]), "prompt"),
    (TEXT, text(prompt=[True]), "prompt"),
    (TEXT, text(prompt={"a": 1}), "prompt"),
    (TEXT, text(prompt=["a"] * 100, n=2), "n"),
    (TEXT, text(suffix="x"), "suffix"),
    (TEXT, text(best_of=2), "best_of"),
    (TEXT, text(echo=True, logprobs=1), "echo"),
    (TEXT, text(logprobs=21), "logprobs"),
    (TEXT, text(logprobs=True), "logprobs"),
    ("/v1/embeddings", {"model": "minilm", "input": [1, 2]}, "input"),
    ("/v1/embeddings", {"model": "minilm", "input": []}, "input"),
    ("/v1/embeddings", {"model": "minilm", "input": ""}, "input"),
    ("/v1/embeddings", {"model": "minilm", "input": "a", "dimensions": 2}, "dimensions"),
    ("/v1/embeddings", {"model": "minilm", "input": "a", "encoding_format": "int8"}, "encoding_format"),
    ("/tokenize", {"model": "small"}, "prompt"),
    ("/tokenize", {"model": "auto", "prompt": "a"}, "model"),
    ("/detokenize", {"model": "small", "tokens": ["a"]}, "tokens.0"),
]


@pytest.mark.parametrize(("path", "body", "param"), BAD_FIELDS)
async def test_a_bad_field_is_named(path: str, body: dict[str, Any], param: str) -> None:
    h = harness()
    async with h.http() as client:
        reply = await client.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error["param"] == param, error
    assert error["type"] == "invalid_request_error"
    assert param.split(".")[0] in error["message"]
    assert "Tuple" not in error["message"], "JSON has arrays"
    assert h.backend.attempts == []


@pytest.mark.parametrize(
    "body",
    [chat() | {"k" * 100_000: 1}, chat(stream=True, stream_options={"k" * 100_000: 1}), chat(metadata={"k" * 999: 1})],
)
async def test_a_long_name_is_not_sent_back_whole(body: dict[str, Any]) -> None:
    async with harness().http() as client:
        reply = await client.post(CHAT, json=body)
    error = reply.json()["error"]
    assert reply.status_code == 400
    assert error["param"].endswith("k…")
    assert error["param"] in error["message"]
    assert len(reply.content) < 500


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("model", ["small", "auto"])
async def test_a_limit_is_called_what_the_client_calls_it(model: str, name: str) -> None:
    refusal = InvalidRequest("the prompt's 9 tokens and max_tokens = 600 together exceed the limit", "max_tokens")
    h = harness(backend=FakeBackend(error=refusal))
    older = {"max_tokens": 3} if name == "max_completion_tokens" else {}  # the newer name wins
    async with h.http() as client:
        too_large = await client.post(CHAT, json=chat(model=model) | older | {name: 600})
        too_small = await client.post(CHAT, json=chat(model=model, min_tokens=5) | older | {name: 4})
    error = too_large.json()["error"]
    assert (too_large.status_code, error["param"]) == (400, name)
    assert re.findall(r"max_\w+", error["message"]) == [name]
    error = too_small.json()["error"]
    assert (error["param"], re.findall(r"max_\w+", error["message"])) == ("min_tokens", [name])


BAD_BYTES = [
    b"",
    b"{",
    b'{"model": "small"',
    b"[]",
    b"null",
    b'"text"',
    b"\xff\xfe",
    b'{"model": "\xff"}',
    b'{"model": "\\ud800", "prompt": "a"}',
    b'{"model": "small", "prompt": "a", "temperature": 1e400}',
    b'{"model": "small", "prompt": "a", "temperature": NaN}',
    b'{"model": "small", "prompt": "a", "max_tokens": 1' + b"0" * 5000 + b"}",
    b"[" * 100_000,
    b'{"a":' * 50_000,
]


@pytest.mark.parametrize("content", BAD_BYTES, ids=range(len(BAD_BYTES)))
async def test_bytes_that_are_no_request(content: bytes) -> None:
    h = harness()
    async with h.http() as client:
        reply = await client.post(TEXT, content=content, headers={"content-type": "application/json"})
    assert reply.status_code == 400
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
    assert len(reply.json()["error"]["message"]) < 300
    assert h.backend.attempts == []


async def test_a_body_beyond_the_limit_with_and_without_a_declared_length() -> None:
    h = harness(settings={"max_body_bytes": 1000})

    async def in_pieces() -> Any:
        for _ in range(20):
            yield b" " * 100

    async with h.http() as client:
        declared = await client.post(TEXT, content=b" " * 1001, headers={"content-type": "application/json"})
        streamed = await client.post(TEXT, content=in_pieces(), headers={"content-type": "application/json"})
        fits = await client.post(TEXT, json=text())
    assert (declared.status_code, streamed.status_code, fits.status_code) == (413, 413, 200)
    assert declared.json()["error"]["code"] == "request_too_large"


async def test_only_json_is_taken() -> None:
    """A page in a browser could otherwise post to a loopback address without asking."""
    async with harness().http() as client:
        reply = await client.post(TEXT, content=json.dumps(text()), headers={"content-type": "text/plain"})
        plain = await client.post(
            TEXT, content=json.dumps(text()), headers={"content-type": "application/json; charset=utf-8"}
        )
        nothing = await client.post(TEXT, content=json.dumps(text()))
    assert (reply.status_code, plain.status_code, nothing.status_code) == (415, 200, 415)
    assert "'content-type: application/json' is missing" in nothing.json()["error"]["message"]
    assert "'content-type'" in reply.json()["error"]["message"]


async def test_unknown_models_paths_and_methods() -> None:
    async with harness().http() as client:
        model = await client.post(CHAT, json=chat(model="gpt-9"))
        embedder = await client.post("/v1/embeddings", json={"model": "small", "input": "a"})
        path = await client.get("/v2/nothing")
        slash = await client.post("/v1/completions/", json=text())
        method = await client.get(CHAT)
        other_method = await client.delete("/health")
    assert (model.status_code, model.json()["error"]["code"]) == (404, "model_not_found")
    assert (embedder.status_code, embedder.json()["error"]["code"]) == (404, "model_not_found")
    assert (path.status_code, slash.status_code) == (404, 404)
    assert (method.status_code, method.headers["allow"]) == (405, "POST")
    assert (other_method.status_code, other_method.headers["allow"]) == (405, "GET")
    for reply in (model, embedder, path, slash, method, other_method):
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


async def test_strange_but_valid_text_passes() -> None:
    h = harness()
    async with h.http() as client:
        reply = await client.post(CHAT, json=chat("nul \x00, emoji \U0001f600, \u202e, \ufffd"))
    assert reply.status_code == 200
    prompt = h.backend.attempts[0].prompt
    assert isinstance(prompt, ChatPrompt)
    assert prompt.messages[0]["content"].startswith("nul \x00")


async def test_fields_that_do_not_change_the_answer_are_accepted() -> None:
    ignored: dict[str, Any] = {
        "store": True,
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "parallel_tool_calls": True,
        "user": "u",
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "prompt_cache_options": {"mode": "explicit", "ttl": "30m"},
        "verbosity": "low",
        "reasoning_effort": "none",
        "tools": [],
        "tool_choice": "auto",
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "functions": None,
        "audio": None,
        "moderation": None,
        "echo": False,
    }
    async with harness().http() as client:
        reply = await client.post(CHAT, json=chat(**ignored))
    assert reply.status_code == 200, reply.text
