"""The engine beside an event loop: text in, chunks out, while `StepThread` runs the steps.

One mailbox per request: a reader that is slower than the steps finds several of them in it and sends them as one
chunk. Knows no Ray and no HTTP.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from replicas.engine.answer import Answer
from replicas.engine.config import EngineConfig
from replicas.engine.engine import Engine, SamplingDefaults
from replicas.engine.outbox import Outbox
from replicas.engine.request import Request
from replicas.engine.sampling_params import SamplingParams
from replicas.engine.scheduler import RequestOutput
from replicas.engine.step_thread import Delivery, StepThread
from replicas.engine.tokenizer import LONG_TEXT_CHARS, Tokenizer
from replicas.types import (
    ChatPrompt,
    Chunk,
    GenerateRequest,
    InvalidRequest,
    MillraceError,
    Prompt,
    PromptTooLong,
    ReplicaStats,
    ReplicaUnavailable,
    TextPrompt,
)

logger = logging.getLogger(__name__)

Number = TypeVar("Number", int, float)
Mailbox = asyncio.Queue[RequestOutput | MillraceError]


class AsyncEngine:
    """All methods belong to the loop that called `start`."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, model_name: str, max_hold_s: float) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._model_name = model_name
        self._streams: dict[str, Mailbox] = {}
        self._ids = itertools.count()
        self._thread = StepThread(engine, Outbox(max_hold_s), self._deliver, self._fail_streams)
        self._refusal: ReplicaUnavailable | None = ReplicaUnavailable("the replica has not started yet")

    @classmethod
    def from_config(cls, config: EngineConfig, model_name: str) -> AsyncEngine:
        """The engine of a real model, not started. Raises ValueError with one sentence if it cannot be read."""
        # Here and not above: these import torch, which whoever brings an engine of its own need not load.
        from replicas.engine.models.loader import load_tokenizer, read_model_info
        from replicas.engine.worker import LocalExecutor

        info = read_model_info(config.model)
        engine = Engine(config, info, LocalExecutor(config, info))
        return cls(engine, load_tokenizer(config.model), model_name, config.stream_interval_ms / 1e3)

    async def start(self) -> None:
        """Load the model and begin to step. Raises ValueError where the model cannot be loaded."""
        await self._thread.start()
        self._refusal = None

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        """The answer to one request. Closing or cancelling the iterator aborts the request.

        Raises InvalidRequest, PromptTooLong, Overloaded, ReplicaUnavailable before the first chunk; EngineError or
        ReplicaUnavailable at any time."""
        self._refuse_if_closed()
        engine_request = await self._admissible(request)
        self._refuse_if_closed()
        continues_prompt = not isinstance(request.prompt, ChatPrompt)
        answer = Answer(self._tokenizer, engine_request, request.emitted, continues_prompt)
        if answer.is_finished:
            yield answer.last_chunk()
            return
        request_id = engine_request.request_id
        stream = self._open(request_id)
        self._thread.add(engine_request)
        try:
            while not answer.is_finished:
                yield answer.chunk(await _take(stream))
        finally:
            self._close(request_id)
            if not answer.has_ended:
                self._thread.abort(request_id)

    async def tokenize(self, prompt: Prompt, add_special_tokens: bool = True) -> tuple[list[int], int]:
        """Token ids, and the context in tokens. Raises InvalidRequest for messages that the template refuses."""
        return await self._encode(prompt, add_special_tokens, None), self._engine.max_model_len

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """Text with special tokens. Raises InvalidRequest for an id outside the vocabulary."""
        self._check_vocabulary(token_ids, "tokens")
        if len(token_ids) > LONG_TEXT_CHARS:
            return await asyncio.to_thread(self._tokenizer.decode, list(token_ids), False)
        return self._tokenizer.decode(list(token_ids), False)

    def stats(self) -> ReplicaStats:
        stats, executor = self._engine.stats(), self._engine.executor
        counters = stats.counters
        return ReplicaStats(
            model=self._model_name,
            num_running=stats.num_running,
            num_waiting=stats.num_waiting + self._thread.num_arriving,
            num_blocks=stats.num_blocks,
            num_free_blocks=stats.num_free_blocks,
            kv_usage=1.0 - stats.num_free_blocks / stats.num_blocks,
            max_model_len=self._engine.max_model_len,
            num_preemptions=counters.num_preemptions,
            num_prompt_tokens=counters.num_prompt_tokens,
            num_completion_tokens=counters.num_completion_tokens,
            prefix_queries=counters.prefix_queries,
            prefix_hits=counters.prefix_hits,
            is_intact=stats.is_intact,
            heartbeat_age_s=self._thread.heartbeat_age_s(stats.last_beat_s),
            kernels=executor.kernels_name,
            phases_s=dict(executor.phases_s),
        )

    async def shutdown(self) -> None:
        """Stop after the step in flight. Streams still open end with ReplicaUnavailable."""
        self._refusal = ReplicaUnavailable("the replica is shut down")
        await self._thread.stop()
        self._fail_streams(self._refusal)

    async def _admissible(self, request: GenerateRequest) -> Request:
        """The engine's request, once it is clear that it can run. The queue is looked at first, for to encode is work,
        and once more at last, for others may have come meanwhile."""
        self._check_queue(request)
        token_ids = await self._encode(request.prompt, True, self._engine.max_model_len)
        param = "messages" if isinstance(request.prompt, ChatPrompt) else "prompt"
        sampling = _with_defaults(request.sampling, self._engine.info.sampling_defaults)
        self._check_vocabulary(token_ids, param)
        self._check_vocabulary(request.emitted.token_ids, "emitted")
        self._check_vocabulary(sampling.stop_token_ids, "stop_token_ids")
        self._check_vocabulary(tuple(sampling.logit_bias), "logit_bias")
        engine_request = Request(
            # A request that comes again, resumed, may meet its former self here, whose abort is still on its way.
            f"{request.request_id}#{next(self._ids)}",
            token_ids,
            sampling,
            eos_token_ids=self._engine.info.eos_token_ids | self._tokenizer.eos_token_ids,
            emitted_token_ids=request.emitted.token_ids,
            max_num_tokens=self._engine.max_model_len,
            cache_salt=request.cache_salt,
            num_siblings=request.num_siblings,
        )
        try:
            self._engine.check(engine_request)
        except PromptTooLong as error:
            raise PromptTooLong(error.message, param) from None
        self._check_queue(request)
        return engine_request

    def _check_queue(self, request: GenerateRequest) -> None:
        self._engine.check_queue(self._thread.num_arriving, is_resumed=bool(request.emitted.token_ids))

    async def _encode(self, prompt: Prompt, add_special_tokens: bool, max_num_tokens: int | None) -> list[int]:
        if isinstance(prompt, ChatPrompt):
            if _is_long_chat(prompt):
                return await asyncio.to_thread(self._tokenizer.encode_chat, prompt, max_num_tokens)
            return self._tokenizer.encode_chat(prompt, max_num_tokens)
        if isinstance(prompt, TextPrompt):
            text = prompt.text
            if len(text) > LONG_TEXT_CHARS:
                return await asyncio.to_thread(self._tokenizer.encode, text, add_special_tokens, max_num_tokens)
            return self._tokenizer.encode(text, add_special_tokens, max_num_tokens)
        return list(prompt.token_ids)

    def _check_vocabulary(self, token_ids: Sequence[int], param: str) -> None:
        size = self._engine.info.vocab_size
        if token_ids and not (min(token_ids) >= 0 and max(token_ids) < size):
            wrong = next(token_id for token_id in token_ids if not 0 <= token_id < size)
            raise InvalidRequest(f"{param} names token {wrong}; this model has tokens 0 to {size - 1}", param)

    def _refuse_if_closed(self) -> None:
        if self._refusal is not None:
            raise ReplicaUnavailable(self._refusal.message)

    def _open(self, request_id: str) -> Mailbox:
        stream: Mailbox = asyncio.Queue()
        self._streams[request_id] = stream
        return stream

    def _close(self, request_id: str) -> None:
        del self._streams[request_id]

    def _deliver(self, deliveries: list[Delivery]) -> None:
        for request_id, output in deliveries:
            if (stream := self._streams.get(request_id)) is not None:
                stream.put_nowait(output)

    def _fail_streams(self, error: ReplicaUnavailable) -> None:
        self._refusal = error
        for stream in self._streams.values():
            stream.put_nowait(error)


