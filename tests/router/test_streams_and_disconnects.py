"""What is flushed when, and what a client that leaves sets free: over bare ASGI, message by message."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest

from replicas.types import Chunk, GenerateRequest
from tests.router.fake_backend import FakeBackend
from tests.router.gateway_harness import Exchange, Harness, chat, harness


def post(h: Harness, **more: object) -> Exchange:
    return Exchange(h.app, "/v1/chat/completions", json.dumps(chat("four", seed=3, **more)).encode())


async def settle(h: Harness) -> None:
    for _ in range(20):
        await asyncio.sleep(0)
    await h.gateway.close()


async def test_the_first_token_is_flushed_at_once() -> None:
    h = harness(backend=FakeBackend(stall_after=1))
    exchange = post(h, stream=True)
    first = await asyncio.wait_for(exchange.parts.get(), 5)
    assert exchange.status == 200
    assert json.loads(first.removeprefix(b"data: "))["choices"][0]["delta"]["role"] == "assistant"
    assert not exchange.task.done()
    h.backend.release.set()
    await exchange.task
    assert h.backend.num_open == 0


@pytest.mark.parametrize("is_streaming", [True, False])
@pytest.mark.parametrize("stall_after", [0, 2])
@pytest.mark.parametrize("n", [1, 3])
async def test_a_client_that_leaves_frees_everything(is_streaming: bool, stall_after: int, n: int) -> None:
    h = harness(backend=FakeBackend(stall_after=stall_after), settings={"max_concurrent": 1, "max_queued": 0})
    exchange = post(h, stream=is_streaming, temperature=0 if n == 1 else 1, n=n)
    await h.until_open(n)
    exchange.leave()
    await asyncio.wait_for(exchange.task, 5)
    await settle(h)
    assert h.backend.num_open == 0
    assert h.cache.flights == set()
    assert h.metric('millrace:http_requests_total{route="/v1/chat/completions",status="499"}') == 1
    h.backend.release.set()
    again = post(h)  # the only place in the gateway is free again
    await asyncio.wait_for(again.task, 5)
    assert again.status == 200


@pytest.mark.parametrize("is_streaming", [True, False])
async def test_a_cancelled_handler_frees_everything(is_streaming: bool) -> None:
    """How a server other than uvicorn tells that a client left."""
    h = harness(backend=FakeBackend(stall_after=2))
    exchange = post(h, stream=is_streaming, temperature=0)
    await h.until_open(1)
    exchange.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await exchange.task
    await settle(h)
    assert (h.backend.num_open, h.cache.flights) == (0, set())


@pytest.mark.parametrize("num_steps", range(0, 60, 3))
async def test_leaving_at_any_moment_loses_nothing(num_steps: int) -> None:
    h = harness(settings={"max_concurrent": 2, "max_queued": 4})
    exchanges = [post(h, stream=bool(index % 2), temperature=0, n=1 + index % 3) for index in range(6)]
    for _ in range(num_steps):
        await asyncio.sleep(0)
    for index, exchange in enumerate(exchanges):
        if index % 2:
            exchange.leave()
        else:
            exchange.task.cancel()
    await asyncio.gather(*(exchange.task for exchange in exchanges), return_exceptions=True)
    await settle(h)
    assert (h.backend.num_open, h.cache.flights) == (0, set())
    after = [post(h) for _ in range(6)]
    await asyncio.wait_for(asyncio.gather(*(exchange.task for exchange in after)), 10)
    assert [exchange.status for exchange in after] == [200] * 6


async def test_a_full_gateway_answers_429_and_a_stream_holds_its_place() -> None:
    h = harness(backend=FakeBackend(stall_after=1), settings={"max_concurrent": 1, "max_queued": 1})
    stream = post(h, stream=True)
    await stream.parts.get()
    queued = post(h)
    await settle(h)
    refused = post(h)
    await refused.task
    assert refused.status == 429
    assert int(refused.reply_headers["retry-after"]) >= 1
    assert json.loads(refused.parts.get_nowait())["error"]["type"] == "rate_limit_error"
    assert h.metric("millrace:admission_rejections_total") == 1
    assert not queued.task.done()
    h.backend.release.set()
    await asyncio.gather(stream.task, queued.task)
    assert (stream.status, queued.status) == (200, 200)


async def test_a_slow_client_holds_its_replica_back() -> None:
    class Endless(FakeBackend):
        num_sent = 0

        async def stream_once(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
            while True:
                self.num_sent += 1
                yield Chunk((1,), "x")
                await asyncio.sleep(0)

    backend = Endless()
    h = harness(backend=backend)
    exchange = post(h, stream=True, n=3)
    exchange.parts = asyncio.Queue(maxsize=1)
    for _ in range(500):
        await asyncio.sleep(0)
    assert backend.num_sent < 20
    exchange.leave()
    await exchange.task
