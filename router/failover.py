"""A stream that outlives its replica: when one is lost, another continues exactly where the client's copy ends.

Works because sampling is a pure function of (logits, params, seed, position): the continuation is what the lost replica
would have said. Knows no Ray; how a replica's death shows is `Backend`'s business.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Protocol

from replicas.types import Chunk, Emitted, EngineError, GenerateRequest, MillraceError, Overloaded, ReplicaUnavailable
from router.logs import line, log
from router.settings import FailoverSettings

ATTEMPTS_BEFORE_FALLBACK = 3


class NoReplicaRunning(ReplicaUnavailable):
    """There is none to ask, so none was lost."""


class Attempts(Protocol):
    def stream_once(self, request: GenerateRequest) -> AsyncIterator[Chunk]: ...


async def resumed_stream(
    attempts: Attempts,
    request: GenerateRequest,
    settings: FailoverSettings,
    *,
    http_request_id: str = "",
    may_fall_back: Callable[[], bool] = lambda: False,
    on_resume: Callable[[], None] = lambda: None,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> AsyncIterator[Chunk]:
    """The chunks of `request`, each token once, up to the one with a finish reason.

    An attempt that ends early, with `ReplicaUnavailable`, with `abort` or without a finish reason, is followed by one
    that starts from the tokens forwarded so far. Raises `ReplicaUnavailable` after as many fruitless ones in a row as
    `settings` allows, or after `ATTEMPTS_BEFORE_FALLBACK` while another model may still take over (`may_fall_back`),
    and `EngineError` once the request has lost as many replicas as one may.
    The request's own errors pass straight through, and so does `Overloaded` before the first token; later the answer
    waits for a place, because half of it is out.
    """
    names = {"request_id": http_request_id, "response_id": request.request_id, "model": request.model}
    seam = _Seam(request.emitted)
    num_fruitless = num_losses = 0
    while True:
        stream = attempts.stream_once(replace(request, emitted=seam.emitted()))
        try:
            async for chunk in stream:
                if chunk.finish_reason == "abort":
                    break  # nobody here aborted: the replica gave the request up
                num_fruitless = 0
                yield seam.forward(chunk)
                if chunk.finish_reason is not None:
                    return
            lost: MillraceError = ReplicaUnavailable(f"A replica of {request.model!r} ended the answer before its end.")
        except ReplicaUnavailable as error:
            lost = error
        except Overloaded as error:
            if not seam.num_tokens:
                raise
            lost = error
        finally:
            await close(stream)
        num_fruitless += 1
        num_losses += not isinstance(lost, NoReplicaRunning | Overloaded)
        if num_losses >= settings.max_losses:
            log.error(line("given up", **names, num_losses=num_losses))
            raise EngineError(
                f"{num_losses} replicas of {request.model!r} were lost while they worked on this request; it may be "
                "what ends them, so it is not tried again."
            )
        if num_fruitless >= _max_fruitless(settings, may_fall_back(), seam.num_tokens):
            raise ReplicaUnavailable(f"No replica of {request.model!r} is available now: {lost.message}") from lost
        log.info(line("resumed", **names, num_tokens=seam.num_tokens))
        on_resume()
        # an attempt that got somewhere is followed at once; later ones give Serve time to notice the death
        await sleep(min(settings.max_wait_s, settings.first_wait_s * 2.0 ** (num_fruitless - 1)))


def _max_fruitless(settings: FailoverSettings, may_fall_back: bool, num_tokens: int) -> int:
    if may_fall_back:
        return ATTEMPTS_BEFORE_FALLBACK
    return settings.max_attempts_amid_answer if num_tokens else settings.max_attempts_before_first_token


async def close(stream: AsyncIterator[object]) -> None:
    """Closing is what aborts a request; iterators that are no generators may have nothing to close."""
    aclose = getattr(stream, "aclose", None)
    if aclose is not None:
        await aclose()


class _Seam:
    """What the client holds, and the usage figures that must not change over a seam."""

    def __init__(self, emitted: Emitted) -> None:
        self._token_ids = list(emitted.token_ids)
        self._num_chars = emitted.num_chars
        self._num_cached_tokens: int | None = None

    @property
    def num_tokens(self) -> int:
        return len(self._token_ids)

    def emitted(self) -> Emitted:
        return Emitted(tuple(self._token_ids), self._num_chars)

    def forward(self, chunk: Chunk) -> Chunk:
        """Takes note of the chunk. A later replica finds other blocks cached; the client paid for the first's."""
        self._token_ids.extend(chunk.token_ids)
        self._num_chars += len(chunk.text)
        if chunk.usage is None:
            return chunk
        if self._num_cached_tokens is None:
            self._num_cached_tokens = chunk.usage.num_cached_tokens
        if chunk.usage.num_cached_tokens == self._num_cached_tokens:
            return chunk
        return replace(chunk, usage=replace(chunk.usage, num_cached_tokens=self._num_cached_tokens))