async def _take(stream: Mailbox) -> list[RequestOutput]:
    """All that waits in a stream, at least one output. Raises the error once nothing stands before it."""
    outputs: list[RequestOutput] = []
    item = await stream.get()
    while True:
        if isinstance(item, MillraceError):
            if not outputs:
                raise item
            stream.put_nowait(item)
            return outputs
        outputs.append(item)
        if stream.empty():
            return outputs
        item = stream.get_nowait()


def _is_long_chat(prompt: ChatPrompt) -> bool:
    """By its text and its number of values, tools included. No recursion: a client chooses how deep they nest."""
    size = 0
    values: list[object] = [*prompt.messages, *prompt.tools, prompt.template_kwargs]
    while values and size <= LONG_TEXT_CHARS:
        value = values.pop()
        size += len(value) if isinstance(value, str) else 1
        if isinstance(value, Mapping):
            values += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple):
            values += value
    return size > LONG_TEXT_CHARS


def _with_defaults(sampling: SamplingParams, defaults: SamplingDefaults) -> SamplingParams:
    """What the client left open is the model's own recommendation, else neutral."""
    return replace(
        sampling,
        temperature=_first(sampling.temperature, defaults.temperature, 1.0),
        top_p=_first(sampling.top_p, defaults.top_p, 1.0),
        top_k=_first(sampling.top_k, defaults.top_k, 0),
        repetition_penalty=_first(sampling.repetition_penalty, defaults.repetition_penalty, 1.0),
    )


def _first(wanted: Number | None, recommended: Number | None, neutral: Number) -> Number:
    if wanted is not None:
        return wanted
    return neutral if recommended is None else recommended
