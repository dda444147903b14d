"""Replicas and a cache without engines: deterministic answers, deaths on demand, and a count of what is still open.

Token `i` of an answer is a pure function of (prompt, seed if sampled, i), as the real engine promises, so an answer
resumed on another replica continues as if nothing had happened.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace

from cache.types import CachedAnswer, CacheHit, CacheMiss, CacheQuery, LookupResult
from replicas.types import (
    ChatPrompt,
    Chunk,
    FinishReason,
    GenerateRequest,
    ModelNotFound,
    Overloaded,
    Prompt,
    PromptTooLong,
    ReplicaStats,
    ReplicaUnavailable,
    TextPrompt,
    TokenLogprob,
    TokenPrompt,
    Usage,
)
from router.failover import NoReplicaRunning

VOCABULARY = [
    " the",
    " river",
    "mill",
    " turns",
    ".",
    " grün",
    "\n",
    " 42",
    " 水",
    "-",
    " wheel",
    "s",
    " é",
    " and",
    "!",
    "x",
]
CONTEXT = 512
MAX_ANSWER = 24

HELD_BACK = 3
"""Characters that the fake's detokenizer holds back, as a stop string would make a real one do."""


async def _at_once() -> None:
    pass


@dataclass
class FakeBackend:
    models: Sequence[str] = ("small", "large")
    deaths: list[int | None] = field(default_factory=list)
    """For each attempt in order: after how many chunks its replica dies (None, or beyond the list: it lives)."""
    down: set[str] = field(default_factory=set)
    full: list[bool] = field(default_factory=list)
    """For each attempt in order: whether its replica's queue is full."""
    error: Exception | None = None
    """Raised before the first chunk of every attempt."""
    error_after: tuple[int, Exception] | None = None
    stall_after: int | None = None
    """After that many chunks a stream waits for `release`."""
    tokenizing: Callable[[], Awaitable[None]] = _at_once
    """Awaited by each call of `tokenize`."""
    stats_change: Callable[[ReplicaStats], ReplicaStats] = lambda stats: stats

    attempts: list[GenerateRequest] = field(default_factory=list)
    num_open: int = 0
    release: asyncio.Event = field(default_factory=asyncio.Event)

    async def stream_once(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        self.attempts.append(request)
        dies_after = self.deaths.pop(0) if self.deaths else None
        self.num_open += 1
        try:
            await asyncio.sleep(0)
            if request.model in self.down:
                raise NoReplicaRunning(f"{request.model} is down")
            if self.full and self.full.pop(0):
                raise Overloaded(f"{request.model} is full")
            if self.error is not None:
                raise self.error
            for position, chunk in enumerate(answer_chunks(request)):
                if position == dies_after:
                    raise ReplicaUnavailable("the replica died")
                if self.error_after is not None and position == self.error_after[0]:
                    raise self.error_after[1]
                if position == self.stall_after:
                    await self.release.wait()
                yield chunk
                await asyncio.sleep(0)
        finally:
            self.num_open -= 1

    def stats(self, model: str) -> Sequence[ReplicaStats]:
        if model in self.down or model not in self.models:
            return ()
        return (self.stats_change(an_idle_replica(model)),)

    async def tokenize(self, model: str, prompt: Prompt, add_special_tokens: bool) -> tuple[list[int], int]:
        await self.tokenizing()
        if model in self.down:
            raise NoReplicaRunning(f"{model} is down")
        special = [1] if add_special_tokens and not isinstance(prompt, ChatPrompt) else []
        return [*special, *prompt_tokens(prompt)], CONTEXT

    async def detokenize(self, model: str, token_ids: Sequence[int]) -> str:
        if model not in self.models:
            raise ModelNotFound(model)
        return "".join(VOCABULARY[token_id % len(VOCABULARY)] for token_id in token_ids)


def an_idle_replica(model: str) -> ReplicaStats:
    return ReplicaStats(
        model=model,
        num_running=1,
        num_waiting=2,
        num_blocks=100,
        num_free_blocks=75,
        kv_usage=0.25,
        max_model_len=CONTEXT,
        num_preemptions=3,
        num_prompt_tokens=10,
        num_completion_tokens=20,
        prefix_queries=40,
        prefix_hits=30,
        is_intact=True,
        heartbeat_age_s=0.1,
        kernels="fake",
    )


def answer_tokens(request: GenerateRequest) -> tuple[list[int], FinishReason]:
    """All token ids of the answer, and why it ends."""
    sampling = request.sampling
    temperature = 1.0 if sampling.temperature is None else sampling.temperature
    seed = sampling.seed if temperature > 0 else 0
    key = repr((request.prompt, seed)).encode()
    digest = hashlib.sha256(key).digest()
    length = 1 + digest[0] % MAX_ANSWER
    if sampling.ignore_eos:
        length = sampling.max_tokens or MAX_ANSWER
    limit = CONTEXT if sampling.max_tokens is None else sampling.max_tokens
    tokens = [hashlib.sha256(key + bytes([i % 256])).digest()[0] % len(VOCABULARY) for i in range(min(length, limit))]
    return tokens, "length" if len(tokens) == limit and limit < length else "stop"


def answer_text(request: GenerateRequest) -> str:
    return "".join(VOCABULARY[token] for token in answer_tokens(request)[0])


def answer_chunks(request: GenerateRequest) -> list[Chunk]:
    """A chunk a token, the text lagging behind, and a last one with the rest and the finish reason."""
    prompt = prompt_tokens(request.prompt)
    if len(prompt) >= CONTEXT:
        field_name = "messages" if isinstance(request.prompt, ChatPrompt) else "prompt"
        raise PromptTooLong(f"The prompt has {len(prompt)} tokens, the context {CONTEXT}.", field_name)
    tokens, finish_reason = answer_tokens(request)
    emitted = request.emitted
    assert tuple(tokens[: len(emitted.token_ids)]) == emitted.token_ids, "resumed with tokens that were never drawn"
    # another replica finds other blocks in its cache: the resumed prompt is found whole
    num_cached = len(prompt) // 2 if not emitted.token_ids else len(prompt)
    chunks, num_sent = [], emitted.num_chars
    for i in range(len(emitted.token_ids), len(tokens)):
        text = "".join(VOCABULARY[token] for token in tokens[: i + 1])
        end = max(num_sent, len(text) - HELD_BACK)
        logprobs = (_logprob(tokens[i], request.sampling.logprobs),) if request.sampling.logprobs is not None else ()
        usage = Usage(len(prompt), num_cached, i + 1) if i == len(emitted.token_ids) else None
        chunks.append(Chunk((tokens[i],), text[num_sent:end], logprobs, usage=usage))
        num_sent = end
    rest = "".join(VOCABULARY[token] for token in tokens)[num_sent:]
    usage = Usage(len(prompt), num_cached, len(tokens))
    chunks.append(Chunk((), rest, finish_reason=finish_reason, usage=usage))
    return chunks


def prompt_tokens(prompt: Prompt) -> list[int]:
    match prompt:
        case ChatPrompt(messages=messages):
            return [ord(c) % 97 for message in messages for c in str(message["content"])] + [7]
        case TextPrompt(text=text):
            return [ord(c) % 97 for c in text]
        case TokenPrompt(token_ids=token_ids):
            return list(token_ids)


def _logprob(token: int, num_top: int) -> TokenLogprob:
    others = [(token + k) % 16 for k in range(num_top)]
    top = tuple(TokenLogprob(other, VOCABULARY[other].encode(), -0.5 - k) for k, other in enumerate(others))
    return TokenLogprob(token, VOCABULARY[token].encode(), -0.5 if token else float("-inf"), top)


@dataclass
class FakeCache:
    """Exact matches, and one neighbour of all; a second asker of the same key does not wait."""

    answers: dict[str, CachedAnswer] = field(default_factory=dict)
    flights: set[str] = field(default_factory=set)
    neighbour: CachedAnswer | None = None
    """Answers every question that has no answer of its own."""
    num_lookups: int = 0

    async def lookup(self, query: CacheQuery) -> LookupResult:
        self.num_lookups += 1
        await asyncio.sleep(0)
        answer = self.answers.get(query.exact_key)
        if answer is not None and query.may_read:
            return CacheHit(answer, "hit-exact", 1.0, 0.0)
        if self.neighbour is not None:
            return CacheHit(self.neighbour, "hit-semantic", 0.97, 0.0)
        flight = f"flight-{self.num_lookups}"
        self.flights.add(flight)
        return CacheMiss(flight)

    async def store(self, query: CacheQuery, miss: CacheMiss, answer: CachedAnswer) -> None:
        await asyncio.sleep(0)
        self.answers[query.exact_key] = answer
        self.flights.remove(str(miss.flight))

    async def abandon(self, miss: CacheMiss) -> None:
        await asyncio.sleep(0)
        self.flights.remove(str(miss.flight))

    def awaiting(self, miss: CacheMiss) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    async def embed(self, texts: Sequence[str]) -> tuple[list[tuple[float, ...]], int]:
        return [(0.6, 0.8 if len(text) % 2 else -0.8, 0.0) for text in texts], sum(map(len, texts))


def with_heartbeat(age_s: float) -> Callable[[ReplicaStats], ReplicaStats]:
    return lambda stats: replace(stats, heartbeat_age_s=age_s)
