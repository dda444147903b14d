"""The official openai client against the app: every call, streaming and not."""

from __future__ import annotations

import random
from typing import Any

import openai
import pytest

from tests.router.fake_backend import CONTEXT
from tests.router.gateway_harness import chat, harness

MESSAGES = chat()["messages"]


async def test_chat_streamed_equals_whole_for_many_requests() -> None:
    client = harness(with_cache=False).openai()
    rng = random.Random(0)
    for index in range(60):
        options: dict[str, Any] = {
            "model": rng.choice(["small", "large", "auto", "tiny"]),
            "messages": [{"role": "user", "content": f"question {index}"}],
            "seed": rng.randint(-(2**63), 2**63 - 1),
            "n": rng.randint(1, 3),
            "temperature": rng.choice([0.0, 0.7, 1.0]),
            "max_tokens": rng.choice([None, 1, 5, 100]),
        }
        whole = await client.chat.completions.create(**options)
        texts = [""] * options["n"]
        reasons: list[str | None] = [None] * options["n"]
        stream = await client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
        usage = None
        async for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
                reasons[choice.index] = choice.finish_reason or reasons[choice.index]
            usage = chunk.usage or usage
        assert texts == [choice.message.content for choice in whole.choices]
        assert reasons == [choice.finish_reason for choice in whole.choices]
        assert usage == whole.usage
        assert usage.prompt_tokens_details is not None
        assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens // 2


async def test_the_stream_helper_and_raw_headers() -> None:
    client = harness().openai()
    async with client.chat.completions.stream(model="small", messages=MESSAGES, seed=1) as stream:
        events = [event async for event in stream]
        final = await stream.get_final_completion()
    whole = await client.chat.completions.with_raw_response.create(model="small", messages=MESSAGES, seed=1)
    assert final.choices[0].message.content == whole.parse().choices[0].message.content
    assert events
    assert whole.headers["x-millrace-route-reason"] == "requested"


async def test_chat_logprobs() -> None:
    client = harness().openai()
    options = {"model": "small", "messages": MESSAGES, "seed": 4, "logprobs": True, "top_logprobs": 2}
    whole = await client.chat.completions.create(**options)
    stream = await client.chat.completions.create(**options, stream=True)
    streamed = [entry async for chunk in stream for entry in (chunk.choices[0].logprobs or _None).content or []]
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content == streamed
    assert "".join(entry.token for entry in streamed) == whole.choices[0].message.content
    assert all(len(entry.top_logprobs) == 2 for entry in streamed)
    assert all(bytes(entry.bytes or []).decode() == entry.token for entry in streamed)


class _None:
    content = None


async def test_completions_with_several_prompts_echo_and_logprobs() -> None:
    client = harness().openai()
    prompts = ["the mill", "the river"]
    both = await client.completions.create(model="small", prompt=prompts, n=2, seed=7, max_tokens=5)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    for p, prompt in enumerate(prompts):
        alone = await client.completions.create(model="small", prompt=prompt, n=2, seed=7, max_tokens=5)
        assert [c.text for c in alone.choices] == [c.text for c in both.choices[2 * p : 2 * p + 2]]
    assert both.usage is not None
    assert both.usage.prompt_tokens == sum(map(len, prompts))

    echoed = await client.completions.create(model="small", prompt=prompts, n=2, seed=7, max_tokens=5, echo=True)
    assert [c.text for c in echoed.choices] == [prompts[i // 2] + c.text for i, c in enumerate(both.choices)]
    texts = [""] * 4
    async for chunk in await client.completions.create(
        model="small", prompt=prompts, n=2, seed=7, max_tokens=5, echo=True, stream=True
    ):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in echoed.choices]

    logged = await client.completions.create(model="small", prompt="the mill", logprobs=2, seed=7, max_tokens=5)
    logprobs = logged.choices[0].logprobs
    assert logprobs is not None
    assert "".join(logprobs.tokens or []) == logged.choices[0].text
    ends = [start + len(token) for start, token in zip(logprobs.text_offset or [], logprobs.tokens or [], strict=True)]
    assert (logprobs.text_offset or [])[1:] == ends[:-1]
    assert min(logprobs.token_logprobs or []) >= -9999.0
    offsets: list[int] = []
    async for chunk in await client.completions.create(
        model="small", prompt="the mill", logprobs=2, seed=7, max_tokens=5, stream=True
    ):
        if chunk.choices[0].logprobs is not None:
            offsets += chunk.choices[0].logprobs.text_offset or []
    assert offsets == logprobs.text_offset


async def test_completions_default_to_sixteen_tokens_and_take_token_ids() -> None:
    h = harness()
    client = h.openai()
    await client.completions.create(model="small", prompt=[1, 2, 3])
    echoed = await client.completions.create(model="small", prompt=[[1, 2], [3]], echo=True, max_tokens=3)
    assert h.backend.attempts[0].sampling.max_tokens == 16
    assert echoed.choices[0].text.startswith(" rivermill")


async def test_embeddings_in_both_encodings() -> None:
    client = harness().openai()
    default = await client.embeddings.create(model="minilm", input=["a", "bb"])
    as_float = await client.embeddings.create(model="minilm", input=["a", "bb"], encoding_format="float", dimensions=3)
    for one, other in zip(default.data, as_float.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding, abs=1e-6)
    assert default.usage.prompt_tokens == 3


async def test_models() -> None:
    client = harness().openai()
    assert [model.id async for model in await client.models.list()] == ["small", "large", "auto", "minilm"]
    assert (await client.models.retrieve("tiny")).id == "small"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("none")


async def test_errors_are_the_clients_own_exceptions() -> None:
    h = harness(settings={"max_body_bytes": 20_000})
    client = h.openai()
    with pytest.raises(openai.BadRequestError) as bad:
        await client.chat.completions.create(model="small", messages=MESSAGES, temperature=9)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as too_long:
        await client.chat.completions.create(model="small", messages=[{"role": "user", "content": "a" * CONTEXT}])
    assert too_long.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        await client.chat.completions.create(model="none", messages=MESSAGES)
    h.backend.down.add("small")
    with pytest.raises(openai.InternalServerError) as down:
        await client.chat.completions.create(model="small", messages=MESSAGES)
    assert down.value.status_code == 503


async def test_a_late_failure_reaches_the_clients_iterator() -> None:
    h = harness()
    h.backend.error_after = (1, RuntimeError("a secret"))
    stream = await h.openai().chat.completions.create(model="small", messages=MESSAGES, stream=True)
    with pytest.raises(openai.APIError) as caught:
        _ = [chunk async for chunk in stream]
    assert "secret" not in str(caught.value)
