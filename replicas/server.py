"""One replica of a model as a Serve deployment: an `AsyncEngine` with health, stats, metrics and a graceful end.

Knows Serve; knows nothing of HTTP, of other models or of who asks. A cancelled stream becomes an abort because closing
the engine's iterator is one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace

from ray import serve
from ray.util import metrics

from replicas.engine.async_engine import AsyncEngine
from replicas.engine.config import EngineConfig
from replicas.logs import log_like_serve
from replicas.types import Chunk, GenerateRequest, Prompt, ReplicaStats

logger = logging.getLogger("ray.serve")

MAX_HEARTBEAT_AGE_S = 60.0
"""A step that takes longer than this counts as a stalled engine; Serve replaces the replica after three such checks."""
REPORT_PERIOD_S = 2.0


class ModelServer:
    """Each constructor argument is a plain value, so that a change of any of them is a rolling update."""

    async def __init__(self, model_id: str, config: EngineConfig) -> None:  # type: ignore[misc]
        log_like_serve("replicas")
        # Serve awaits an async constructor; the replica is ready when it returns.
        self._engine = AsyncEngine.from_config(config, model_id)
        await self._engine.start()
        stats = self._engine.stats()
        logger.info(f"{model_id}: {stats.num_blocks} KV blocks, kernels {stats.kernels}, start {dict(stats.phases_s)}")
        self._replica = serve.get_replica_context().replica_id.unique_id
        self._metrics = ReplicaMetrics(model_id)
        self._reporter = asyncio.create_task(self._report_forever())

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        """Raises the tree of `replicas.types`; closing the stream aborts the request."""
        started = time.perf_counter()
        first = last = started
        chunks = self._engine.generate(request)
        try:
            async for chunk in chunks:
                last = time.perf_counter()
                if first == started:
                    first = last
                if chunk.finish_reason is not None and chunk.usage is not None:
                    self._metrics.record(chunk, len(request.emitted.token_ids), started, first, last)
                yield chunk
        finally:
            await chunks.aclose()  # type: ignore[attr-defined]

    async def tokenize(self, prompt: Prompt, add_special_tokens: bool) -> tuple[list[int], int]:
        return await self._engine.tokenize(prompt, add_special_tokens)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        return await self._engine.detokenize(token_ids)

    async def stats(self) -> ReplicaStats:
        return replace(self._engine.stats(), replica=self._replica)

    async def check_health(self) -> None:
        age_s = self._engine.stats().heartbeat_age_s
        if age_s > MAX_HEARTBEAT_AGE_S:
            raise RuntimeError(f"the engine has not finished a step for {age_s:.0f} s")

    async def __del__(self) -> None:
        # Serve has already waited for running streams (graceful_shutdown_timeout_s) when it calls this.
        if hasattr(self, "_reporter"):
            self._reporter.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reporter
            await self._engine.shutdown()

    async def _report_forever(self) -> None:
        while True:
            await asyncio.sleep(REPORT_PERIOD_S)
            try:
                self._metrics.report(self._engine.stats())
            except Exception:  # one reading is lost, not all that would follow
                logger.exception("the metrics of this replica could not be reported; the next reading will be tried")


class ReplicaMetrics:
    """vLLM's metric names through Ray, so that Ray's own *Serve LLM* dashboard fills. Ray prefixes `ray_` and appends
    `_total` to counters. Recorded per request and per reading, never per token."""

    def __init__(self, model_id: str) -> None:
        self._tags = {"model_name": model_id}
        self._finished_tags = ("model_name", "finished_reason")
        self._running = self._gauge("vllm_num_requests_running")
        self._waiting = self._gauge("vllm_num_requests_waiting")
        self._kv_usage = self._gauge("vllm_kv_cache_usage_perc")
        self._counters = {
            field: metrics.Counter(name, tag_keys=("model_name",))
            for field, name in (
                ("num_prompt_tokens", "vllm_prompt_tokens"),
                ("num_completion_tokens", "vllm_generation_tokens"),
                ("prefix_queries", "vllm_prefix_cache_queries"),
                ("prefix_hits", "vllm_prefix_cache_hits"),
                ("num_preemptions", "vllm_num_preemptions"),
            )
        }
        self._success = metrics.Counter("vllm_request_success", tag_keys=self._finished_tags)
        self._ttft = self._histogram("vllm_time_to_first_token_seconds", LATENCY_BUCKETS_S)
        self._tpot = self._histogram("vllm_request_time_per_output_token_seconds", TPOT_BUCKETS_S)
        self._e2e = self._histogram("vllm_e2e_request_latency_seconds", LATENCY_BUCKETS_S)
        self._prompt = self._histogram("vllm_request_prompt_tokens", TOKEN_BUCKETS)
        self._generation = self._histogram("vllm_request_generation_tokens", TOKEN_BUCKETS)
        self._seen: dict[str, int] = dict.fromkeys(self._counters, 0)

    def record(self, final: Chunk, num_resumed: int, started: float, first: float, last: float) -> None:
        """One finished request, the first `num_resumed` of its tokens being drawn elsewhere, in times of which nothing
        is known here; times in seconds of `time.perf_counter`."""
        usage = final.usage
        assert usage is not None, "the last chunk carries usage"
        self._success.inc(1, {**self._tags, "finished_reason": str(final.finish_reason)})
        self._ttft.observe(first - started, self._tags)
        self._e2e.observe(last - started, self._tags)
        num_drawn = usage.num_completion_tokens - num_resumed
        if num_drawn > 1:
            self._tpot.observe((last - first) / (num_drawn - 1), self._tags)
        self._prompt.observe(usage.num_prompt_tokens, self._tags)
        self._generation.observe(num_drawn, self._tags)

    def report(self, stats: ReplicaStats) -> None:
        self._running.set(stats.num_running, self._tags)
        self._waiting.set(stats.num_waiting, self._tags)
        self._kv_usage.set(stats.kv_usage, self._tags)
        for field, counter in self._counters.items():
            value: int = getattr(stats, field)
            if value > self._seen[field]:  # Ray's Counter refuses an increment of 0
                counter.inc(value - self._seen[field], self._tags)
                self._seen[field] = value

    def _gauge(self, name: str) -> metrics.Gauge:
        return metrics.Gauge(name, tag_keys=("model_name",))

    def _histogram(self, name: str, buckets: Sequence[float]) -> metrics.Histogram:
        return metrics.Histogram(name, boundaries=list(buckets), tag_keys=("model_name",))


LATENCY_BUCKETS_S = (
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
)
TPOT_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
TOKEN_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000)
