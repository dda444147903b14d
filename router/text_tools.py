"""Endpoints that turn text into something else than an answer: embeddings, token ids, and token ids back into text."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from replicas.types import InvalidRequest, Prompt, TextPrompt
from router.admission import Admission
from router.gateway import Gateway
from router.openai import chat_prompt, embedding_body
from router.transport import JsonBodies, JsonReply, unless_gone
from router.wire import Body, DetokenizeRequest, EmbeddingRequest, TokenizeRequest, parse

T = TypeVar("T")
B = TypeVar("B", bound=Body)


class TextTools:
    def __init__(self, gateway: Gateway, admission: Admission, bodies: JsonBodies) -> None:
        self._gateway = gateway
        self._admission = admission
        self._bodies = bodies

    async def embed(self, request: Request) -> Response:
        body = await self._parsed(request, EmbeddingRequest)
        vectors, num_tokens = await self._admitted(request, self._gateway.embed(body.model, body.input))
        if vectors and body.dimensions not in (None, len(vectors[0])):
            raise InvalidRequest(f"'dimensions' can only be {len(vectors[0])} with this model.", "dimensions")
        as_base64 = body.encoding_format == "base64"
        return JsonReply(embedding_body(body.model, vectors, num_tokens, as_base64=as_base64))

    async def tokenize(self, request: Request) -> Response:
        """Text gets the tokenizer's special tokens unless told otherwise; a chat template brings its own."""
        body = await self._parsed(request, TokenizeRequest)
        model = self._gateway.catalog.resolve_single(body.model).id
        prompt: Prompt
        if body.messages is not None:
            prompt = chat_prompt(body.messages, body.add_generation_prompt, body.chat_template_kwargs)
        else:
            prompt = TextPrompt(body.prompt or "")
        with_special = body.messages is None if body.add_special_tokens is None else body.add_special_tokens
        work = self._gateway.backend.tokenize(model, prompt, with_special)
        token_ids, max_model_len = await self._admitted(request, work)
        return JsonReply({"count": len(token_ids), "max_model_len": max_model_len, "tokens": token_ids})

    async def detokenize(self, request: Request) -> Response:
        body = await self._parsed(request, DetokenizeRequest)
        model = self._gateway.catalog.resolve_single(body.model).id
        text = await self._admitted(request, self._gateway.backend.detokenize(model, body.tokens))
        return JsonReply({"prompt": text})

    async def _parsed(self, request: Request, schema: type[B]) -> B:
        self._admission.check()
        return parse(schema, await self._bodies.read(request))

    async def _admitted(self, request: Request, work: Coroutine[Any, Any, T]) -> T:
        """`work`, while holding one of the gateway's places, for as long as the client waits for it."""
        try:
            return await unless_gone(request, self._in_turn(work))
        finally:
            work.close()  # where it never got its turn

    async def _in_turn(self, work: Coroutine[Any, Any, T]) -> T:
        permit = await self._admission.acquire()
        try:
            return await work
        finally:
            permit.release()
