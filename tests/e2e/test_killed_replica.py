"""A replica killed with streams in flight costs the client nothing."""

from __future__ import annotations

import asyncio
import re
import signal
from collections.abc import Awaitable
from dataclasses import dataclass, field

import httpx
import pytest
from openai import APIStatusError, AsyncOpenAI

from tests.e2e.conftest import Server

pytestmark = pytest.mark.e2e

NUM_STREAMS = 16
BF16_TOKENS = 1500
"""Of a model that needs a millisecond or two for each: the first stream must not end before the last has begun."""
USER = {"role": "user", "content": "Who asks?"}
NO_CACHE = {"cache-control": "no-cache, no-store"}


def client_of(server: Server) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", default_headers=NO_CACHE, max_retries=0)


@dataclass
class Streamed:
    text: str = ""
    tokens: list[str] = field(default_factory=list)
    completion_tokens: int = 0


def text_of_token(token: str) -> str:
    """With U+FFFD for what is no character of its own."""
    if not token.startswith("bytes:"):
        return token
    return bytes.fromhex(token.removeprefix("bytes:").replace("\\x", "")).decode(errors="replace")


async def answer(client: AsyncOpenAI, model: str, i: int, num_tokens: int, streamed: Streamed) -> Streamed:
    """Even streams are greedy, odd ones drawn with a seed."""
    stream = await client.completions.create(
        model=model,
        prompt=f"Story number {i}: once upon a time",
        max_tokens=num_tokens,
        temperature=0 if i % 2 == 0 else 1,
        seed=i,
        logprobs=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    async for chunk in stream:
        for choice in chunk.choices:
            streamed.text += choice.text
            streamed.tokens += (choice.logprobs and choice.logprobs.tokens) or []
        if chunk.usage:
            streamed.completion_tokens = chunk.usage.completion_tokens
    return streamed


async def status_of(request: Awaitable[Streamed]) -> int:
    try:
        await request
    except APIStatusError as refused:
        assert refused.response.headers["retry-after"]  # noqa: PT017 (who is refused is told when to come back)
        return refused.status_code
    return 200


async def answers_with_a_death(client: AsyncOpenAI, server: Server, model: str, num_tokens: int) -> list[Streamed]:
    """All streams; one of the model's two replicas is killed once each of them has begun and none has ended."""
    victim = server.replicas(f"model-{model}", 2)[0]
    partial = [Streamed() for _ in range(NUM_STREAMS)]
    tasks = [asyncio.create_task(answer(client, model, i, num_tokens, partial[i])) for i in range(NUM_STREAMS)]
    while not all(p.tokens for p in partial):  # noqa: ASYNC110 (the streams count, they set no event)
        await asyncio.sleep(0.005)
    assert not any(t.done() for t in tasks), "all streams are in flight when the replica dies"
    victim.send_signal(signal.SIGKILL)
    return await asyncio.gather(*tasks)


@pytest.mark.timeout(300)
async def test_killed_replica_changes_no_token_in_fp32(server: Server) -> None:
    async with client_of(server) as client:
        calm = [answer(client, "smollm2-135m", i, 48, Streamed()) for i in range(NUM_STREAMS)]
        expected = await asyncio.gather(*calm)
        assert all(e.completion_tokens == 48 for e in expected)
        assert await answers_with_a_death(client, server, "smollm2-135m", 48) == expected
    server.replicas("model-smollm2-135m", 2)


@pytest.mark.timeout(300)
async def test_killed_replica_loses_and_repeats_no_token_in_bf16(server: Server) -> None:
    """Rounding may take another turn after the seam; what must hold is that the seam neither drops nor repeats."""
    async with client_of(server) as client:
        for streamed in await answers_with_a_death(client, server, "tiny-bf16", BF16_TOKENS):
            assert streamed.completion_tokens == len(streamed.tokens) == BF16_TOKENS
            # A token that is part of a character is shown by its bytes; what is whole must be there in order and once.
            shown = [token for token in streamed.tokens if not token.startswith("<|")]  # special tokens have no text
            whole = re.escape("".join(map(text_of_token, shown))).replace("\ufffd", ".?")
            assert re.fullmatch(whole, streamed.text, re.DOTALL), (streamed.tokens, streamed.text)
    server.replicas("model-tiny-bf16", 2)


@pytest.mark.timeout(300)
async def test_an_answer_waits_for_the_replacement_of_a_lone_replica(server: Server) -> None:
    async with client_of(server) as client:
        (victim,) = server.replicas("model-tiny", 1)
        expected = await answer(client, "tiny", 1, 400, Streamed())
        partial = Streamed()
        task = asyncio.create_task(answer(client, "tiny", 1, 400, partial))
        while len(partial.tokens) < 3:  # noqa: ASYNC110 (the stream sets no event)
            await asyncio.sleep(0.005)
        assert not task.done()
        victim.send_signal(signal.SIGKILL)
        statuses = [await status_of(answer(client, "tiny", 2, 4, Streamed())) for _ in range(2)]
        assert set(statuses) <= {200, 503}, "refused until the replacement is there"
        assert await task == expected


@pytest.mark.timeout(300)
async def test_a_lost_cache_costs_a_miss(server: Server) -> None:
    question: dict[str, object] = {"model": "tiny", "max_tokens": 4, "temperature": 0, "messages": [USER]}
    async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:
        server.replicas("semantic-cache", 1)[0].send_signal(signal.SIGKILL)
        for i in range(20):
            reply = await client.post("/v1/chat/completions", json=question | {"seed": i})
            assert reply.status_code == 200
            assert reply.headers["x-millrace-cache"] == "miss"
    server.replicas("semantic-cache", 1)
