"""The first and last stop of every HTTP request: its id, who asks, errors as replies, one access line, one count.

A plain ASGI middleware, because it must see every byte's start and must not sit between a stream and its client.
Logs carry the request id, the tenant and the status; never keys, prompts or answers.
"""

from __future__ import annotations

import logging
import re
import time
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from replicas.types import MillraceError
from router.auth import Authenticator
from router.errors import ClientGone, reply_for
from router.logs import line, log
from router.metrics import GatewayMetrics
from router.transport import JsonReply

OPEN_PATHS = frozenset({"/health", "/ready"})
"""What a load balancer asks without a key."""

DOCUMENT_PATH = "/openapi.json"
ASSETS_PATH = "/docs-assets"
"""What /docs loads: files of a mounted folder."""

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
"""What is fit for logs and headers; another id is replaced by one of ours."""


class FrontDoor:
    def __init__(self, app: ASGIApp, authenticator: Authenticator, metrics: GatewayMetrics) -> None:
        self._app = app
        self._authenticator = authenticator
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        presented = headers.get("x-request-id", "")
        is_fit = REQUEST_ID.fullmatch(presented) is not None
        request_id = presented if is_fit else f"req-{uuid.uuid4().hex}"
        visit = _Visit(request_id, send, names_itself=not is_fit)
        state = scope.setdefault("state", {})
        state["request_id"], state["tenant"] = request_id, None
        try:
            if scope["path"] not in OPEN_PATHS:
                state["tenant"] = self._authenticator.tenant(headers)
            await self._app(scope, receive, visit.send)
        except Exception as error:
            await self._refuse(error, scope, receive, visit)
        finally:
            self._note(scope, visit, state["tenant"])

    async def _refuse(self, error: Exception, scope: Scope, receive: Receive, visit: _Visit) -> None:
        if not isinstance(error, MillraceError):
            log.exception(line("unexpected error", request_id=visit.request_id))
        reply = reply_for(error, visit.request_id)
        if isinstance(error, ClientGone):
            visit.status = reply.status  # nobody is left to read it
        elif visit.status is None:
            await JsonReply(reply.body, reply.status, reply.headers)(scope, receive, visit.send)
        else:
            raise error  # half a reply is out: the server can only cut the connection

    def _note(self, scope: Scope, visit: _Visit, tenant: str | None) -> None:
        status = visit.status or 499
        self._metrics.http_requests.labels(_route(scope), str(status)).inc()
        level = logging.WARNING if status >= 500 else logging.INFO
        log.log(
            level,
            line(
                "request",
                request_id=visit.request_id,
                method=scope["method"],
                path=scope["path"][:200],
                status=status,
                tenant=tenant,
                duration_ms=round(1e3 * (time.monotonic() - visit.since_s), 1),
                **scope["state"].get("log", {}),
            ),
        )


def _route(scope: Scope) -> str:
    """The label of its count: one of a few, whatever clients ask for."""
    path = getattr(scope.get("route"), "path", None)
    if path is not None:
        return str(path)
    # FastAPI notes neither mounts nor its own document
    if scope["path"].startswith(ASSETS_PATH + "/"):
        return f"{ASSETS_PATH}/*"
    return DOCUMENT_PATH if scope["path"] == DOCUMENT_PATH else "unknown"


class _Visit:
    """One request's reply as it goes out: notes the status, and sends the request's id where it was made here.

    An id that came with the request is the client's, or the server's around us, which sends it back itself."""

    def __init__(self, request_id: str, send: Send, *, names_itself: bool) -> None:
        self.request_id = request_id
        self._names_itself = names_itself
        self.status: int | None = None
        self.since_s = time.monotonic()
        self._send = send

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            if self._names_itself:
                message["headers"] = [*message["headers"], (b"x-request-id", self.request_id.encode())]
        await self._send(message)
