"""The gateway as a Serve ingress: handles to replicas and cache behind the protocols of `gateway.py`.

The only file of the router that knows Ray. It translates Ray's failures into the tree of `replicas.types` and decides
nothing: resumption is `failover.py`'s, fallback is `gateway.py`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from fastapi import FastAPI
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from cache.types import FLIGHT_LEASE_S, CachedAnswer, CacheMiss, CacheQuery, LookupResult
from replicas.logs import log_like_serve
from replicas.types import (
    Chunk,
    EngineError,
    GenerateRequest,
    MillraceError,
    ModelNotFound,
    Overloaded,
    Prompt,
    ReplicaStats,
    ReplicaUnavailable,
)
from router.app import create_app
from router.catalog import Catalog
from router.failover import NoReplicaRunning
from router.gateway import Gateway
from router.metrics import GatewayMetrics
from router.policy import RoutingPolicy
from router.quality import FirstEstimate
from router.settings import GatewaySettings

logger = logging.getLogger("ray.serve")

STATS_PERIOD_S = 1.0
MAX_READING_AGE_S = 60.0
CALL_TIMEOUT_S = 30.0
MAX_TEXTS_PER_CALL = 128
"""Of embeddings: Ray's replies between replicas end at 4 MiB."""
SLOWEST_EMBEDDING_S = 0.1
"""Of a text that fills the embedder's window, on a busy core."""
LOOKUP_TIMEOUT_S = 120.0
"""A lookup may wait for an identical request in flight: as long as a long answer takes. Then its asker goes alone."""
RENEWAL_PERIOD_S = FLIGHT_LEASE_S / 3
UPDATE_TIMEOUT_S = 2.0

T = TypeVar("T")
Reading = TypeVar("Reading")


@dataclass(frozen=True, slots=True)
class GatewayServerConfig:
    settings: GatewaySettings
    catalog: Catalog
    policy: RoutingPolicy


class GatewayServer:
    """The ingress: Serve hands it the handles, it hands Serve an ASGI application."""

    def __init__(
        self,
        config: GatewayServerConfig,
        models: Mapping[str, DeploymentHandle[Any]],
        cache: DeploymentHandle[Any] | None,
    ) -> None:
        log_like_serve("millrace")
        self._config = config
        self._backend = ReplicaBackend(models)
        self._cache = CacheClient(cache) if cache is not None else None
        self._gateway: Gateway | None = None

    async def __serve_build_asgi_app__(self) -> FastAPI:
        # Serve's hook: called on the replica's own loop, after __init__ and before the first request.
        await self._backend.start()
        if self._cache is not None:
            await self._cache.start()
        config = self._config
        self._gateway = Gateway(
            backend=self._backend,
            cache=self._cache,
            catalog=config.catalog,
            policy=config.policy,
            quality=FirstEstimate(),
            settings=config.settings,
            metrics=GatewayMetrics([m.id for m in config.catalog.models], self._backend.stats),
        )
        return create_app(self._gateway, config.settings)

    async def __del__(self) -> None:
        # Serve has already waited for running streams (graceful_shutdown_timeout_s) when it calls this.
        if self._gateway is not None:
            await self._gateway.close()
        if self._cache is not None:
            await self._cache.close()
        await self._backend.close()


