"""A replica killed with streams in flight costs the client nothing."""

from __future__ import annotations

import asyncio
import signal

import pytest
from openai import AsyncOpenAI

from tests.e2e.conftest import Server, wait_until

pytestmark = pytest.mark.e2e

NUM_STREAMS = 16
NUM_TOKENS = 48


async def answer(client: AsyncOpenAI, i: int, received: list[int]) -> str:
    """Even streams are greedy, odd ones drawn with a seed."""
    stream = await client.completions.create(
        model="smollm2-135m",
        prompt=f"Story number {i}: once upon a time",
        max_tokens=NUM_TOKENS,
        temperature=0 if i % 2 == 0 else 1,
        seed=i,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    text, completion_tokens = "", 0
    async for chunk in stream:
        if chunk.choices:
            text += chunk.choices[0].text
            received[i] += 1
        if chunk.usage:
            completion_tokens = chunk.usage.completion_tokens
    assert completion_tokens == NUM_TOKENS
    return text


@pytest.mark.timeout(300)
async def test_killed_replica_loses_no_stream_and_no_token(server: Server) -> None:
    headers = {"cache-control": "no-cache, no-store"}
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", default_headers=headers, max_retries=0) as client:
        received = [0] * NUM_STREAMS
        expected = await asyncio.gather(*[answer(client, i, received) for i in range(NUM_STREAMS)])

        received = [0] * NUM_STREAMS
        streams = [asyncio.create_task(answer(client, i, received)) for i in range(NUM_STREAMS)]
        while min(received) < 3:  # noqa: ASYNC110 (the streams count, they set no event)
            await asyncio.sleep(0.01)
        replicas = server.replicas("smollm2-135m")
        assert len(replicas) == 2
        assert not any(s.done() for s in streams), "all streams are in flight when the replica dies"
        replicas[0].send_signal(signal.SIGKILL)
        assert await asyncio.gather(*streams) == expected
    wait_until(lambda: len(server.replicas("smollm2-135m")) == 2, timeout_s=60)
