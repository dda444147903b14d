"""Endpoints that say how things stand: the models there are, whether they can answer, and the metrics."""

from __future__ import annotations

from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response

from router.catalog import AUTO, ModelEntry
from router.gateway import Gateway
from router.transport import JsonReply


class Status:
    def __init__(self, gateway: Gateway, embedder: str | None) -> None:
        self._gateway = gateway
        self._bodies_without_replicas = [_body(name) for name in (AUTO, embedder) if name is not None]

    async def health(self, request: Request) -> Response:
        """This process runs its event loop; nothing is said about models."""
        return JsonReply({"status": "alive"})

    async def ready(self, request: Request) -> Response:
        """200 once every model has a replica that reports."""
        models = []
        for model in self._gateway.catalog.models:
            stats = self._gateway.backend.stats(model.id)
            kernels = sorted({reading.kernels for reading in stats})
            models.append({"id": model.id, "replicas": len(stats), "kernels": kernels})
        is_ready = all(model["replicas"] for model in models)
        return JsonReply({"status": "ready" if is_ready else "starting", "models": models}, 200 if is_ready else 503)

    async def models(self, request: Request) -> Response:
        """The catalogue, the name under which the router chooses from it, and the model behind /v1/embeddings."""
        entries = [self._model_body(model) for model in self._gateway.catalog.models]
        return JsonReply({"object": "list", "data": [*entries, *self._bodies_without_replicas]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["model"]
        for body in self._bodies_without_replicas:
            if body["id"] == name:
                return JsonReply(body)
        return JsonReply(self._model_body(self._gateway.catalog.resolve(name)))

    async def metrics(self, request: Request) -> Response:
        return Response(self._gateway.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)

    def _model_body(self, model: ModelEntry) -> dict[str, Any]:
        stats = self._gateway.backend.stats(model.id)
        return {
            "id": model.id,
            "object": "model",
            "created": model.created,
            "owned_by": model.owned_by,
            "max_model_len": model.context_length or max((reading.max_model_len for reading in stats), default=None),
        }


def _body(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "millrace", "max_model_len": None}
