"""The story of a request, from a parsed question to a stream of chunks: look up, choose, stream, store.

Knows no HTTP (`app.py`) and no Ray (`server.py`): its neighbours are the two protocols below.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

from cache.policy import Bypass, CacheControl, plan
from cache.types import CachedAnswer, CacheHit, CacheMiss, CacheQuery, LookupResult
from replicas.types import (
    Chunk,
    GenerateRequest,
    MillraceError,
    ModelNotFound,
    Overloaded,
    Prompt,
    PromptTooLong,
    ReplicaStats,
    ReplicaUnavailable,
    Usage,
)
from router.answer import Answer, CacheOutcome, Choice, Decision
from router.catalog import Catalog
from router.choosing import ModelChooser
from router.failover import resumed_stream
from router.logs import line, log
from router.merging import IndexedChunk, merged
from router.metrics import GatewayMetrics
from router.policy import Route, RoutingPolicy
from router.quality import QualityEstimator
from router.question import Question
from router.settings import GatewaySettings

REPLAY_CHARS = 256
"""A cached answer is replayed in chunks of this size."""

MAX_COUNT_S = 1.0
"""An answer from the cache waits for no longer than this for the number of its prompt's tokens."""


class Backend(Protocol):
    """The model replicas. `router/server.py` implements it with Serve handles."""

    def stream_once(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        """One attempt on one replica. Raises `ReplicaUnavailable` when that replica is lost, before or amid the
        stream, and the request's own error (`InvalidRequest`, `Overloaded`, `EngineError`) otherwise.
        Closing the iterator aborts the request."""
        ...

    def stats(self, model: str) -> Sequence[ReplicaStats]:
        """The latest reading of each running replica of `model` (at most a second or two old); empty: none runs."""
        ...

    async def tokenize(self, model: str, prompt: Prompt, add_special_tokens: bool) -> tuple[list[int], int]:
        """Token ids, and the model's context length."""
        ...

    async def detokenize(self, model: str, token_ids: Sequence[int]) -> str: ...


class Cache(Protocol):
    """The semantic cache. `cache/server.py`'s deployment implements it; a lost cache is a miss, never an error."""

    async def lookup(self, query: CacheQuery) -> LookupResult: ...

    async def store(self, query: CacheQuery, miss: CacheMiss, answer: CachedAnswer) -> None: ...

    async def abandon(self, miss: CacheMiss) -> None:
        """The answer will not come (error, cancel, not storable): let the next waiter lead."""
        ...

    def awaiting(self, miss: CacheMiss) -> AbstractContextManager[None]:
        """While entered, a chunk of the answer is waited for, and the flight kept however long that takes. A flight
        whose answer waits for its client instead is lost to the next waiter when its lease runs out."""
        ...

    async def embed(self, texts: Sequence[str]) -> tuple[list[tuple[float, ...]], int]:
        """L2-normalised embeddings, and the number of tokens read."""
        ...


@dataclass(frozen=True, slots=True)
class _Lookup:
    outcome: CacheOutcome
    query: CacheQuery | None = None
    result: LookupResult | None = None

    @property
    def embedding(self) -> Sequence[float] | None:
        return self.result.embedding if isinstance(self.result, CacheMiss) else None


class Gateway:
    """`clock` is monotonic, in seconds. Call `close` at the end: answers may still be on their way to the cache."""

    def __init__(
        self,
        backend: Backend,
        cache: Cache | None,
        catalog: Catalog,
        policy: RoutingPolicy,
        quality: QualityEstimator,
        settings: GatewaySettings,
        metrics: GatewayMetrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.backend = backend
        self.catalog = catalog
        self.metrics = metrics
        self._cache = cache
        self._chooser = ModelChooser(catalog, policy, quality, settings, backend.stats)
        self._settings = settings
        self._clock = clock
        self._background: set[asyncio.Task[None]] = set()

    async def generate(self, question: Question) -> Answer:
        """The answer, its first chunk already here, so that an early failure is still a status and not half a stream.

        Raises `ModelNotFound`, `NoCapableModel` and whatever a replica raised before its first chunk. The caller
        iterates the answer and closes it.
        """
        asked_s = self._clock()
        lookup = await self._look_up(question)
        if isinstance(lookup.result, CacheHit):
            return self._replay(question, lookup.result)
        try:
            route = self._chooser.choose(question, lookup.embedding)
            with self._awaiting(lookup):
                opened = await self._open(question, route)
        except BaseException:
            self._abandon(lookup)
            raise
        if opened.is_substitute:  # its answer must not stand under the other model's name, and nobody waits for it
            self._abandon(lookup)
            lookup = _Lookup(lookup.outcome)
        model = opened.model
        return Answer(
            self._decision(question, route, model, lookup.outcome),
            opened.first,
            opened.rest,
            choices=[
                Choice(self.metrics.clock_answer(model, asked_s), keeps_text=lookup.query is not None)
                for _ in question.requests
            ],
            num_siblings=question.num_siblings,
            price=self.catalog.resolve(model).price,
            clock=self._clock,
            awaiting=lambda: self._awaiting(lookup),
            on_end=lambda answer: self._settle(answer, lookup),
        )

    async def embed(self, model: str, texts: Sequence[str]) -> tuple[list[tuple[float, ...]], int]:
        """With the cache's embedder. Raises `ModelNotFound` where `model` is not its id."""
        embedder = self._settings.embedder
        if self._cache is None or embedder is None or model != embedder:
            there_is = f"the embedding model here is {embedder!r}" if embedder else "this endpoint embeds nothing"
            raise ModelNotFound(f"The model {model[:200]!r} does not embed; {there_is}.")
        return await self._cache.embed(texts)

    async def close(self) -> None:
        """Waits for answers on their way to the cache."""
        while self._background:
            await asyncio.gather(*self._background)

    # look up

    async def _look_up(self, question: Question) -> _Lookup:
        lookup = await self._consult_cache(question, self._chooser.model_class(question))
        self.metrics.cache_lookups.labels(lookup.outcome).inc()
        return lookup

    async def _consult_cache(self, question: Question, model_class: str) -> _Lookup:
        if self._cache is None or len(question.requests) > 1:
            return _Lookup("bypass")
        query = plan(
            question.cache_request,
            tenant=question.tenant,
            model_class=model_class,
            control=CacheControl.parse(question.cache_control),
            allow_sampled=self._settings.cache_sampled,
        )
        if isinstance(query, Bypass):
            return _Lookup("bypass")
        result = await self._cache.lookup(query)
        if isinstance(result, CacheHit):
            return _Lookup(result.kind, query, result)
        return _Lookup("miss" if query.may_read else "bypass", query, result)

    def _replay(self, question: Question, hit: CacheHit) -> Answer:
        """A cached answer takes the same road as a fresh one, as chunks; no replica works and nothing is billed."""
        cached = hit.answer
        if cached.cost_usd is not None:
            self.metrics.cache_saved_usd.inc(cached.cost_usd)
        self.metrics.routes.labels(cached.model, "cached").inc()
        first, *rest = _pieces(cached.text)
        return Answer(
            Decision(cached.model, "cached", hit.kind, 0.0),
            (0, Chunk((), first)),
            self._replayed(question, hit, rest),
            choices=[Choice(None, keeps_text=False)],
            num_siblings=1,
            price=None,
            clock=self._clock,
            awaiting=contextlib.nullcontext,
            on_end=lambda answer: None,
        )

    async def _replayed(self, question: Question, hit: CacheHit, texts: Sequence[str]) -> AsyncIterator[IndexedChunk]:
        for text in texts:
            yield 0, Chunk((), text)
        # last, so that the text need not wait for it
        usage = Usage(await self._num_prompt_tokens(question, hit), 0, hit.answer.num_completion_tokens)
        yield 0, Chunk((), "", finish_reason="stop", stop_reason=hit.answer.stop_reason, usage=usage)

    async def _num_prompt_tokens(self, question: Question, hit: CacheHit) -> int:
        """Of the asker's own prompt; where nobody can tell, of the one that the cached answer was made for."""
        model, stored = hit.answer.model, hit.answer.num_prompt_tokens
        if hit.kind == "hit-exact" or not self.backend.stats(model):
            return stored
        try:
            async with asyncio.timeout(MAX_COUNT_S):
                token_ids, _ = await self.backend.tokenize(model, question.prompts[0], add_special_tokens=True)
        except (MillraceError, TimeoutError):
            return stored
        return len(token_ids)

    # stream

    async def _open(self, question: Question, route: Route) -> _Opened:
        """The first model of the route that brings a first chunk; once one has, the request stays with it."""
        refusals: list[MillraceError] = []
        models = (route.model, *route.fallbacks)
        for num_passed, model in enumerate(models):
            is_last = num_passed == len(models) - 1
            if not is_last and not self.backend.stats(model):
                refusals.append(ReplicaUnavailable(f"No replica of {model!r} is running."))
                continue
            trial = _Trial(may_fall_back=not is_last)
            stream = self._stream(question, model, trial)
            try:
                first = await anext(stream)
                trial.may_fall_back = False
                return _Opened(model, first, stream, is_substitute=route.is_substitute or num_passed > 0)
            except (ReplicaUnavailable, Overloaded, PromptTooLong) as error:
                refusals.append(error)
        # one that may pass is worth more to the client than a prompt too long for a fallback
        raise next((error for error in refusals if not isinstance(error, PromptTooLong)), refusals[0])

    def _stream(self, question: Question, model: str, trial: _Trial) -> AsyncIterator[IndexedChunk]:
        return merged(
            [
                resumed_stream(
                    self.backend,
                    replace(request, model=model),
                    self._settings.failover,
                    http_request_id=question.http_request_id,
                    may_fall_back=lambda: trial.may_fall_back,
                    on_resume=self.metrics.resumptions.labels(model).inc,
                )
                for request in question.requests
            ]
        )

    def _decision(self, question: Question, route: Route, model: str, outcome: CacheOutcome) -> Decision:
        reason = route.reason if model == route.model else "fallback"
        self.metrics.routes.labels(model, reason).inc()
        return Decision(model, reason, outcome, self._chooser.predicted_cost_usd(question, model))

    # store

    def _settle(self, answer: Answer, lookup: _Lookup) -> None:
        """Once per answer, when it is over: the books, then the cache. Whole answers that stopped by themselves are
        stored; otherwise the next who asks the same must not wait for this one."""
        model, usage, cost_usd = answer.decision.model, answer.usage, answer.cost_usd
        for choice in answer.choices:
            assert choice.clock is not None, "a generated answer is clocked"
            self.metrics.record_answer(model, choice.usage, choice.finish_reason, choice.clock)
        if cost_usd is not None:
            self.metrics.cost_usd.labels(model).inc(cost_usd)
        query, miss, last = lookup.query, lookup.result, answer.choices[0]
        if self._cache is None or query is None or not isinstance(miss, CacheMiss):
            return
        if not query.may_store or last.finish_reason != "stop":
            self._abandon(lookup)
            return
        cached = CachedAnswer(
            last.text, model, usage.num_prompt_tokens, usage.num_completion_tokens, cost_usd, last.stop_reason
        )
        self._in_background(self._cache.store(query, miss, cached))

    def _awaiting(self, lookup: _Lookup) -> AbstractContextManager[None]:
        if self._cache is None or not isinstance(lookup.result, CacheMiss):
            return contextlib.nullcontext()
        return self._cache.awaiting(lookup.result)

    def _abandon(self, lookup: _Lookup) -> None:
        if self._cache is not None and isinstance(lookup.result, CacheMiss) and lookup.result.flight is not None:
            self._in_background(self._cache.abandon(lookup.result))

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        """Beside the client's stream, which should neither wait for the cache nor cancel what it is told."""
        task = asyncio.get_running_loop().create_task(_logged(work))
        self._background.add(task)
        task.add_done_callback(self._background.discard)


@dataclass(frozen=True, slots=True)
class _Opened:
    """An answer that has begun."""

    model: str
    first: IndexedChunk
    rest: AsyncIterator[IndexedChunk]
    is_substitute: bool
    """Another model than the one that would answer this question on a good day."""


@dataclass(slots=True)
class _Trial:
    """Of one model for one request: until its first chunk another model may take over."""

    may_fall_back: bool


def _pieces(text: str) -> list[str]:
    return [text[cut : cut + REPLAY_CHARS] for cut in range(0, max(1, len(text)), REPLAY_CHARS)]


async def _logged(work: Coroutine[Any, Any, None]) -> None:
    try:
        await work
    except Exception:
        log.exception(line("cache refused an answer"))
