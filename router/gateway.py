"""The story of a request, from a parsed question to a stream of chunks: look up, choose, stream, store.

Knows no HTTP (`app.py`) and no Ray (`server.py`): its neighbours are the two protocols below.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from cache.types import CachedAnswer, CacheMiss, CacheQuery, LookupResult
from replicas.types import Chunk, GenerateRequest, Prompt, ReplicaStats


class Backend(Protocol):
    """The model replicas. `router/server.py` implements it with Serve handles."""

    def stream_once(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        """One attempt on one replica. Raises `ReplicaUnavailable` when that replica is lost, before or amid the
        stream, and the request's own error (`InvalidRequest`, `Overloaded`, `EngineError`) otherwise.
        Closing the iterator aborts the request."""
        ...

    def stats(self, model: str) -> Sequence[ReplicaStats]:
        """The latest reading of each running replica of `model` (at most a second or two old); empty: none runs."""
        ...

    async def tokenize(self, model: str, prompt: Prompt, add_special_tokens: bool) -> tuple[list[int], int]:
        """Token ids, and the model's context length."""
        ...

    async def detokenize(self, model: str, token_ids: Sequence[int]) -> str: ...


class Cache(Protocol):
    """The semantic cache. `cache/server.py`'s deployment implements it; a lost cache is a miss, never an error."""

    async def lookup(self, query: CacheQuery) -> LookupResult: ...

    async def store(self, query: CacheQuery, miss: CacheMiss, answer: CachedAnswer) -> None: ...

    async def abandon(self, miss: CacheMiss) -> None:
        """The answer will not come (error, cancel, not storable): let the next waiter lead."""
        ...

    async def embed(self, texts: Sequence[str]) -> tuple[list[tuple[float, ...]], int]:
        """L2-normalised embeddings, and the number of tokens read."""
        ...
