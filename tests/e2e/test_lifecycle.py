"""What a person at a terminal sees: the start, the busy port, the broken model, Ctrl-C."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import Server, free_port, start_server, stop_server

pytestmark = pytest.mark.e2e


def millrace(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "cluster", *arguments], capture_output=True, text=True, timeout=90)


def test_the_printed_curl_line_works_when_pasted(server: Server) -> None:
    (line,) = re.findall(r"^curl .*$", server.welcome, re.M)
    answer = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(answer.stdout)["choices"][0]["message"]["content"]


def test_dashboard_shows_the_deployments_by_name(server: Server) -> None:
    (url, token) = re.search(r"dashboard\s+(\S+)\s+token (\S+)", server.welcome).groups()  # type: ignore[union-attr]
    answer = httpx.get(f"{url}/api/serve/applications/", headers={"Authorization": f"Bearer {token}"}, timeout=30)
    deployments = answer.json()["applications"]["millrace"]["deployments"]
    assert set(deployments) == {"gateway", "semantic-cache", "model-smollm2-135m", "model-tiny", "model-tiny-bf16"}
    assert httpx.get(f"{url}/api/serve/applications/", timeout=30).status_code == 401, "Ray is not open to the network"


def test_health_ready_metrics_and_docs(http: httpx.Client) -> None:
    assert http.get("/health").status_code == 200
    assert http.get("/ready").json()
    metrics = http.get("/metrics").text
    for name in ("vllm:num_requests_running", "vllm:kv_cache_usage_perc", "millrace:cache_lookups_total"):
        assert name in metrics
    assert http.get("/docs").status_code == 200
    assert "/v1/chat/completions" in http.get("/openapi.json").json()["paths"]


def test_a_busy_port_is_one_sentence() -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        result = millrace("serve", "--port", str(s.getsockname()[1]))
    assert result.returncode == 1
    assert "in use" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_missing_model_is_one_sentence(tmp_path: Path) -> None:
    ports = ("--port", str(free_port()), "--dashboard-port", str(free_port()))
    result = millrace("serve", str(tmp_path / "no-such.gguf"), *ports)
    assert result.returncode == 1
    assert "no-such.gguf" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.timeout(180)
def test_keys_are_asked_for_and_one_ctrl_c_stops_everything(tmp_path: Path, tiny_model: Path) -> None:
    config: dict[str, object] = {
        "auth": {
            "keys": [{"tenant": "t", "sha256": "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b"}]
        },
        "models": [{"id": "tiny", "source": str(tiny_model), "engine": {"num_gpu_blocks_override": 64}}],
        "cache": {"enabled": False},
    }
    running = start_server(config, tmp_path)
    try:
        with httpx.Client(base_url=running.url) as client:
            assert client.get("/health").status_code == 200
            assert client.get("/v1/models").status_code == 401
            assert client.get("/v1/models", headers={"Authorization": "Bearer wrong"}).status_code == 401
            assert client.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200
            assert client.get("/metrics").status_code == 401
    finally:
        left = stop_server(running.process)
    assert left == []
    assert running.process.returncode == 0
