"""One real `millrace serve` for the whole session: Ray, Serve in the fast mode, HAProxy, two models."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from tests.tiny_model import save_tiny_model

START_TIMEOUT_S = 120
KIB = 1024


@dataclass
class Server:
    """A running `millrace serve` and what it printed until it was ready."""

    process: subprocess.Popen[str]
    url: str
    welcome: str

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def replicas(self, deployment: str, number: int, timeout_s: float = 60) -> list[psutil.Process]:
        """The processes of a deployment's replicas, once there are so many of them."""
        # Serve names each after its deployment; Ray rewrites the name while calls come and go.
        pattern = re.compile(rf"ServeReplica:millrace:{re.escape(deployment)}(?![\w-])")
        found: list[psutil.Process] = []

        def are_there() -> bool:
            found[:] = [p for p in self.descendants() if p.is_running() and pattern.search(" ".join(p.cmdline()))]
            return len(found) == number

        wait_until(are_there, timeout_s)
        return found


def start_server(config: Mapping[str, Any], folder: Path, environment: dict[str, str] | None = None) -> Server:
    port, dashboard_port = free_port(), free_port()
    server = config.get("server", {})
    config = {**config, "server": {**server, "port": port, "dashboard_port": dashboard_port}}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    process = subprocess.Popen(
        [sys.executable, "-m", "cluster", "serve", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **(environment or {})},
        start_new_session=True,
    )
    lines = []
    assert process.stdout is not None
    watchdog = _kill_after(process, START_TIMEOUT_S)
    for line in process.stdout:
        lines.append(line)
        if "Ctrl-C stops everything" in line:
            break
    watchdog.cancel()
    welcome = "".join(lines)
    if process.poll() is not None or "is ready" not in welcome:
        stop_server(process)
        pytest.fail(f"millrace serve did not start:\n{welcome}")
    return Server(process, f"http://127.0.0.1:{port}", welcome)


def stop_server(process: subprocess.Popen[str], timeout_s: float = 30) -> list[psutil.Process]:
    """One SIGINT to the whole group, as a terminal sends it; returns what outlives the program."""
    children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
    if process.stdout:
        process.stdout.close()
    _, alive = psutil.wait_procs(children, timeout=5)
    for child in alive:
        child.kill()
    return alive


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def wait_until(condition: Callable[[], bool], timeout_s: float = 30, period_s: float = 0.1) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(period_s)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    long_tiny_model = save_tiny_model(tmp_path_factory.mktemp("long"), max_position_embeddings=2048)
    config: dict[str, object] = {
        "models": [
            {
                "id": "smollm2-135m",
                "source": "bundled:smollm2-135m",
                "num_replicas": 2,
                "price": {"prompt": 0.02, "completion": 0.06, "cached_prompt": 0.005},
                "quality": 0.9,
                "engine": {"dtype": "float32", "kv_cache_memory_bytes": 256 * KIB * KIB, "max_model_len": 1024},
            },
            {
                "id": "tiny",
                "source": str(tiny_model),
                "price": {"prompt": 0.001, "completion": 0.002},
                "quality": 0.1,
                "engine": {"dtype": "float32", "num_gpu_blocks_override": 256, "block_size": 16},
            },
            {
                "id": "tiny-bf16",
                "source": str(long_tiny_model),
                "num_replicas": 2,
                "quality": 0.1,
                "engine": {"dtype": "bfloat16", "num_gpu_blocks_override": 2048, "block_size": 16},
            },
        ],
        "routing": {"policy": "cheapest_capable", "quality_target": 0.8},
        "cache": {"path": str(folder / "cache.sqlite3")},
    }
    running = start_server(config, folder)
    yield running
    stop_server(running.process)


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=120) as client:
        yield client


def _kill_after(process: subprocess.Popen[str], seconds: float) -> threading.Timer:
    timer = threading.Timer(seconds, process.kill)
    timer.daemon = True
    timer.start()
    return timer
