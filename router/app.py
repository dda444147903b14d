"""The routes: OpenAI's endpoint, vLLM's /tokenize and /detokenize, health, metrics and the document of all of them.

Knows HTTP; how an answer comes about is `gateway.py`'s. Errors are raised as they are and become replies in
`front_door.py`.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from router import replies
from router.admission import Admission
from router.auth import Authenticator
from router.completions import Completions
from router.errors import http_reply
from router.front_door import ASSETS_PATH, DOCUMENT_PATH, FrontDoor
from router.gateway import Gateway
from router.openapi import Responses, answer_response, describe, json_body, responses
from router.settings import GatewaySettings
from router.status import Status
from router.text_tools import TextTools
from router.transport import JsonBodies, JsonReply
from router.wire import (
    Body,
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)

Endpoint = Callable[[Request], Awaitable[Response]]

POST_ERRORS = (400, 401, 404, 413, 415, 429, 500, 503)


def create_app(gateway: Gateway, settings: GatewaySettings) -> FastAPI:
    """The ASGI application around one gateway. Whoever serves it calls `gateway.close()` at the end."""
    # /docs must work, and stay silent towards the outside, on a machine without internet
    app = FastAPIOffline(
        title="Millrace",
        version="1",
        redoc_url=None,
        openapi_url=DOCUMENT_PATH,
        static_url=ASSETS_PATH,
        redirect_slashes=False,
    )
    on_refusal = gateway.metrics.admission_rejections.inc
    admission = Admission(settings.max_concurrent, settings.max_queued, time.monotonic, on_refusal)
    bodies = JsonBodies(settings.max_body_bytes)
    _add_text_routes(app, Completions(gateway, admission, bodies), TextTools(gateway, admission, bodies))
    _add_status_routes(app, Status(gateway, settings.embedder))
    app.add_exception_handler(HTTPException, _refuse_http)
    app.add_middleware(FrontDoor, authenticator=Authenticator(settings.api_keys), metrics=gateway.metrics)
    chunks = (replies.ChatCompletionChunk, replies.CompletionChunk)
    # made when first asked for: it takes longer than everything else here
    document = functools.cache(lambda: describe(app, chunks=chunks, with_auth=bool(settings.api_keys)))
    app.openapi = document  # type: ignore[method-assign]
    return app


def _add_text_routes(app: FastAPI, completions: Completions, tools: TextTools) -> None:
    def post(path: str, endpoint: Endpoint, schema: type[Body], ok: Responses) -> None:
        _add_route(app, "POST", path, endpoint, {**ok, **responses(*POST_ERRORS)}, json_body(schema))

    chat = answer_response(replies.ChatCompletion, replies.ChatCompletionChunk)
    text = answer_response(replies.Completion, replies.CompletionChunk)
    post("/v1/chat/completions", completions.chat, ChatCompletionRequest, chat)
    post("/v1/completions", completions.text, CompletionRequest, text)
    post("/v1/embeddings", tools.embed, EmbeddingRequest, {200: {"model": replies.EmbeddingList}})
    post("/tokenize", tools.tokenize, TokenizeRequest, {200: {"model": replies.TokenizeReply}})
    post("/detokenize", tools.detokenize, DetokenizeRequest, {200: {"model": replies.DetokenizeReply}})


def _add_status_routes(app: FastAPI, status: Status) -> None:
    def get(path: str, endpoint: Endpoint, documented: Responses, extra: dict[str, Any] | None = None) -> None:
        _add_route(app, "GET", path, endpoint, documented, extra)

    model_id = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
    starting = {"model": replies.ReadinessReply, "description": "Some model has no running replica."}
    exposition = {"description": "Prometheus' text format.", "content": {"text/plain": {"schema": {"type": "string"}}}}
    get("/v1/models", status.models, {200: {"model": replies.ModelList}, **responses(401)})
    one_model: Responses = {200: {"model": replies.ModelReply}, **responses(401, 404)}
    get("/v1/models/{model:path}", status.model, one_model, {"parameters": [model_id]})
    get("/health", status.health, {200: {"model": replies.HealthReply}})
    get("/ready", status.ready, {200: {"model": replies.ReadinessReply}, 503: starting})
    get("/metrics", status.metrics, {200: exposition, **responses(401)})


def _add_route(
    app: FastAPI, method: str, path: str, endpoint: Endpoint, documented: Responses, extra: dict[str, Any] | None
) -> None:
    # no response model and a plain `Response` class: replies are ready when they leave the endpoint
    app.add_api_route(
        path,
        endpoint,
        methods=[method],
        name=endpoint.__name__,
        response_model=None,
        responses=documented,
        openapi_extra=extra,
    )


async def _refuse_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException), f"registered for HTTPException only, got {error!r}"
    headers = {name.lower(): value for name, value in (error.headers or {}).items()}
    reply = http_reply(error.status_code, request.method, request.url.path[:200], headers)
    return JsonReply(reply.body, reply.status, reply.headers)
