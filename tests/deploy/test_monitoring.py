"""Dashboard and alerts speak of exported metrics, in PromQL that Prometheus takes, and fire when they should."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"

HISTOGRAMS = {
    "vllm:time_to_first_token_seconds",
    "vllm:inter_token_latency_seconds",
    "vllm:request_time_per_output_token_seconds",
    "vllm:e2e_request_latency_seconds",
    "vllm:request_prompt_tokens",
    "vllm:request_generation_tokens",
}
COUNTERS = {
    "vllm:prompt_tokens",
    "vllm:generation_tokens",
    "vllm:prompt_tokens_cached",
    "vllm:request_success",
    "vllm:num_preemptions",
    "vllm:prefix_cache_queries",
    "vllm:prefix_cache_hits",
    "millrace:cache_lookups",
    "millrace:cache_saved_usd",
    "millrace:routes",
    "millrace:cost_usd",
    "millrace:resumptions",
    "millrace:http_requests",
    "millrace:admission_rejections",
}
GAUGES = {
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "millrace:replicas",
    "millrace:blocks_intact",
}
EXPORTED = (
    GAUGES
    | {f"{name}_total" for name in COUNTERS}
    | {f"{name}_{part}" for name in HISTOGRAMS for part in ("bucket", "sum", "count")}
)
"""What the gateway's /metrics shows, as Prometheus names it."""

needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Prometheus) is not installed")


@cache
def dashboard() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_dashboard", DEPLOY / "grafana" / "build_dashboard.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look for their annotations
    spec.loader.exec_module(module)
    return module


def rules() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DEPLOY / "prometheus" / "rules.yaml").read_text())
    return loaded


def alerts() -> list[dict[str, Any]]:
    return [rule for group in rules()["groups"] for rule in group["rules"]]


def metrics(expression: str) -> set[str]:
    """The metric names in PromQL: label matchers and ranges cut away, then whatever carries one of our prefixes."""
    return set(re.findall(r"\b(?:vllm:|millrace:|ray_)\w+", re.sub(r"\{[^}]*\}|\[[^]]*\]", "", expression)))


def test_the_dashboard_on_disk_is_what_the_panel_list_says() -> None:
    assert (DEPLOY / "grafana" / "millrace.json").read_text() == dashboard().render()


