"""Between ASGI and the endpoints: bodies read within a limit, work that ends when its client leaves, event streams.

Knows neither models nor OpenAI.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar

import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from replicas.types import Overloaded
from router.errors import BodyTooLarge, ClientGone, UnsupportedMediaType

T = TypeVar("T")


class JsonBodies:
    """Reads request bodies, each of `max_bytes` at most, and all that are being read `max_bytes_in_flight` together."""

    def __init__(self, max_bytes: int, max_bytes_in_flight: int = 256 * 2**20) -> None:
        self._max_bytes = max_bytes
        self._max_bytes_in_flight = max(max_bytes, max_bytes_in_flight)
        self._bytes_in_flight = 0

    async def read(self, request: Request) -> bytes:
        """The raw body. Raises `BodyTooLarge`, `Overloaded`, `ClientGone`, and `UnsupportedMediaType` for another
        content type than JSON, or none: a web page can make a browser post anything else to a loopback address without
        asking.
        """
        content_type = request.headers.get("content-type")
        if content_type is None:
            raise UnsupportedMediaType("The header 'content-type: application/json' is missing.")
        if content_type.partition(";")[0].strip().lower() != "application/json":
            raise UnsupportedMediaType("The header 'content-type' should be 'application/json'.")
        declared = request.headers.get("content-length", "")
        if declared.isdecimal():
            self._check_size(int(declared))
        body = bytearray()
        try:
            async for part in request.stream():
                body += part
                self._bytes_in_flight += len(part)
                self._check_size(len(body))
                if self._bytes_in_flight > self._max_bytes_in_flight:
                    raise Overloaded("Too many large request bodies are being sent at once; try again shortly.")
        except ClientDisconnect:
            raise ClientGone("The client left before its request was complete.") from None
        finally:
            self._bytes_in_flight -= len(body)
        return bytes(body)

    def _check_size(self, num_bytes: int) -> None:
        if num_bytes > self._max_bytes:
            raise BodyTooLarge(f"The request body is larger than the {self._max_bytes} bytes taken here.")


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled as soon as the client hangs up (then `ClientGone` is raised).

    To be called once the body is read: from then on the client's only message is its leaving.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_wait_until_gone(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone("The client left before its answer was complete.")
        return task.result()
    finally:
        await _cancelled(task, gone)


class JsonReply(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return orjson.dumps(content)


class EventStreamReply(Response):
    """Sends `events` as they come. `on_close` is awaited however the stream ends: read to its end, the client gone, or
    this task cancelled."""

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncIterator[bytes], headers: Mapping[str, str], on_close: Callable[[], Awaitable[None]]
    ) -> None:
        # a buffering proxy in between would hold tokens back
        super().__init__(headers={**headers, "cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.create_task(self._send(send))
        gone = asyncio.create_task(_wait_until_gone(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not sending.done():
                raise ClientGone("The client left amid its stream.")
            sending.result()
        finally:
            try:
                await _cancelled(sending, gone)
            finally:
                await self._on_close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for event in self._events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _wait_until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancelled(*tasks: asyncio.Task[Any]) -> None:
    """Every task over, its outcome looked at."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
