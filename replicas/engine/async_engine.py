"""The engine beside an event loop: text in, chunks out, while the steps run in a thread of their own.

    loop ── commands (one SimpleQueue) ──▶ step thread           the thread sleeps on the queue when it has no work
    loop ◀── outputs (once per step) ───── step thread           a slow reader gets several steps in one chunk

Only the loop touches streams and text, only the thread touches the engine. Knows no Ray and no HTTP.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from typing import TypeVar

from replicas.engine.answer import Answer
from replicas.engine.config import EngineConfig
from replicas.engine.engine import Engine, SamplingDefaults
from replicas.engine.request import Request, RequestOutput
from replicas.engine.sampling_params import SamplingParams
from replicas.engine.tokenizer import Tokenizer
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

# Characters above which a prompt is encoded off the loop: about 2 ms of encoding.
LONG_PROMPT_CHARS = 8192

Number = TypeVar("Number", int, float)
Delivery = tuple[str, RequestOutput | MillraceError]


@dataclass(frozen=True, slots=True)
class _Add:
    request: Request


@dataclass(frozen=True, slots=True)
class _Abort:
    request_id: str


@dataclass(frozen=True, slots=True)
class _Stop:
    pass


class AsyncEngine:
    """All methods belong to the loop that called `start`."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, model_name: str) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._model_name = model_name
        self._streams: dict[str, asyncio.Queue[RequestOutput | MillraceError]] = {}
        self._ids = itertools.count()
        self._commands: SimpleQueue[_Add | _Abort | _Stop] = SimpleQueue()
        # Written by one side each; the difference is what the thread has not seen yet.
        self._num_sent = 0
        self._num_received = 0
        self._thread: threading.Thread | None = None
        self._is_sleeping = False
        self._refusal: ReplicaUnavailable | None = ReplicaUnavailable("the replica has not started yet")
        self._is_quiet = asyncio.Event()
        self._is_quiet.set()

    @classmethod
    def from_config(cls, config: EngineConfig, model_name: str) -> AsyncEngine:
        """The engine of a real model, not started. Raises ValueError with one sentence if it cannot be read."""
        # Here and not above: these import torch, which whoever brings an engine of its own need not load.
        from replicas.engine.models.loader import load_tokenizer, read_model_info
        from replicas.engine.worker import LocalExecutor

        info = read_model_info(config.model)
        engine = Engine(config, info, LocalExecutor(config, info))
        return cls(engine, load_tokenizer(config.model), model_name)

    async def start(self) -> None:
        """Load the model and begin to step. Raises ValueError where the model cannot be loaded."""
        assert self._thread is None, "an engine starts once"
        loop = asyncio.get_running_loop()
        started: asyncio.Future[None] = loop.create_future()
        self._thread = threading.Thread(target=self._run, args=(loop, started), name="engine", daemon=True)
        self._thread.start()
        await started
        self._refusal = None

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        """The answer to one request. Closing or cancelling the iterator aborts the request.

        Raises InvalidRequest, PromptTooLong, Overloaded, ReplicaUnavailable before the first chunk; EngineError or
        ReplicaUnavailable at any time."""
        self._refuse_if_closed()
        engine_request = await self._admissible(request)
        self._refuse_if_closed()
        answer = Answer(self._tokenizer, engine_request, request.emitted)
        if answer.is_finished:
            yield answer.last_chunk()
            return
        request_id = engine_request.request_id
        stream = self._open(request_id)
        self._num_sent += 1
        self._commands.put(_Add(engine_request))
        try:
            while not answer.is_finished:
                yield answer.chunk(await _take(stream))
        finally:
            self._close(request_id)
            if not answer.has_ended:
                self._commands.put(_Abort(request_id))

    async def tokenize(self, prompt: Prompt, add_special_tokens: bool = True) -> tuple[list[int], int]:
        """Token ids, and the context in tokens. Raises InvalidRequest for messages that the template refuses."""
        return await self._encode(prompt, add_special_tokens), self._engine.max_model_len

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """Text with special tokens. Raises InvalidRequest for an id outside the vocabulary."""
        self._check_vocabulary(token_ids, "tokens")
        if len(token_ids) > LONG_PROMPT_CHARS:
            return await asyncio.to_thread(self._tokenizer.decode, list(token_ids), False)
        return self._tokenizer.decode(list(token_ids), False)

    def stats(self) -> ReplicaStats:
        stats, executor = self._engine.stats(), self._engine.executor
        counters = stats.counters
        return ReplicaStats(
            model=self._model_name,
            num_running=stats.num_running,
            num_waiting=stats.num_waiting + self._num_arriving,
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
            heartbeat_age_s=self._heartbeat_age_s(stats.last_beat_s),
            kernels=executor.kernels_name,
            phases_s=dict(executor.phases_s),
        )

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests with ReplicaUnavailable and wait for the running ones, at most `timeout_s`."""
        if self._refusal is None:
            self._refusal = ReplicaUnavailable("the replica is draining")
        try:
            await asyncio.wait_for(self._is_quiet.wait(), timeout_s)
        except TimeoutError:
            logger.warning("%d requests still ran when the drain ended after %.0f s", len(self._streams), timeout_s)

    async def shutdown(self) -> None:
        """Stop after the step in flight. Streams still open end with ReplicaUnavailable."""
        self._refusal = ReplicaUnavailable("the replica is shut down")
        if self._thread is not None:
            self._commands.put(_Stop())
            await asyncio.to_thread(self._thread.join)
        self._fail_streams(self._refusal)

    # -- on the loop ---------------------------------------------------------------------------------------------

    async def _admissible(self, request: GenerateRequest) -> Request:
        """The engine's request, once it is clear that it can run."""
        token_ids = await self._encode(request.prompt, add_special_tokens=True)
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
            cache_salt=request.cache_salt,
            num_siblings=request.num_siblings,
        )
        try:
            self._engine.check(engine_request, self._num_arriving)
        except PromptTooLong as error:
            raise PromptTooLong(error.message, param) from None
        return engine_request

    async def _encode(self, prompt: Prompt, add_special_tokens: bool) -> list[int]:
        if isinstance(prompt, ChatPrompt):
            num_chars = sum(len(str(message.get("content", ""))) for message in prompt.messages)
            if num_chars > LONG_PROMPT_CHARS:
                return await asyncio.to_thread(self._tokenizer.encode_chat, prompt)
            return self._tokenizer.encode_chat(prompt)
        if isinstance(prompt, TextPrompt):
            if len(prompt.text) > LONG_PROMPT_CHARS:
                return await asyncio.to_thread(self._tokenizer.encode, prompt.text, add_special_tokens)
            return self._tokenizer.encode(prompt.text, add_special_tokens)
        return list(prompt.token_ids)

    def _check_vocabulary(self, token_ids: Sequence[int], param: str) -> None:
        size = self._engine.info.vocab_size
        if token_ids and not (min(token_ids) >= 0 and max(token_ids) < size):
            wrong = next(token_id for token_id in token_ids if not 0 <= token_id < size)
            raise InvalidRequest(f"{param} names token {wrong}; this model has tokens 0 to {size - 1}", param)

    def _refuse_if_closed(self) -> None:
        if self._refusal is not None:
            raise ReplicaUnavailable(self._refusal.message)

    def _open(self, request_id: str) -> asyncio.Queue[RequestOutput | MillraceError]:
        stream: asyncio.Queue[RequestOutput | MillraceError] = asyncio.Queue()
        self._streams[request_id] = stream
        self._is_quiet.clear()
        return stream

    def _close(self, request_id: str) -> None:
        del self._streams[request_id]
        if not self._streams:
            self._is_quiet.set()

    def _deliver(self, deliveries: list[Delivery]) -> None:
        for request_id, output in deliveries:
            if (stream := self._streams.get(request_id)) is not None:
                stream.put_nowait(output)

    def _fail_streams(self, error: ReplicaUnavailable) -> None:
        self._refusal = error
        for stream in self._streams.values():
            stream.put_nowait(error)

    @property
    def _num_arriving(self) -> int:
        return self._num_sent - self._num_received

    def _heartbeat_age_s(self, last_beat_s: float) -> float:
        # A thread that sleeps for want of work is well; one that died or hangs in a step grows old.
        is_alive = self._thread is not None and self._thread.is_alive()
        return 0.0 if is_alive and self._is_sleeping else time.monotonic() - last_beat_s

    # -- in the step thread --------------------------------------------------------------------------------------

    def _run(self, loop: asyncio.AbstractEventLoop, started: asyncio.Future[None]) -> None:
        try:
            self._engine.start()
        except BaseException as error:
            _call(loop, _settle, started, error)
            return
        _call(loop, _settle, started, None)
        end = ReplicaUnavailable("the replica is shut down")
        try:
            while self._obey(loop):
                outputs = self._engine.step()
                if outputs:
                    _call(loop, self._deliver, [(output.request_id, output) for output in outputs])
        except BaseException:
            logger.exception("the step loop died")
            end = ReplicaUnavailable("the replica's step loop died")
        finally:
            self._engine.shutdown()
            _call(loop, self._fail_streams, end)

    def _obey(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Carry out what was asked since the last step, sleeping while there is nothing to do; False: stop."""
        while True:
            try:
                command = self._commands.get_nowait()
            except Empty:
                if self._engine.has_work:
                    return True
                command = self._sleep()
            if isinstance(command, _Stop):
                return False
            if isinstance(command, _Abort):
                self._engine.abort(command.request_id)
            else:
                self._add(command.request, loop)

    def _sleep(self) -> _Add | _Abort | _Stop:
        self._engine.check_integrity()
        self._is_sleeping = True
        command = self._commands.get()
        self._is_sleeping = False
        return command

    def _add(self, request: Request, loop: asyncio.AbstractEventLoop) -> None:
        self._num_received += 1
        try:
            self._engine.add(request)
        except MillraceError as error:
            _call(loop, self._deliver, [(request.request_id, error)])


async def _take(stream: asyncio.Queue[RequestOutput | MillraceError]) -> list[RequestOutput]:
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


def _call(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *arguments: object) -> None:
    try:
        loop.call_soon_threadsafe(function, *arguments)
    except RuntimeError:
        # The loop was closed without `shutdown`: nobody is left to tell.
        logger.warning("the event loop closed before the engine stopped")


def _settle(started: asyncio.Future[None], error: BaseException | None) -> None:
    if started.done():
        return
    if error is None:
        started.set_result(None)
    else:
        started.set_exception(error)
