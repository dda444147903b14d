"""The gateway's client of the cache, over a handle that calls the cache in this process instead of through Serve."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import router.server
from cache.decision import ThresholdDecision
from cache.index import VectorIndex
from cache.semantic_cache import CacheSettings, SemanticCache
from cache.store import SqliteStore
from cache.types import CachedAnswer, CacheHit, CacheMiss, CacheQuery
from router.server import CacheClient
from tests.cache.cache_fakes import Clock, WordEmbedder

QUERY = CacheQuery("p/why", "p", "why")


class InProcessHandle:
    """What the client uses of a Serve handle."""

    def __init__(self, cache: SemanticCache) -> None:
        self._cache = cache

    def __getattr__(self, method: str) -> Any:
        call: Callable[..., Coroutine[Any, Any, Any]] = getattr(self._cache, method)
        return SimpleNamespace(remote=lambda *arguments: asyncio.ensure_future(call(*arguments)))

    def options(self, **options: Any) -> InProcessHandle:
        return self

    def broadcast(self, method: str) -> Any:
        async def results_async(**options: Any) -> list[Any]:
            return [getattr(self._cache, method)()]

        return SimpleNamespace(results_async=results_async)


@contextlib.asynccontextmanager
async def connected(folder: Path, **settings: Any) -> AsyncIterator[tuple[CacheClient, SemanticCache]]:
    embedder = WordEmbedder()
    store = SqliteStore(str(folder / "cache.sqlite"))
    decision = ThresholdDecision(0.8)
    cache = SemanticCache(store, embedder, VectorIndex(embedder.dim), decision, CacheSettings(**settings), Clock())
    await cache.start()
    client = CacheClient(InProcessHandle(cache))
    await client.start()
    try:
        yield client, cache
        await cache.check_integrity()
    finally:
        await client.close()
        await cache.close()


async def test_a_long_answer_keeps_its_flight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router.server, "RENEWAL_PERIOD_S", 0.05)
    async with connected(tmp_path, flight_lease_s=0.5) as (client, cache):
        miss = await client.lookup(QUERY)
        assert isinstance(miss, CacheMiss)
        waiters = [asyncio.create_task(client.lookup(QUERY)) for _ in range(5)]
        with client.awaiting(miss):
            await asyncio.sleep(1.5)  # three leases
        assert not any(waiter.done() for waiter in waiters)
        await client.store(QUERY, miss, CachedAnswer("Because.", "model", 5, 2, 0.001))
        hits = await asyncio.gather(*waiters)
        assert [isinstance(hit, CacheHit) for hit in hits] == [True] * 5
        assert cache.stats().counts["miss"] == 1


async def test_a_flight_given_back_is_renewed_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router.server, "RENEWAL_PERIOD_S", 0.05)
    async with connected(tmp_path, flight_lease_s=0.5) as (client, cache):
        asker = asyncio.create_task(client.lookup(QUERY))
        await asyncio.sleep(0)  # the lookup is on its way …
        asker.cancel()  # … when its asker leaves
        with pytest.raises(asyncio.CancelledError):
            await asker
        heir = await client.lookup(QUERY)
        assert isinstance(heir, CacheMiss)
        await client.abandon(heir)
        assert cache.stats().num_flights == 0
