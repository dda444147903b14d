"""What /openapi.json says about each route. Bodies are parsed by hand (`transport.py`, `wire.py`), so their schemas are
added here; tests hold the running app against the document.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from router.replies import ErrorReplyBody
from router.wire import (
    Body,
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)

DESCRIPTION = """\
OpenAI's API over the models of one cluster; vLLM's sampling parameters beside OpenAI's. `model: "auto"` lets the
router choose.

Every reply has `x-request-id`. Generated answers say what was decided: `x-millrace-model`, `x-millrace-route-reason`,
`x-millrace-cache` and `x-millrace-cost-usd`. The headers of a stream leave before its answer exists, so there the cost
is the predicted one; the exact one stands in the last event, as `usage.cost_usd`, if `stream_options.include_usage` is
set.
"""

Responses = dict[int | str, dict[str, Any]]

REQUEST_SCHEMAS: tuple[type[Body], ...] = (
    ChatCompletionRequest,
    CompletionRequest,
    EmbeddingRequest,
    TokenizeRequest,
    DetokenizeRequest,
)

ERRORS = {
    400: "The request is not one this endpoint can serve; `error.param` names the field.",
    401: "No API key, or one that is not valid here.",
    404: "No such model.",
    413: "The body is larger than this endpoint takes.",
    415: "The body is not declared as application/json.",
    429: "The queue is full; `retry-after` says when to come back.",
    500: "This one request failed.",
    503: "No replica of the model is available; `retry-after` says when to come back.",
}

_TEXT = {"type": "string"}
_RETRY_AFTER = {"retry-after": {"description": "Seconds.", "schema": {"type": "string", "pattern": "^[1-9][0-9]*$"}}}
_DECISION_HEADERS: dict[str, Any] = {
    "x-millrace-model": {"description": "The model that answered.", "schema": _TEXT},
    "x-millrace-route-reason": {"description": "Why it: `requested`, `cheapest-capable`, …", "schema": _TEXT},
    "x-millrace-cache": {
        "description": "What the semantic cache said.",
        "schema": {"enum": ["hit-exact", "hit-semantic", "miss", "bypass"]},
    },
    "x-millrace-cost-usd": {
        "description": "Exact for a whole answer, predicted for a stream; `unknown` where the model has no price.",
        "schema": {"type": "string", "pattern": r"^(unknown|[0-9]+\.[0-9]+)$"},
    },
}


def json_body(schema: type[Body]) -> dict[str, Any]:
    """For `openapi_extra`: the route takes this body."""
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema.__name__}"}}}
    return {"requestBody": {"required": True, "content": content}}


def responses(*statuses: int) -> Responses:
    """For `responses`: these errors, each in OpenAI's shape."""
    return {
        status: {
            "model": ErrorReplyBody,
            "description": ERRORS[status],
            **({"headers": _RETRY_AFTER} if status in (429, 503) else {}),
        }
        for status in statuses
    }


def answer_response(whole: type[BaseModel], chunk: type[BaseModel]) -> Responses:
    """A generated answer: one object, or events whose data is a `chunk` each, then `[DONE]`."""
    payloads = [{"$ref": f"#/components/schemas/{schema.__name__}"} for schema in (chunk, ErrorReplyBody)]
    data = [
        {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": payloads}},
        {"const": "[DONE]"},
    ]
    # `itemSchema` is OpenAPI 3.2's word for one event; older readers skip it
    event = {"type": "object", "required": ["data"], "properties": {"data": {"anyOf": data}}}
    return {
        200: {
            "model": whole,
            "description": "The answer.",
            "headers": _DECISION_HEADERS,
            "content": {"text/event-stream": {"itemSchema": event}},
        }
    }


def describe(app: FastAPI, *, chunks: tuple[type[BaseModel], ...], with_auth: bool) -> dict[str, Any]:
    """The whole document."""
    document = get_openapi(title=app.title, version=app.version, description=DESCRIPTION, routes=app.routes)
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for models, mode in ((REQUEST_SCHEMAS, "validation"), (chunks, "serialization")):
        _, made = models_json_schema(
            [(model, mode) for model in models],  # type: ignore[misc]
            ref_template="#/components/schemas/{model}",
        )
        schemas.update(made["$defs"])
    if with_auth:
        document["components"]["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        }
        document["security"] = [{"bearer": []}, {"header": []}]
        for path in ("/health", "/ready"):
            document["paths"][path]["get"]["security"] = []
    return document
