"""The two generating endpoints: a body in, an answer out, as one JSON object or as an event stream.

Holds the client's place in the gateway for as long as its answer lasts. Which model answers is `gateway.py`'s.
"""

from __future__ import annotations

import secrets
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response

from replicas.types import MillraceError, TextPrompt, TokenPrompt
from router.admission import Admission, Permit
from router.answer import Answer
from router.errors import reply_for
from router.gateway import Gateway
from router.logs import line, log
from router.openai import ChoiceText, chat_body, completion_body, fields_as_sent, to_generate_requests, usage_body
from router.question import Question
from router.sse import DONE, ChatEvents, CompletionEvents, EventWriter, error_event
from router.transport import EventStreamReply, JsonBodies, JsonReply, unless_gone
from router.wire import ChatCompletionRequest, CompletionRequest, parse


class Completions:
    def __init__(self, gateway: Gateway, admission: Admission, bodies: JsonBodies) -> None:
        self._gateway = gateway
        self._admission = admission
        self._bodies = bodies

    async def chat(self, request: Request) -> Response:
        return await self._serve(request, ChatCompletionRequest, "chatcmpl")

    async def text(self, request: Request) -> Response:
        return await self._serve(request, CompletionRequest, "cmpl")

    async def _serve(
        self, request: Request, schema: type[ChatCompletionRequest] | type[CompletionRequest], prefix: str
    ) -> Response:
        self._admission.check()
        body: ChatCompletionRequest | CompletionRequest
        body = parse(schema, await self._bodies.read(request))
        response_id = f"{prefix}-{uuid.uuid4().hex}"
        hold = _Hold()
        is_streaming = False
        try:
            with fields_as_sent(body):
                question = self._question(request, body, response_id)
                reply = await unless_gone(request, self._reply(request, body, question, response_id, hold))
            is_streaming = isinstance(reply, EventStreamReply)  # which lets go itself, at its end
            return reply
        finally:
            if not is_streaming:
                await hold.release()

    def _question(
        self, request: Request, body: ChatCompletionRequest | CompletionRequest, response_id: str
    ) -> Question:
        tenant = request.state.tenant
        requests = to_generate_requests(
            body, request_id=response_id, tenant=tenant, draw_seed=lambda: secrets.randbits(64)
        )
        return Question(
            tuple(requests),
            tenant,
            http_request_id=request.state.request_id,
            # RFC 9110 §5.3: several lines of one name mean what one line of all of them means
            cache_control=", ".join(request.headers.getlist("cache-control")),
            has_drawn_seed=body.seed is None,
        )

    async def _reply(
        self,
        request: Request,
        body: ChatCompletionRequest | CompletionRequest,
        question: Question,
        response_id: str,
        hold: _Hold,
    ) -> Response:
        hold.permit = await self._admission.acquire()
        hold.answer = answer = await self._gateway.generate(question)
        request.state.log = _log_fields(answer, response_id)
        echoes = await self._echoes(body, question, answer.decision.model)
        if body.stream:
            return _stream_reply(request, body, answer, response_id, echoes, hold.release)
        return await _whole_reply(body, answer, response_id, echoes)

    async def _echoes(
        self, body: ChatCompletionRequest | CompletionRequest, question: Question, model: str
    ) -> list[str]:
        """For each choice what the client wants to see before it: nothing, or the text of its prompt."""
        if not isinstance(body, CompletionRequest) or not body.echo:
            return [""] * len(question.requests)
        texts = []
        for prompt in question.prompts:
            match prompt:
                case TextPrompt(text=text):
                    texts.append(text)
                case TokenPrompt(token_ids=token_ids):
                    texts.append(await self._gateway.backend.detokenize(model, token_ids))
        return [text for text in texts for _ in range(question.num_siblings)]


@dataclass(slots=True)
class _Hold:
    """What a request holds while it lasts. It outlives the task that fills it, so a cancel between two steps of that
    task loses nothing."""

    permit: Permit | None = None
    answer: Answer | None = None

    async def release(self) -> None:
        try:
            if self.answer is not None:
                await self.answer.aclose()
        finally:
            if self.permit is not None:
                self.permit.release()


async def _whole_reply(
    body: ChatCompletionRequest | CompletionRequest, answer: Answer, response_id: str, echoes: list[str]
) -> Response:
    choices = [ChoiceText() for _ in answer.choices]
    async for index, chunk in answer:
        choices[index].add(chunk)
    usage = usage_body(answer.usage, answer.cost_usd)
    created, model = int(time.time()), answer.decision.model
    if isinstance(body, ChatCompletionRequest):
        content = chat_body(response_id, created, model, choices, usage, with_logprobs=bool(body.logprobs))
    else:
        with_logprobs = body.logprobs is not None
        content = completion_body(
            response_id, created, model, choices, usage, with_logprobs=with_logprobs, echoes=echoes
        )
    return JsonReply(content, headers=_decision_headers(answer, answer.cost_usd))


def _stream_reply(
    request: Request,
    body: ChatCompletionRequest | CompletionRequest,
    answer: Answer,
    response_id: str,
    echoes: list[str],
    release: Callable[[], Awaitable[None]],
) -> Response:
    with_usage = bool(body.stream_options and body.stream_options.include_usage)
    created, model = int(time.time()), answer.decision.model
    writer: EventWriter
    if isinstance(body, ChatCompletionRequest):
        writer = ChatEvents(response_id, created, model, with_logprobs=bool(body.logprobs), with_usage=with_usage)
    else:
        with_logprobs = body.logprobs is not None
        writer = CompletionEvents(
            response_id, created, model, with_logprobs=with_logprobs, with_usage=with_usage, echoes=echoes
        )
    events = _events(answer, writer, with_usage, request.state.request_id)
    return EventStreamReply(events, _decision_headers(answer, answer.decision.cost_usd), release)


async def _events(answer: Answer, writer: EventWriter, with_usage: bool, request_id: str) -> AsyncIterator[bytes]:
    try:
        async for index, chunk in answer:
            if event := writer.event(index, chunk):
                yield event
        if with_usage:
            yield writer.usage_event(usage_body(answer.usage, answer.cost_usd))
        yield DONE
    except Exception as error:
        if not isinstance(error, MillraceError):
            log.exception(line("unexpected error", request_id=request_id))
        yield error_event(reply_for(error, request_id).body)


def _decision_headers(answer: Answer, cost_usd: float | None) -> dict[str, str]:
    return {
        "x-millrace-model": answer.decision.model,
        "x-millrace-route-reason": answer.decision.reason,
        "x-millrace-cache": answer.decision.cache,
        "x-millrace-cost-usd": "unknown" if cost_usd is None else f"{cost_usd:.12f}",
    }


def _log_fields(answer: Answer, response_id: str) -> dict[str, str]:
    decision = answer.decision
    return {
        "response_id": response_id,
        "model": decision.model,
        "route_reason": decision.reason,
        "cache": decision.cache,
    }
