"""Writes `millrace.json`, the Grafana dashboard over the gateway's metrics, from the panel list below.

    python deploy/grafana/build_dashboard.py            writes it
    python deploy/grafana/build_dashboard.py --check    exits with 1 where the file is not what the list says

A list instead of edited JSON, so that tests can hold every expression against the exported metrics. Knows no Grafana
server and no Prometheus. Counters and histograms are each gateway's own, so they are summed; gauges are read from the
replicas by every gateway alike, so the largest reading is taken, not the sum.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("millrace.json")
UID = "millrace-serving"

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Query:
    expr: str
    legend: str


@dataclass(frozen=True, slots=True)
class Panel:
    title: str
    unit: str
    """Grafana's name of the unit."""
    queries: tuple[Query, ...]
    description: str = ""


def rate(metric: str, by: str, labels: str) -> str:
    """Increase per second of a counter, over all gateways."""
    return f"sum by ({by}) (rate({metric}{{{labels}}}[$__rate_interval]))"


def quantiles(metric: str) -> tuple[Query, ...]:
    """Median and 95th percentile of a histogram, by model."""
    buckets = f'sum by (le, model_name) (rate({metric}_bucket{{model_name=~"$model"}}[$__rate_interval]))'
    return tuple(
        Query(f"histogram_quantile({q}, {buckets})", f"{{{{model_name}}}} p{round(q * 100)}") for q in (0.5, 0.95)
    )


def gauge(metric: str, legend: str) -> Query:
    return Query(f'max by (model_name) ({metric}{{model_name=~"$model"}})', legend)


VLLM = 'model_name=~"$model"'
OURS = 'model=~"$model"'

ROWS: tuple[tuple[str, tuple[Panel, ...]], ...] = (
    (
        "Requests",
        (
            Panel(
                "Requests by status",
                "reqps",
                (Query(rate("millrace:http_requests_total", "status", ""), "{{status}}"),),
            ),
            Panel(
                "Share of server errors",
                "percentunit",
                (
                    Query(
                        'sum(rate(millrace:http_requests_total{status=~"5.."}[$__rate_interval]))'
                        " / sum(rate(millrace:http_requests_total[$__rate_interval]))",
                        "5xx",
                    ),
                ),
            ),
            Panel(
                "Requests in the engines",
                "short",
                (
                    gauge("vllm:num_requests_running", "{{model_name}} running"),
                    gauge("vllm:num_requests_waiting", "{{model_name}} waiting"),
                ),
            ),
            Panel(
                "Refused at admission",
                "reqps",
                (Query("sum(rate(millrace:admission_rejections_total[$__rate_interval]))", "429"),),
                "Requests answered with 429 because the gateway's queue was full.",
            ),
        ),
    ),
    (
        "Latency",
        (
            Panel("Time to first token (TTFT)", "s", quantiles("vllm:time_to_first_token_seconds")),
            Panel("Between tokens", "s", quantiles("vllm:inter_token_latency_seconds")),
            Panel("Per output token (TPOT)", "s", quantiles("vllm:request_time_per_output_token_seconds")),
            Panel("Whole request (E2E)", "s", quantiles("vllm:e2e_request_latency_seconds")),
        ),
    ),
    (
        "Tokens",
        (
            Panel(
                "Completion tokens per second",
                "short",
                (Query(rate("vllm:generation_tokens_total", "model_name", VLLM), "{{model_name}}"),),
            ),
            Panel(
                "Prompt tokens per second",
                "short",
                (
                    Query(rate("vllm:prompt_tokens_total", "model_name", VLLM), "{{model_name}}"),
                    Query(rate("vllm:prompt_tokens_cached_total", "model_name", VLLM), "{{model_name}} cached"),
                ),
                "Cached: read from the prefix cache instead of computed.",
            ),
            Panel(
                "Requests by finish reason",
                "reqps",
                (Query(rate("vllm:request_success_total", "finished_reason", VLLM), "{{finished_reason}}"),),
            ),
        ),
    ),
    (
        "Engine",
        (
            Panel("KV cache in use", "percentunit", (gauge("vllm:kv_cache_usage_perc", "{{model_name}}"),)),
            Panel(
                "Prefix cache hit rate",
                "percentunit",
                (
                    Query(
                        f"max by (model_name) (rate(vllm:prefix_cache_hits_total{{{VLLM}}}[$__rate_interval]))"
                        f" / max by (model_name) (rate(vllm:prefix_cache_queries_total{{{VLLM}}}[$__rate_interval]))",
                        "{{model_name}}",
                    ),
                ),
            ),
            Panel("Replicas that report", "short", (gauge("millrace:replicas", "{{model_name}}"),)),
            Panel("KV blocks all accounted for", "bool", (gauge("millrace:blocks_intact", "{{model_name}}"),)),
            Panel(
                "Preemptions per second",
                "short",
                (
                    Query(
                        f"max by (model_name) (rate(vllm:num_preemptions_total{{{VLLM}}}[$__rate_interval]))",
                        "{{model_name}}",
                    ),
                ),
                "Running requests that gave up their blocks and will be recomputed.",
            ),
            Panel(
                "Resumed streams per second",
                "short",
                (Query(rate("millrace:resumptions_total", "model", OURS), "{{model}}"),),
                "Streams that went on at another replica because theirs died.",
            ),
        ),
    ),
    (
        "Semantic cache, routing, cost",
        (
            Panel(
                "Cache lookups by outcome",
                "reqps",
                (Query(rate("millrace:cache_lookups_total", "outcome", ""), "{{outcome}}"),),
            ),
            Panel(
                "Cache hit rate",
                "percentunit",
                (
                    Query(
                        'sum(rate(millrace:cache_lookups_total{outcome=~"hit.*"}[$__rate_interval]))'
                        " / sum(rate(millrace:cache_lookups_total[$__rate_interval]))",
                        "hits",
                    ),
                ),
            ),
            Panel(
                "Routes by model and reason",
                "reqps",
                (Query(rate("millrace:routes_total", "model, reason", OURS), "{{model}} {{reason}}"),),
            ),
            Panel(
                "Cost per hour",
                "currencyUSD",
                (
                    Query(f"3600 * {rate('millrace:cost_usd_total', 'model', OURS)}", "{{model}}"),
                    Query("3600 * sum(rate(millrace:cache_saved_usd_total[$__rate_interval]))", "saved by the cache"),
                ),
            ),
        ),
    ),
)