def test_the_dashboard_is_one_that_grafana_imports() -> None:
    built = json.loads(dashboard().render())
    assert built["uid"] == "millrace-serving"
    assert [variable["name"] for variable in built["templating"]["list"]] == ["datasource", "model"]
    ids = [panel["id"] for panel in built["panels"]]
    assert len(ids) == len(set(ids))
    taken: set[tuple[int, int]] = set()
    for panel in built["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, f"{panel['title']} covers another panel"
        taken |= cells


def test_every_panel_asks_for_exported_metrics() -> None:
    for expression in dashboard().expressions():
        assert metrics(expression), expression
        assert metrics(expression) <= EXPORTED, expression


def test_the_gateway_exports_what_is_listed_here() -> None:
    metrics_module = pytest.importorskip("router.metrics")
    gateway = metrics_module.GatewayMetrics(["m"], lambda model: ())
    assert gateway.exported_names() == EXPORTED


def test_every_counter_and_gauge_is_shown() -> None:
    shown = set().union(*(metrics(expression) for expression in dashboard().expressions()))
    assert GAUGES | {f"{name}_total" for name in COUNTERS} <= shown


def test_every_alert_asks_for_exported_metrics() -> None:
    serve = Path(str(importlib.util.find_spec("ray.serve._private").submodule_search_locations[0]))  # type: ignore[union-attr,index]
    sources = "".join((serve / name).read_text() for name in ("deployment_state.py", "application_state.py"))
    for alert in alerts():
        named = metrics(alert["expr"])
        assert named, alert["alert"]
        for name in named:
            assert name in EXPORTED or f'"{name.removeprefix("ray_")}"' in sources, f"{alert['alert']}: {name}"


def test_the_operators_rules_are_prometheus_own() -> None:
    resource = yaml.safe_load((DEPLOY / "components" / "monitoring" / "prometheus-rule.yaml").read_text())
    assert resource["kind"] == "PrometheusRule"
    assert resource["spec"] == rules()


def test_each_alert_has_a_severity_and_a_summary() -> None:
    for alert in alerts():
        assert alert["labels"]["severity"] in {"warning", "critical"}, alert["alert"]
        assert alert["annotations"]["summary"], alert["alert"]


@needs_promtool
def test_prometheus_parses_every_expression(tmp_path: Path) -> None:
    """A dashboard's expressions are checked as recording rules, Grafana's interval filled in."""
    recorded = [
        {"record": f"panel:{i}", "expr": e.replace("$__rate_interval", "5m").replace("$model", ".*")}
        for i, e in enumerate(dashboard().expressions())
    ]
    panels = tmp_path / "panels.yaml"
    panels.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": recorded}]}))
    for path in (panels, DEPLOY / "prometheus" / "rules.yaml"):
        _promtool("check", "rules", str(path))


TTFT = 'vllm:time_to_first_token_seconds_bucket{model_name="m", le='
CASES: dict[str, tuple[str, dict[str, str], dict[str, str]]] = {
    # alert -> (when to look, series under which it fires, series under which it does not); a value a minute
    "MillraceEndpointDown": ("10m", {"other": "1x30"}, {'vllm:num_requests_running{model_name="m"}': "0x30"}),
    "MillraceDeploymentUnhealthy": (
        "15m",
        {'ray_serve_deployment_status{application="millrace", deployment="gateway"}': "6x4 2x20"},
        {'ray_serve_deployment_status{application="millrace", deployment="gateway"}': "6x4 3x20"},
    ),
    "MillraceReplicaDown": (
        "5m",
        {
            'ray_serve_deployment_replica_healthy{application="millrace", deployment="gateway", replica="a"}': "1x20",
            'ray_serve_deployment_replica_healthy{application="millrace", deployment="gateway", replica="b"}': "0x20",
        },
        {'ray_serve_deployment_replica_healthy{application="millrace", deployment="gateway", replica="a"}': "1x20"},
    ),
    "MillraceNoReplica": (
        "10m",
        {f'millrace:replicas{{model_name="m", instance="{i}"}}': "2x5 0x20" for i in "ab"},
        {'millrace:replicas{model_name="m", instance="a"}': "1x30"},
    ),
    "MillraceErrorRate": (
        "20m",
        {
            'millrace:http_requests_total{status="200"}': "0+95x30",
            'millrace:http_requests_total{status="500"}': "0+5x30",
        },
        {
            'millrace:http_requests_total{status="200"}': "0+95x30",
            'millrace:http_requests_total{status="429"}': "0+5x30",
        },
    ),
    "MillraceSlowFirstToken": (
        "30m",
        {f'{TTFT}"5"}}': "0+1x40", f'{TTFT}"10"}}': "0+10x40", f'{TTFT}"+Inf"}}': "0+10x40"},
        {f'{TTFT}"5"}}': "0+10x40", f'{TTFT}"10"}}': "0+10x40", f'{TTFT}"+Inf"}}': "0+10x40"},
    ),
    "MillraceKVCacheFull": (
        "20m",
        {'vllm:kv_cache_usage_perc{model_name="m"}': "0.99x30"},
        {'vllm:kv_cache_usage_perc{model_name="m"}': "0.9x30"},
    ),
    "MillraceQueueGrows": (
        "15m",
        {'vllm:num_requests_waiting{model_name="m", instance="a"}': "40x30"},
        {f'vllm:num_requests_waiting{{model_name="m", instance="{i}"}}': "20x30" for i in "ab"},
    ),
    "MillraceRequestsRefused": (
        "15m",
        {"millrace:admission_rejections_total": "0+2x30"},
        {"millrace:admission_rejections_total": "7x30"},
    ),
    "MillraceStreamsResumed": (
        "20m",
        {'millrace:resumptions_total{model="m"}': "0+1x30"},
        {'millrace:resumptions_total{model="m"}': "0x10 1x20"},
    ),
}


def test_every_alert_has_a_case() -> None:
    assert set(CASES) == {alert["alert"] for alert in alerts()}


@needs_promtool
@pytest.mark.parametrize("firing", [True, False])
@pytest.mark.parametrize("alert", CASES)
def test_the_alert_fires_when_it_should_and_only_then(alert: str, firing: bool, tmp_path: Path) -> None:
    at, noisy, quiet = CASES[alert]
    rule = next(r for r in alerts() if r["alert"] == alert)
    # Without labels and annotations, so that a case need not repeat their wording.
    bare = {"alert": alert, "expr": f"count({rule['expr']}) > 0", "for": rule.get("for", "0s")}
    rule_file = tmp_path / "rules.yaml"
    rule_file.write_text(yaml.safe_dump({"groups": [{"name": "one", "rules": [bare]}]}))
    case = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in (noisy if firing else quiet).items()],
        "alert_rule_test": [{"eval_time": at, "alertname": alert, "exp_alerts": [{}] if firing else []}],
    }
    test_file = tmp_path / "case.yaml"
    test_file.write_text(
        yaml.safe_dump({"rule_files": [rule_file.name], "evaluation_interval": "1m", "tests": [case]}, sort_keys=False)
    )
    _promtool("test", "rules", str(test_file))


def _promtool(*arguments: str) -> None:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stdout + done.stderr