class Deployment(Generic[Reading]):
    """One Serve deployment as seen from here: its handle, and what its replicas last said of themselves.

    Serve lets a call to a deployment without replicas wait for as long as there are none; `result` and `first_of` end
    that wait, because who asks may have somewhere else to go.
    """

    def __init__(self, name: str, handle: DeploymentHandle[Any]) -> None:
        self.name = name
        self.handle = handle
        # Configured once: `.options()` is costly.
        self.generate = handle.options(method_name="generate", stream=True)
        self._readings: tuple[Reading, ...] = ()
        self._read_at_s = 0.0
        self._is_doubtful = asyncio.Event()

    def readings(self) -> tuple[Reading, ...]:
        """Of each running replica; empty: none runs, or none has answered for `MAX_READING_AGE_S`."""
        return self._readings if self.reading_age_s() < MAX_READING_AGE_S else ()

    def reading_age_s(self) -> float:
        return time.monotonic() - self._read_at_s

    async def read_forever(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STATS_PERIOD_S):
                    await self._is_doubtful.wait()
            self._is_doubtful.clear()
            await self.read()

    async def read(self) -> None:
        try:
            answers = await self.handle.broadcast("stats").results_async(timeout_s=5.0, return_exceptions=True)
        except TimeoutError:  # somebody was too slow: the others' last word stands until it is too old
            return
        except DeploymentUnavailableError:  # Serve's word for: there are no replicas
            answers = []
        except Exception as error:  # the controller is away; the replicas may well be there
            logger.debug(f"stats of {self.name}: {error!r}")
            return
        self._readings = tuple(a for a in answers if not isinstance(a, BaseException))
        self._read_at_s = time.monotonic()

    async def result(self, response: Awaitable[T], timeout_s: float) -> T:
        """Of one call. Raises the tree of `replicas.types`, `ReplicaUnavailable` where nobody is left to answer it."""
        try:
            async with asyncio.timeout(timeout_s):
                return await self._while_it_runs(response)
        except Exception as error:
            raise self._translated(error) from None

    async def stream(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        """The chunks of `generate`, cancelled when the iterator is closed. Raises as `result` does."""
        if not self._readings:
            raise NoReplicaRunning(f"No replica of {self.name} is running.")
        response = self.generate.remote(request)
        try:
            chunks = aiter(response)
            yield await self._while_it_runs(anext(chunks))
            async for chunk in chunks:
                yield chunk
        except StopAsyncIteration:
            return
        except Exception as error:
            raise self._translated(error) from None
        finally:
            response.cancel()

    async def _while_it_runs(self, awaitable: Awaitable[T]) -> T:
        task = asyncio.ensure_future(awaitable)
        try:
            while not task.done():
                await asyncio.wait({task}, timeout=STATS_PERIOD_S)
                if not task.done() and not self._readings:
                    raise NoReplicaRunning(f"No replica of {self.name} is running.")
            return task.result()
        finally:
            task.cancel()

    def _translated(self, error: Exception) -> MillraceError:
        """Ray's failure of one call as the error that the gateway acts upon.

        What the replica's own code raised passes (`RayTaskError`); whatever else went wrong on the way there or back,
        under Ray's many names for it, means that this replica cannot be reached."""
        cause = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(cause, MillraceError):
            return cause
        if isinstance(cause, BackPressureError):
            return Overloaded(f"All replicas of {self.name} are busy; try again shortly.")
        if isinstance(error, RayTaskError) and not isinstance(cause, RayError):
            logger.error(f"a replica of {self.name} failed: {error!r}")
            return EngineError(f"The request failed inside a replica of {self.name}.")
        logger.warning(f"a replica of {self.name} was lost: {type(error).__name__}: {str(error)[:300]}")
        self._is_doubtful.set()
        return ReplicaUnavailable(f"A replica of {self.name} was lost.")


class ReplicaBackend:
    """`gateway.Backend` over one deployment per model."""

    def __init__(self, handles: Mapping[str, DeploymentHandle[Any]]) -> None:
        self._models: dict[str, Deployment[ReplicaStats]] = {m: Deployment(m, h) for m, h in handles.items()}
        self._readers: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        await asyncio.gather(*[model.read() for model in self._models.values()])
        self._readers = [asyncio.create_task(model.read_forever()) for model in self._models.values()]

    async def close(self) -> None:
        for reader in self._readers:
            reader.cancel()

    def stream_once(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        return self._model(request.model).stream(request)

    def stats(self, model: str) -> Sequence[ReplicaStats]:
        deployment = self._models.get(model)
        if deployment is None:
            return ()
        age_s = deployment.reading_age_s()
        return [replace(r, heartbeat_age_s=r.heartbeat_age_s + age_s) for r in deployment.readings()]

    async def tokenize(self, model: str, prompt: Prompt, add_special_tokens: bool) -> tuple[list[int], int]:
        deployment = self._model(model)
        call = deployment.handle.tokenize.remote(prompt, add_special_tokens)
        result: tuple[list[int], int] = await deployment.result(call, CALL_TIMEOUT_S)
        return result

    async def detokenize(self, model: str, token_ids: Sequence[int]) -> str:
        deployment = self._model(model)
        text: str = await deployment.result(deployment.handle.detokenize.remote(tuple(token_ids)), CALL_TIMEOUT_S)
        return text

    def _model(self, model: str) -> Deployment[ReplicaStats]:
        if model not in self._models:
            raise ModelNotFound(f"The model `{model}` does not exist.")
        return self._models[model]


class CacheClient:
    """`gateway.Cache` over a Serve handle. Every failure is a miss: a lost cache costs GPU time, never an answer."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._deployment: Deployment[Any] = Deployment("the semantic cache", handle)
        self._handle = handle
        self._awaited: set[str] = set()  # flights whose answer's next chunk is awaited now
        self._moved: set[str] = set()  # flights whose answer was awaited at some time since the last renewal
        self._loops: list[asyncio.Task[None]] = []
        self._unclaimed: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        await self._deployment.read()
        self._loops = [asyncio.create_task(loop) for loop in (self._deployment.read_forever(), self._renew_forever())]

    async def close(self) -> None:
        for loop in self._loops:
            loop.cancel()
        await asyncio.gather(*self._unclaimed)

    async def lookup(self, query: CacheQuery) -> LookupResult:
        if not self._deployment.readings():
            return CacheMiss()
        call = asyncio.ensure_future(self._deployment.result(self._handle.lookup.remote(query), LOOKUP_TIMEOUT_S))
        try:
            return await asyncio.shield(call)
        except asyncio.CancelledError:
            self._give_back(call)
            raise
        except MillraceError as error:
            logger.warning(f"cache lookup failed, treated as a miss: {error.message}")
            return CacheMiss()

    async def store(self, query: CacheQuery, miss: CacheMiss, answer: CachedAnswer) -> None:
        await self._tell(self._handle.store.remote(query, miss, answer))

    async def abandon(self, miss: CacheMiss) -> None:
        if miss.flight is not None:
            await self._tell(self._handle.abandon.remote(miss))

    @contextlib.contextmanager
    def awaiting(self, miss: CacheMiss) -> Iterator[None]:
        if miss.flight is None:
            yield
            return
        self._awaited.add(miss.flight)
        try:
            yield
        finally:
            self._awaited.discard(miss.flight)
            self._moved.add(miss.flight)

    async def embed(self, texts: Sequence[str]) -> tuple[list[tuple[float, ...]], int]:
        vectors: list[tuple[float, ...]] = []
        num_tokens = 0
        for first in range(0, len(texts), MAX_TEXTS_PER_CALL):
            some = tuple(texts[first : first + MAX_TEXTS_PER_CALL])
            timeout_s = CALL_TIMEOUT_S + len(some) * SLOWEST_EMBEDDING_S
            result = await self._deployment.result(self._handle.embed.remote(some, first), timeout_s)
            vectors += result[0]
            num_tokens += result[1]
        return vectors, num_tokens

    async def _tell(self, response: Awaitable[None]) -> None:
        try:
            await self._deployment.result(response, UPDATE_TIMEOUT_S)
        except MillraceError as error:
            logger.warning(f"cache update failed: {error.message}")

    async def _renew_forever(self) -> None:
        while True:
            await asyncio.sleep(RENEWAL_PERIOD_S)
            flights = self._awaited | self._moved
            self._moved.clear()
            if flights and self._deployment.readings():
                await self._tell(self._handle.renew.remote(tuple(flights)))

    def _give_back(self, call: asyncio.Future[LookupResult]) -> None:
        """The asker has left, but the lookup may still bring it the lead of a flight that others wait for."""

        async def abandon_its_flight() -> None:
            with contextlib.suppress(MillraceError):
                result = await call
                if isinstance(result, CacheMiss):
                    await self.abandon(result)

        task = asyncio.create_task(abandon_its_flight())
        self._unclaimed.add(task)
        task.add_done_callback(self._unclaimed.discard)
