"""The gateway as a Serve ingress: handles to replicas and cache behind the protocols of `gateway.py`.

The only file of the router that knows Ray. It translates Ray's failures into the tree of `replicas.types` and decides
nothing: resumption is `failover.py`'s, fallback is `gateway.py`'s.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle

from cache.types import CachedAnswer, CacheMiss, CacheQuery, LookupResult
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
from router.gateway import Gateway
from router.metrics import GatewayMetrics
from router.policy import RoutingPolicy
from router.quality import FirstEstimate
from router.settings import GatewaySettings

logger = logging.getLogger("ray.serve")

STATS_PERIOD_S = 1.0
CALL_TIMEOUT_S = 30.0


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
        _log_like_serve()
        self._config = config
        self._backend = ReplicaBackend(models)
        self._cache = CacheClient(cache) if cache is not None else None
        self._gateway: Gateway | None = None

    async def __serve_build_asgi_app__(self) -> FastAPI:
        # Serve's hook: called on the replica's own loop, after __init__ and before the first request.
        await self._backend.start()
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
        await self._backend.close()


class ReplicaBackend:
    """`gateway.Backend` over Serve handles, one per model. Configured handles are kept: `.options()` is costly."""

    def __init__(self, handles: Mapping[str, DeploymentHandle[Any]]) -> None:
        self._handles = dict(handles)
        self._streams = {m: h.options(method_name="generate", stream=True) for m, h in handles.items()}
        self._stats: dict[str, tuple[ReplicaStats, ...]] = dict.fromkeys(handles, ())
        self._poller: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await asyncio.gather(*[self._poll(m) for m in self._handles])
        self._poller = asyncio.create_task(self._poll_forever())

    async def close(self) -> None:
        if self._poller is not None:
            self._poller.cancel()

    async def stream_once(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        response = self._stream_handle(request.model).remote(request)
        try:
            async for chunk in response:
                yield chunk
        except Exception as error:
            raise _translate(error, request.model) from None
        finally:
            response.cancel()

    def stats(self, model: str) -> Sequence[ReplicaStats]:
        return self._stats.get(model, ())

    async def tokenize(self, model: str, prompt: Prompt, add_special_tokens: bool) -> tuple[list[int], int]:
        result: tuple[list[int], int] = await self._call(model, "tokenize", prompt, add_special_tokens)
        return result

    async def detokenize(self, model: str, token_ids: Sequence[int]) -> str:
        result: str = await self._call(model, "detokenize", tuple(token_ids))
        return result

    async def _call(self, model: str, method: str, *args: Any) -> Any:
        handle = self._handle(model)
        try:
            return await asyncio.wait_for(getattr(handle, method).remote(*args), CALL_TIMEOUT_S)
        except Exception as error:
            raise _translate(error, model) from None

    def _handle(self, model: str) -> DeploymentHandle[Any]:
        if model not in self._handles:
            raise ModelNotFound(f"The model `{model}` does not exist.")
        return self._handles[model]

    def _stream_handle(self, model: str) -> DeploymentHandle[Any]:
        self._handle(model)
        return self._streams[model]

    async def _poll_forever(self) -> None:
        while True:
            await asyncio.sleep(STATS_PERIOD_S)
            await asyncio.gather(*[self._poll(m) for m in self._handles])

    async def _poll(self, model: str) -> None:
        try:
            response = self._handles[model].broadcast("stats")
            readings = await response.results_async(timeout_s=5.0, return_exceptions=True)
            self._stats[model] = tuple(r for r in readings if isinstance(r, ReplicaStats))
        except Exception as error:  # no replica yet, or the controller is away: nothing runs as far as we know
            logger.debug(f"stats of {model}: {error!r}")
            self._stats[model] = ()


class CacheClient:
    """`gateway.Cache` over a Serve handle. Every failure is a miss: a lost cache costs GPU time, never an answer."""

    def __init__(self, handle: DeploymentHandle[Any], timeout_s: float = 2.0, flight_timeout_s: float = 120.0) -> None:
        self._handle = handle
        self._timeout_s = timeout_s
        self._flight_timeout_s = flight_timeout_s

    async def lookup(self, query: CacheQuery) -> LookupResult:
        try:
            # A lookup may wait for an identical request in flight, so it is given more time than a store.
            result: LookupResult = await asyncio.wait_for(self._handle.lookup.remote(query), self._flight_timeout_s)
            return result
        except (RayError, RayServeException, TimeoutError) as error:
            logger.warning(f"cache lookup failed, treated as a miss: {type(error).__name__}")
            return CacheMiss()

    async def store(self, query: CacheQuery, miss: CacheMiss, answer: CachedAnswer) -> None:
        await self._forget_failures(self._handle.store.remote(query, miss, answer))

    async def abandon(self, miss: CacheMiss) -> None:
        if miss.flight is not None:
            await self._forget_failures(self._handle.abandon.remote(miss))

    async def embed(self, texts: Sequence[str]) -> tuple[list[tuple[float, ...]], int]:
        try:
            result: tuple[list[tuple[float, ...]], int] = await asyncio.wait_for(
                self._handle.embed.remote(tuple(texts)), CALL_TIMEOUT_S
            )
            return result
        except Exception as error:
            raise _translate(error, "the embedder") from None

    async def _forget_failures(self, response: Any) -> None:
        try:
            await asyncio.wait_for(response, self._timeout_s)
        except (RayError, RayServeException, TimeoutError) as error:
            logger.warning(f"cache update failed: {type(error).__name__}")


def _translate(error: Exception, model: str) -> MillraceError:
    """Ray's failure of one call as the error that the gateway acts upon."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, MillraceError):
        return cause
    if isinstance(cause, BackPressureError):
        return Overloaded(f"All replicas of {model} are busy; try again shortly.")
    if isinstance(cause, RayActorError | DeploymentUnavailableError | TimeoutError | RayServeException):
        return ReplicaUnavailable(f"A replica of {model} was lost.")
    logger.error(f"a replica of {model} failed: {error!r}")
    return EngineError(f"The request failed inside a replica of {model}.")


def _log_like_serve() -> None:
    """The gateway's lines go where Serve's go: the replica's own log file, as JSON."""
    ours = logging.getLogger("millrace")
    ours.handlers = logger.handlers
    ours.setLevel(logging.INFO)
    ours.propagate = False
