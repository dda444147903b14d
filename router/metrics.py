"""The gateway's Prometheus metrics: vLLM's names per model, so that its dashboards fill, and Millrace's own.

One registry per gateway, no global state. Counters and histograms are recorded once a request (gaps between chunks once
a chunk); gauges and the replicas' own counters are read from `backend.stats` when somebody scrapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from replicas.types import ReplicaStats, Usage

# Bucket bounds in seconds and tokens as in vLLM's `v1/metrics/loggers.py`, so that quantiles are comparable.
TTFT_BUCKETS_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
GAP_BUCKETS_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0),
)
LATENCY_BUCKETS_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
TOKEN_BUCKETS = tuple(float(m * 10**e) for e in range(6) for m in (1, 2, 5))

MODEL = ["model_name"]

StatsOf = Callable[[str], Sequence[ReplicaStats]]


class GatewayMetrics:
    """`models` are the catalogue's ids: their series exist, at zero, from the first scrape on."""

    def __init__(self, models: Sequence[str], stats_of: StatsOf) -> None:
        self._registry = registry = CollectorRegistry()
        registry.register(_ReplicaCollector(models, stats_of))

        def counter(name: str, text: str, labels: Sequence[str] = ()) -> Counter:
            return Counter(name, text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(name, text, MODEL, buckets=buckets, registry=registry)

        self._prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens of finished answers.", MODEL)
        self._cached_tokens = counter("vllm:prompt_tokens_cached", "Of those, found in the prefix cache.", MODEL)
        self._generation_tokens = counter("vllm:generation_tokens", "Tokens of finished answers.", MODEL)
        self._success = counter("vllm:request_success", "Finished answers.", [*MODEL, "finished_reason"])
        self._ttft = histogram("vllm:time_to_first_token_seconds", "Request to first chunk.", TTFT_BUCKETS_S)
        self._gap = histogram("vllm:inter_token_latency_seconds", "Between two chunks of an answer.", GAP_BUCKETS_S)
        self._tpot = histogram(
            "vllm:request_time_per_output_token_seconds", "Mean seconds a token after the first.", GAP_BUCKETS_S
        )
        self._e2e = histogram("vllm:e2e_request_latency_seconds", "Request to last chunk.", LATENCY_BUCKETS_S)
        self._prompt_size = histogram("vllm:request_prompt_tokens", "Prompt tokens of an answer.", TOKEN_BUCKETS)
        self._answer_size = histogram("vllm:request_generation_tokens", "Tokens of an answer.", TOKEN_BUCKETS)

        self.cache_lookups = counter("millrace:cache_lookups", "Requests by what the cache said.", ["outcome"])
        self.cache_saved_usd = counter("millrace:cache_saved_usd", "What cached answers cost when they were made.")
        self.routes = counter("millrace:routes", "Requests by answering model and reason.", ["model", "reason"])
        self.cost_usd = counter("millrace:cost_usd", "Cost of finished answers, where prices are known.", ["model"])
        self.resumptions = counter("millrace:resumptions", "Streams continued on another replica.", ["model"])
        self.http_requests = counter("millrace:http_requests", "HTTP requests.", ["route", "status"])
        self.admission_rejections = counter("millrace:admission_rejections", "Requests refused by a full queue.")

        for model in models:
            for by_model in (self._prompt_tokens, self._cached_tokens, self._generation_tokens):
                by_model.labels(model)
            for by_model in (self.cost_usd, self.resumptions):
                by_model.labels(model)

    def clock_answer(self, model: str, asked_s: float) -> AnswerClock:
        return AnswerClock(self._ttft.labels(model), self._gap.labels(model), asked_s)

    def record_answer(self, model: str, usage: Usage, finish_reason: str | None, clock: AnswerClock) -> None:
        """Of one choice that is over; None: it was aborted, so its tokens count but its times say nothing."""
        self._prompt_tokens.labels(model).inc(usage.num_prompt_tokens)
        self._cached_tokens.labels(model).inc(usage.num_cached_tokens)
        self._generation_tokens.labels(model).inc(usage.num_completion_tokens)
        self._success.labels(model, finish_reason or "abort").inc()
        if finish_reason is None:
            return
        self._prompt_size.labels(model).observe(usage.num_prompt_tokens)
        self._answer_size.labels(model).observe(usage.num_completion_tokens)
        self._e2e.labels(model).observe(clock.last_s - clock.asked_s)
        if usage.num_completion_tokens > 1:
            per_token_s = (clock.last_s - clock.first_s) / (usage.num_completion_tokens - 1)
            self._tpot.labels(model).observe(per_token_s)

    def exposition(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)

    def exported_names(self) -> frozenset[str]:
        """Every series name a scrape may show, as dashboards and rules write it: `_total`, `_bucket` and so on."""
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
        return frozenset(
            family.name + suffix for family in self._registry.collect() for suffix in suffixes.get(family.type, ())
        )


class AnswerClock:
    """When the chunks of one answer came, in seconds of one monotonic clock."""

    __slots__ = ("_gap", "_num_chunks", "_ttft", "asked_s", "first_s", "last_s")

    def __init__(self, ttft: Histogram, gap: Histogram, asked_s: float) -> None:
        self._ttft = ttft
        self._gap = gap
        self._num_chunks = 0
        self.asked_s = self.first_s = self.last_s = asked_s

    def note_chunk(self, now_s: float) -> None:
        if self._num_chunks == 0:
            self.first_s = now_s
            self._ttft.observe(now_s - self.asked_s)
        else:
            self._gap.observe(now_s - self.last_s)
        self._num_chunks += 1
        self.last_s = now_s


class _ReplicaCollector(Collector):
    """Reads the replicas' latest stats at scrape time, summed over the replicas of a model.

    The last count of every replica ever seen is kept, so that the sums never fall when one leaves or misses a reading.
    """

    def __init__(self, models: Sequence[str], stats_of: StatsOf) -> None:
        self._models = models
        self._stats_of = stats_of
        self._counts: dict[tuple[str, str], dict[str, int]] = {}

    def collect(self) -> Iterable[Metric]:
        running = GaugeMetricFamily("vllm:num_requests_running", "Requests in the running batches.", labels=MODEL)
        waiting = GaugeMetricFamily("vllm:num_requests_waiting", "Requests in the replicas' queues.", labels=MODEL)
        kv_usage = GaugeMetricFamily("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", labels=MODEL)
        replicas = GaugeMetricFamily("millrace:replicas", "Replicas that report.", labels=MODEL)
        intact = GaugeMetricFamily("millrace:blocks_intact", "1 while no replica has lost a KV block.", labels=MODEL)
        preempted = CounterMetricFamily("vllm:num_preemptions", "Preempted requests.", labels=MODEL)
        queries = CounterMetricFamily("vllm:prefix_cache_queries", "Tokens looked up by prefix.", labels=MODEL)
        hits = CounterMetricFamily("vllm:prefix_cache_hits", "Tokens found by prefix.", labels=MODEL)
        for model in self._models:
            stats = self._stats_of(model)
            num_blocks = sum(s.num_blocks for s in stats)
            used = sum(s.kv_usage * s.num_blocks for s in stats)
            running.add_metric([model], sum(s.num_running for s in stats))
            waiting.add_metric([model], sum(s.num_waiting for s in stats))
            kv_usage.add_metric([model], used / num_blocks if num_blocks else 0.0)
            replicas.add_metric([model], len(stats))
            intact.add_metric([model], float(all(s.is_intact for s in stats)))
            for family, field in ((preempted, "num_preemptions"), (queries, "prefix_queries"), (hits, "prefix_hits")):
                family.add_metric([model], self._total(model, field, stats))
        return (running, waiting, kv_usage, replicas, intact, preempted, queries, hits)

    def _total(self, model: str, field: str, stats: Sequence[ReplicaStats]) -> int:
        counts = self._counts.setdefault((model, field), {})
        counts.update({reading.replica: getattr(reading, field) for reading in stats})
        return sum(counts.values())
