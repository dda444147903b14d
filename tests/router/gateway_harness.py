"""A gateway over fakes, its app, and its clients: httpx over ASGI, the official openai client, a bare ASGI driver.

The bare driver exists because an ASGI transport hands a response over only when it is complete: what is flushed when,
and what a disconnect does, shows only message by message.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
import httpx2
from fastapi import FastAPI
from openai import AsyncOpenAI
from starlette.types import Message

from router.app import create_app
from router.catalog import Catalog, ModelEntry, Price
from router.gateway import Cache, Gateway
from router.metrics import GatewayMetrics
from router.policy import CheapestCapablePolicy, RoutingPolicy
from router.quality import FirstEstimate
from router.settings import FailoverSettings, GatewaySettings
from tests.router.fake_backend import FakeBackend, FakeCache

MODELS = (
    ModelEntry("small", Price(1.0, 4.0, cached_usd=0.1), quality=0.55, aliases=("tiny",), created=1),
    ModelEntry("large", Price(10.0, 40.0), quality=0.9, created=2),
)
EMBEDDER = "minilm"
QUICK = FailoverSettings(
    max_attempts_before_first_token=4, max_attempts_amid_answer=6, first_wait_s=0.0, max_wait_s=0.0
)


@dataclass
class Harness:
    backend: FakeBackend
    cache: FakeCache
    gateway: Gateway
    app: FastAPI

    def http(self, **headers: str) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://millrace", headers=headers)

    def openai(self, api_key: str = "none") -> AsyncOpenAI:
        transport = httpx2.ASGITransport(self.app, raise_app_exceptions=False)
        client = httpx2.AsyncClient(transport=transport, base_url="http://millrace/v1")
        return AsyncOpenAI(api_key=api_key, base_url="http://millrace/v1", http_client=client, max_retries=0)

    async def until_open(self, num_streams: int) -> None:
        """Steps the loop until the backend has that many streams in work."""
        for _ in range(1000):
            if self.backend.num_open >= num_streams:
                return
            await asyncio.sleep(0)
        raise AssertionError(f"{self.backend.num_open} streams are open, not {num_streams}")

    def metric(self, line: str) -> float:
        """The value of the series that is written exactly so; 0 where it does not exist."""
        for row in self.gateway.metrics.exposition().decode().splitlines():
            if row.startswith(line + " "):
                return float(row.rpartition(" ")[2])
        return 0.0


def harness(
    *,
    policy: RoutingPolicy | None = None,
    models: tuple[ModelEntry, ...] = MODELS,
    with_cache: bool = True,
    cache_client: Cache | None = None,
    settings: Mapping[str, Any] | None = None,
    backend: FakeBackend | None = None,
) -> Harness:
    chosen = GatewaySettings(**{"embedder": EMBEDDER, "failover": QUICK, **(settings or {})})
    backend = backend or FakeBackend()
    cache = FakeCache()
    used: Cache | None = (cache_client or cache) if with_cache else None
    metrics = GatewayMetrics([model.id for model in models], backend.stats)
    gateway = Gateway(
        backend, used, Catalog(models), policy or CheapestCapablePolicy(0.7), FirstEstimate(), chosen, metrics
    )
    return Harness(backend, cache, gateway, create_app(gateway, chosen))


@dataclass
class Exchange:
    """One request over bare ASGI: `parts` are the body's pieces as they were sent, `leave()` hangs up."""

    app: FastAPI
    path: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    status: int | None = None
    reply_headers: dict[str, str] = field(default_factory=dict)
    parts: asyncio.Queue[bytes] = field(default_factory=asyncio.Queue)

    def __post_init__(self) -> None:
        self._gone = asyncio.Event()
        self._is_sent = False
        self.task: asyncio.Task[None] = asyncio.create_task(self._run())

    def leave(self) -> None:
        self._gone.set()

    async def _run(self) -> None:
        headers = {"content-type": "application/json", **self.headers}
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": self.path,
            "raw_path": self.path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
            "server": ("millrace", 80),
            "client": ("127.0.0.1", 1),
            "state": {},
        }
        await self.app(scope, self._receive, self._send)

    async def _receive(self) -> Message:
        if not self._is_sent:
            self._is_sent = True
            return {"type": "http.request", "body": self.body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.reply_headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            await self.parts.put(message["body"])


def sse_data(body: str) -> list[Any]:
    """The JSON of every event; `[DONE]` as that string."""
    events = [line.removeprefix("data: ") for line in body.split("\n\n") if line]
    return [event if event == "[DONE]" else json.loads(event) for event in events]


def chat(text: str = "Where does the river turn?", **more: Any) -> dict[str, Any]:
    return {"model": "small", "messages": [{"role": "user", "content": text}], **more}
