"""The semantic cache as the class of a Serve deployment: puts the parts together and passes calls on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cache.types import CachedAnswer, CacheMiss, CacheQuery, LookupResult
from replicas.logs import log_like_serve


@dataclass(frozen=True, slots=True)
class CacheServerConfig:
    embedder: str
    sqlite_path: str
    redis_url: str | None
    ttl_s: float
    max_entries: int
    max_bytes: int
    similarity_threshold: float


class CacheServer:
    async def __init__(self, config: CacheServerConfig) -> None:  # type: ignore[misc]
        log_like_serve("cache")
        # Imported here: a gateway reads this module for the deployment's name and must load no torch.
        from cache.decision import ThresholdDecision
        from cache.embedder import Embedder, EmbedderConfig
        from cache.index import VectorIndex
        from cache.semantic_cache import CacheSettings, SemanticCache
        from cache.store import RedisStore, SqliteStore, Store

        embedder = Embedder(EmbedderConfig(config.embedder))
        store: Store
        if config.redis_url is not None:
            store = RedisStore(config.redis_url, namespace="millrace")
        else:
            store = SqliteStore(config.sqlite_path)
        self._cache = SemanticCache(
            store=store,
            embedder=embedder,
            index=VectorIndex(embedder.dim),
            decision=ThresholdDecision(config.similarity_threshold),
            settings=CacheSettings(ttl_s=config.ttl_s, max_entries=config.max_entries, max_bytes=config.max_bytes),
        )
        await self._cache.start()

    async def lookup(self, query: CacheQuery) -> LookupResult:
        return await self._cache.lookup(query)

    async def store(self, query: CacheQuery, miss: CacheMiss, answer: CachedAnswer) -> None:
        await self._cache.store(query, miss, answer)

    async def renew(self, flights: Sequence[str]) -> None:
        await self._cache.renew(flights)

    async def abandon(self, miss: CacheMiss) -> None:
        await self._cache.abandon(miss)

    async def embed(self, texts: Sequence[str], first: int = 0) -> tuple[list[tuple[float, ...]], int]:
        return await self._cache.embed(texts, first)

    async def stats(self) -> Any:
        return self._cache.stats()

    async def __del__(self) -> None:
        if hasattr(self, "_cache"):
            await self._cache.close()
