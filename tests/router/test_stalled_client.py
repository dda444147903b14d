"""Who keeps a flight: an answer that is made, however long that takes, and not one that waits for its client.

Gateway, the client of the cache and the cache itself are real; the handle calls the cache in this process."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import router.server
from cache.decision import ThresholdDecision
from cache.index import VectorIndex
from cache.semantic_cache import CacheSettings, SemanticCache
from cache.store import SqliteStore
from router.server import CacheClient
from tests.cache.cache_fakes import WordEmbedder
from tests.cache.test_cache_client import InProcessHandle
from tests.router.fake_backend import FakeBackend
from tests.router.gateway_harness import Exchange, Harness, harness

LEASE_S = 0.4
COMPLETION = {"model": "small", "prompt": "four", "seed": 3, "temperature": 0, "max_tokens": 40}


@contextlib.asynccontextmanager
async def gateway_with_cache(
    folder: Path, monkeypatch: pytest.MonkeyPatch, stall_after: int | None
) -> AsyncIterator[tuple[Harness, SemanticCache]]:
    monkeypatch.setattr(router.server, "RENEWAL_PERIOD_S", LEASE_S / 8)
    store, embedder = SqliteStore(str(folder / "cache.sqlite")), WordEmbedder()
    settings = CacheSettings(flight_lease_s=LEASE_S)
    cache = SemanticCache(store, embedder, VectorIndex(embedder.dim), ThresholdDecision(0.9), settings)
    await cache.start()
    client = CacheClient(InProcessHandle(cache))
    await client.start()
    h = harness(backend=FakeBackend(stall_after=stall_after), cache_client=client)
    try:
        yield h, cache
    finally:
        await h.gateway.close()
        await client.close()
        await cache.close()


def post(h: Harness, **more: Any) -> Exchange:
    return Exchange(h.app, "/v1/completions", json.dumps({**COMPLETION, **more}).encode())


async def test_a_client_that_does_not_read_loses_its_flight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with gateway_with_cache(tmp_path, monkeypatch, stall_after=None) as (h, cache):
        stalled = post(h, stream=True)
        stalled.parts = asyncio.Queue(maxsize=1)
        await h.until_open(1)
        other = post(h)
        await asyncio.wait_for(other.task, 10 * LEASE_S)
        assert other.reply_headers["x-millrace-cache"] == "miss"
        again = post(h)
        await again.task
        assert again.reply_headers["x-millrace-cache"] == "hit-exact"
        stalled.leave()
        await stalled.task
        await h.gateway.close()
        assert cache.stats().num_flights == 0


@pytest.mark.parametrize("stall_after", [0, 2])
async def test_an_answer_that_is_awaited_keeps_its_flight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stall_after: int
) -> None:
    """Queued before its first chunk, or held up between two."""
    async with gateway_with_cache(tmp_path, monkeypatch, stall_after) as (h, _):
        leader = post(h, stream=True)
        await h.until_open(1)
        others = [post(h) for _ in range(3)]
        await asyncio.sleep(4 * LEASE_S)
        assert len(h.backend.attempts) == 1
        h.backend.release.set()
        await asyncio.gather(leader.task, *(other.task for other in others))
        assert [other.reply_headers["x-millrace-cache"] for other in others] == ["hit-exact"] * 3
