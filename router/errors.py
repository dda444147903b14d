"""The one mapping from the error tree (`replicas/types.py`) to HTTP status, headers and OpenAI's error body.

Knows no routes and no requests. Errors that only HTTP has (a wrong key, a body too large) are added to the tree here.

    InvalidRequest 400 · PromptTooLong 400 `context_length_exceeded` · Unauthorized 401 · ModelNotFound 404 ·
    BodyTooLarge 413 · UnsupportedMediaType 415 · Overloaded 429 + Retry-After · EngineError 500 ·
    ReplicaUnavailable 503 + Retry-After · anything else 500, without a word about what it was
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from replicas.types import (
    EngineError,
    InvalidRequest,
    MillraceError,
    ModelNotFound,
    Overloaded,
    PromptTooLong,
    ReplicaUnavailable,
)

UNAVAILABLE_RETRY_AFTER_S = 2.0
MAX_PATH_CHARS = 128


class Unauthorized(MillraceError):
    pass


class BodyTooLarge(MillraceError):
    pass


class UnsupportedMediaType(MillraceError):
    pass


class ClientGone(MillraceError):
    """The client hung up; nobody reads the reply, whose status (499, as nginx writes it) only the log shows."""


@dataclass(frozen=True, slots=True)
class ErrorReply:
    status: int
    body: dict[str, Any]
    """`{"error": {"message", "type", "param", "code"}}`"""
    headers: dict[str, str]


def reply_for(error: BaseException, request_id: str) -> ErrorReply:
    """Unexpected exceptions say nothing but `request_id`, under which the log has the rest."""
    if isinstance(error, PromptTooLong):
        return _reply(400, error.message, "invalid_request_error", error.param, "context_length_exceeded")
    if isinstance(error, InvalidRequest):
        return _reply(400, error.message, "invalid_request_error", error.param)
    if isinstance(error, Unauthorized):
        headers = {"www-authenticate": "Bearer"}
        return _reply(401, error.message, "authentication_error", None, "invalid_api_key", headers)
    if isinstance(error, ModelNotFound):
        return _reply(404, error.message, "invalid_request_error", "model", "model_not_found")
    if isinstance(error, BodyTooLarge):
        return _reply(413, error.message, "invalid_request_error", None, "request_too_large")
    if isinstance(error, UnsupportedMediaType):
        return _reply(415, error.message, "invalid_request_error")
    if isinstance(error, ClientGone):
        return _reply(499, error.message, "client_closed_request")
    if isinstance(error, Overloaded):
        headers = _retry_after(error.retry_after_s)
        return _reply(429, error.message, "rate_limit_error", None, "overloaded", headers)
    if isinstance(error, ReplicaUnavailable):
        headers = _retry_after(UNAVAILABLE_RETRY_AFTER_S)
        return _reply(503, error.message, "service_unavailable_error", None, "model_unavailable", headers)
    if isinstance(error, EngineError):
        return _reply(500, error.message, "server_error", None, "engine_error")
    message = f"The server failed on this request. Quote the request id {request_id} when you report it."
    return _reply(500, message, "server_error", None, "internal_error")


def http_reply(status: int, method: str, path: str, headers: dict[str, str]) -> ErrorReply:
    """For what the HTTP router itself refuses: 404 for an unknown path, 405 (with `Allow`) for a wrong method."""
    if status == 405:
        allowed = headers.get("allow", "")
        return _reply(405, f"{path} does not take {method}; use {allowed}.", "invalid_request_error", headers=headers)
    return _reply(
        status, f"There is no {path} here; /docs lists what there is.", "invalid_request_error", headers=headers
    )


def invalid_request(error: ValidationError) -> InvalidRequest:
    """The first mistake of a request body as a sentence; `param` is its dotted path, e.g. `messages.0.content`."""
    first = error.errors(include_url=False)[0]
    kind, message = first["type"], first["msg"]
    path = _cut(".".join(str(part) for part in first["loc"]) or first.get("ctx", {}).get("param", ""))
    if kind == "json_invalid":
        detail = message.removeprefix("Invalid JSON: ")
        return InvalidRequest(f"The request body is not valid JSON: {detail}.")
    if not path:
        return InvalidRequest(f"The request body should be a JSON object, but is {_json_type(first['input'])}.")
    if kind == "extra_forbidden":
        return InvalidRequest(f"Unrecognized request argument supplied: '{path}'.", path)
    if kind == "missing":
        return InvalidRequest(f"Missing required parameter: '{path}'.", path)
    if kind == "too_short":
        return InvalidRequest(f"'{path}' should not be empty.", path)
    if kind == "too_long":
        return InvalidRequest(f"'{path}' should have at most {first['ctx']['max_length']} items.", path)
    if message.startswith("Input should"):
        got = _json_type(first["input"])
        return InvalidRequest(f"'{path}' should{message.removeprefix('Input should')}, but got {got}.", path)
    return InvalidRequest(f"'{path}': {message}.", path)


def _reply(
    status: int,
    message: str,
    kind: str,
    param: str | None = None,
    code: str | None = None,
    headers: dict[str, str] | None = None,
) -> ErrorReply:
    body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return ErrorReply(status, body, headers or {})


def _retry_after(seconds: float) -> dict[str, str]:
    # RFC 9110 §10.2.3: whole seconds; 0 would invite a storm
    return {"retry-after": str(max(1, math.ceil(seconds)))}


def _cut(path: str) -> str:
    """Field names may be the client's own, and of any length."""
    return path if len(path) <= MAX_PATH_CHARS else path[: MAX_PATH_CHARS - 1] + "…"


def _json_type(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number out of range" if isinstance(value, float) and not math.isfinite(value) else "a number"
        case str():
            return "a string"
        case list() | tuple():
            return "an array"
        case _:
            return "an object"