NUM_COLUMNS = 24
ROW_HEIGHT, PANEL_HEIGHT = 1, 8


def build() -> Json:
    """The whole dashboard as Grafana imports it. Deterministic: ids count upwards in the order of the list."""
    return {
        "uid": UID,
        "title": "Millrace",
        "tags": ["millrace", "llm"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "",
        "templating": {"list": _variables()},
        "annotations": {"list": []},
        "panels": _panels(),
    }


def expressions() -> list[str]:
    """Every PromQL expression of the dashboard, the variable's own excepted."""
    return [query.expr for _, panels in ROWS for panel in panels for query in panel.queries]


def render() -> str:
    return json.dumps(build(), indent=2) + "\n"


def _variables() -> list[Json]:
    models = "label_values(vllm:num_requests_running, model_name)"
    return [
        {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus", "refresh": 1},
        {
            "name": "model",
            "label": "Model",
            "type": "query",
            "datasource": _datasource(),
            "definition": models,
            "query": {"query": models, "refId": "models"},
            "refresh": 2,
            "sort": 1,
            "multi": True,
            "includeAll": True,
            "allValue": ".*",
        },
    ]


def _panels() -> list[Json]:
    panels: list[Json] = []
    top = 0
    for title, row in ROWS:
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": title,
                "collapsed": False,
                "gridPos": {"x": 0, "y": top, "w": NUM_COLUMNS, "h": ROW_HEIGHT},
                "panels": [],
            }
        )
        top += ROW_HEIGHT
        width = NUM_COLUMNS // len(row)
        for column, panel in enumerate(row):
            position = {"x": column * width, "y": top, "w": width, "h": PANEL_HEIGHT}
            panels.append(_time_series(len(panels) + 1, panel, position))
        top += PANEL_HEIGHT
    return panels


def _time_series(panel_id: int, panel: Panel, position: Json) -> Json:
    return {
        "id": panel_id,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.description,
        "datasource": _datasource(),
        "gridPos": position,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + i), "datasource": _datasource(), "expr": query.expr, "legendFormat": query.legend}
            for i, query in enumerate(panel.queries)
        ],
    }


def _datasource() -> Json:
    return {"type": "prometheus", "uid": "${datasource}"}


def main(argv: Sequence[str]) -> int:
    if list(argv) == ["--check"]:
        if PATH.exists() and PATH.read_text() == render():
            return 0
        print(f"{PATH.name} is not what its panel list says: run python deploy/grafana/build_dashboard.py")
        return 1
    if argv:
        print(__doc__)
        return 2
    PATH.write_text(render())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
