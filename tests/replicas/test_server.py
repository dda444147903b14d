"""What a replica tells the dashboards. Ray's metrics are recorded here instead of exported; no cluster is started."""

from __future__ import annotations

import asyncio
import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
from ray.util import metrics

from replicas import server
from replicas.server import ModelServer, ReplicaMetrics
from replicas.types import Chunk, Usage


class RecordedMetric:
    """Stands for a Gauge, a Counter or a Histogram of Ray."""

    observed: dict[str, list[float]]

    def __init__(self, name: str, **options: Any) -> None:
        self._values = self.observed.setdefault(name, [])

    def observe(self, value: float, tags: dict[str, str]) -> None:
        self._values.append(value)

    inc = set = observe


@pytest.fixture
def observed(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[float]]:
    RecordedMetric.observed = {}
    for kind in ("Gauge", "Counter", "Histogram"):
        monkeypatch.setattr(metrics, kind, RecordedMetric)
    return RecordedMetric.observed


def final_chunk(num_completion_tokens: int) -> Chunk:
    return Chunk((), "", finish_reason="stop", usage=Usage(10, 0, num_completion_tokens))


def test_a_resumed_answer_counts_the_tokens_drawn_here(observed: dict[str, list[float]]) -> None:
    of_replica = ReplicaMetrics("m")
    of_replica.record(final_chunk(105), num_resumed=100, started=0.0, first=1.0, last=3.0)
    of_replica.record(final_chunk(101), num_resumed=100, started=0.0, first=1.0, last=1.0)
    of_replica.record(final_chunk(5), num_resumed=0, started=0.0, first=1.0, last=2.0)
    assert observed["vllm_request_time_per_output_token_seconds"] == [0.5, 0.25]
    assert observed["vllm_request_generation_tokens"] == [5, 1, 5]


async def test_one_failed_report_is_not_the_last(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    num_reports = 0
    is_reported_again = asyncio.Event()

    class Engine:
        def stats(self) -> None: ...

    class Metrics:
        def report(self, stats: None) -> None:
            nonlocal num_reports
            num_reports += 1
            if num_reports == 1:
                raise RuntimeError("no exporter")
            is_reported_again.set()

    monkeypatch.setattr(server, "REPORT_PERIOD_S", 0.001)
    monkeypatch.setattr(server.logger, "propagate", True)
    replica: Any = SimpleNamespace(_engine=Engine(), _metrics=Metrics())
    task = asyncio.create_task(ModelServer._report_forever(replica))
    await asyncio.wait_for(is_reported_again.wait(), 5)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert "no exporter" in caplog.text
