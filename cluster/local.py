"""A cluster on this machine: Ray, Serve and one application, started with progress and stopped to the last process.

Knows how to start and stop, not what runs (`app.py`) nor what is printed (`cli.py`).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from cluster.config import MillraceConfig
from cluster.haproxy import prefer_launcher
from cluster.placement import (
    CACHE_CPUS,
    GATEWAY_CPUS,
    MODEL_CPUS,
    Resources,
    check_gpus,
    model_resources,
    threads_per_replica,
    total_cpus,
)
from replicas.engine.kernels.cpu.build import KernelsUnavailable, library_path
from replicas.engine.models.source import find_on_this_machine

GIB = 2**30
OBJECT_STORE_BYTES = 256 * 2**20  # requests and chunks travel by value; the store holds next to nothing
READY_TIMEOUT_S = 600.0


class StartError(Exception):
    """Why the cluster cannot run here, in one sentence that says what to do."""


class Interrupted(Exception):
    """The user asked to stop while the cluster was starting."""


@dataclass(slots=True)
class LocalCluster:
    """Use as a context manager: whatever was started is stopped on the way out, also when the start fails."""

    config: MillraceConfig
    stop_requested: threading.Event
    on_phase: Callable[[str], None]
    phases_s: dict[str, float] = field(default_factory=dict)
    ray_token: str | None = None
    kernels: dict[str, list[str]] = field(default_factory=dict)
    """By model, what its replicas compute with."""
    why_no_kernels: str | None = None
    """Why plain torch has to compute on the CPU."""

    def __enter__(self) -> LocalCluster:
        return self

    def __exit__(self, *_: object) -> None:
        # Without `serve.shutdown()`: it waits for drains that nobody on this machine needs, and Ray ends its own.
        _import_ray().shutdown()

    @property
    def url(self) -> str:
        host = self.config.server.host
        host = "127.0.0.1" if host in ("0.0.0.0", "::") else host
        return (
            f"http://[{host}]:{self.config.server.port}" if ":" in host else f"http://{host}:{self.config.server.port}"
        )

    @property
    def dashboard_url(self) -> str:
        return f"http://127.0.0.1:{self.config.server.dashboard_port}"

    def start(self) -> None:
        """Returns once the endpoint answers. Raises StartError or Interrupted."""
        check_machine(self.config)
        self.ray_token = prepare_environment()
        self._compile_kernels()
        with self._phase("Ray"):
            self._start_ray()
        with self._phase("Ray Serve"):
            self._start_serve()
        with self._phase("models"):
            self._deploy()
        with self._phase("endpoint"):
            self._wait_until_ready()

    def _compile_kernels(self) -> None:
        """Before the replicas do, so that the wait has a name and a failure is said here."""
        if any(model.engine.device in ("auto", "cpu") for model in self.config.models):
            try:
                library_path(on_compile=lambda: self.on_phase("the compilation of the CPU kernels, once"))
            except KernelsUnavailable as error:
                self.why_no_kernels = str(error)

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self.on_phase(name)
        started = time.perf_counter()
        yield
        self.phases_s[name] = time.perf_counter() - started
        if self.stop_requested.is_set():
            raise Interrupted

    def _start_ray(self) -> None:
        ray = _import_ray()
        try:
            ray.init(
                address="local",
                num_cpus=max(len(os.sched_getaffinity(0)), int(reserved_cpus(self.config)) + 1),
                include_dashboard=True,
                dashboard_host="127.0.0.1",
                dashboard_port=self.config.server.dashboard_port,
                object_store_memory=OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level="ERROR",
                configure_logging=True,
                _node_ip_address="127.0.0.1",
            )
        except Exception as error:
            raise StartError(f"Ray did not start: {_last_line(error)}") from None
        finally:
            # Ray has put a handler of its own over ours, one that prints a stack and dies.
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.getsignal(number))

    def _start_serve(self) -> None:
        from ray import serve

        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        serve.start(http_options={"host": self.config.server.host, "port": self.config.server.port})

    def _deploy(self) -> None:
        import ray
        from ray import serve

        from cluster.app import APP_NAME, build

        num_gpus = ray.cluster_resources().get("GPU", 0.0)
        try:
            check_gpus(
                [(model_resources(m.engine.device, m.num_gpus, num_gpus), m.num_replicas) for m in self.config.models],
                num_gpus,
            )
        except ValueError as error:
            raise StartError(str(error)) from None
        app = build(with_local_threads(self.config), num_gpus, max_start_attempts=1)
        failure: list[BaseException] = []

        def deploy() -> None:
            try:
                serve.run(app, name=APP_NAME, route_prefix="/")
            except BaseException as error:
                failure.append(error)

        thread = threading.Thread(target=deploy, name="deploy", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(0.2)
            if self.stop_requested.is_set():
                raise Interrupted
        if failure:
            raise StartError(_why_not_deployed(serve.status(), failure[0]))

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + READY_TIMEOUT_S
        with httpx.Client(timeout=5.0) as client:
            while time.monotonic() < deadline:
                with contextlib.suppress(httpx.HTTPError):
                    answer = client.get(f"{self.url}/ready")
                    if answer.status_code == 200:
                        self.kernels = {model["id"]: model["kernels"] for model in answer.json()["models"]}
                        return
                if self.stop_requested.wait(0.1):
                    raise Interrupted
        raise StartError(f"{self.url}/ready did not answer within {READY_TIMEOUT_S:.0f} s; see {logs_directory()}")


def check_machine(config: MillraceConfig) -> None:
    """Raises StartError for what can be known before anything is started: missing files, ports and memory."""
    for model in config.models:
        is_path = model.source.endswith(".gguf") or model.source.startswith(("/", "./", "../", "~"))
        if is_path and not os.path.exists(os.path.expanduser(model.source)):
            raise StartError(
                f"model {model.id}: {model.source} does not exist; name a folder, a .gguf file or a hub id"
            )
    server = config.server
    if server.port == server.dashboard_port:
        raise StartError(f"--port and --dashboard-port are both {server.port}; choose two different ports")
    check_port("--port", server.host, server.port)
    check_port("--dashboard-port", "127.0.0.1", server.dashboard_port)
    needed, available = required_bytes(config), available_bytes()
    if needed > available:
        raise StartError(
            f"too little memory: this configuration needs about {needed / GIB:.1f} GiB and {available / GIB:.1f} GiB "
            "are available; close other programs, or configure fewer replicas or smaller models"
        )


def prepare_environment() -> str | None:
    """What Ray and Serve read when they start: the fast mode, silence towards the outside, own ports, a token.

    Returns the token that Ray asks for from now on, None if the user has configured Ray's authentication."""
    token = None
    if "RAY_AUTH_MODE" not in os.environ:
        # Ray's own ports listen on all interfaces whatever the host; without a token they run anybody's code.
        token = secrets.token_hex(16)
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token)
    os.environ.update(
        RAY_SERVE_ENABLE_HA_PROXY="1",
        RAY_SERVE_THROUGHPUT_OPTIMIZED="1",
        RAY_USAGE_STATS_ENABLED="0",
        RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S="0",
        RAY_SERVE_HAPROXY_METRICS_ENABLED="0",
        # HAProxy cuts streams this long after any of its reloads: longer than any stream is.
        RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S="3600",
        HF_HUB_DISABLE_TELEMETRY="1",
        TOKENIZERS_PARALLELISM="false",
        RAY_worker_niceness="0",  # Ray would run replicas behind every other program of the machine
        RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE="1",  # a log line is there when its request is over, not 1,000 later
        # Threads that spin long at a barrier starve the gateway beside them; those that never spin wake late.
        GOMP_SPINCOUNT="2000",
    )
    prefer_launcher()
    for name in (
        "RAY_SERVE_HAPROXY_STATS_PORT",
        "RAY_SERVE_HAPROXY_METRICS_PORT",
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",
    ):
        os.environ[name] = str(free_port())
    return token


def with_local_threads(config: MillraceConfig) -> MillraceConfig:
    """Model replicas on one machine share its cores evenly, unless the configuration says otherwise."""
    threads = threads_per_replica(len(os.sched_getaffinity(0)), sum(m.num_replicas for m in config.models))
    models = tuple(
        m.model_copy(update={"engine": m.engine.model_copy(update={"num_threads": m.engine.num_threads or threads})})
        for m in config.models
    )
    return config.model_copy(update={"models": models})


def reserved_cpus(config: MillraceConfig) -> float:
    replicas = [(Resources(MODEL_CPUS), m.num_replicas) for m in config.models]
    replicas.append((Resources(GATEWAY_CPUS), config.gateway.num_replicas))
    if config.cache.enabled:
        replicas.append((Resources(CACHE_CPUS), 1))
    return total_cpus(replicas)


def required_bytes(config: MillraceConfig) -> int:
    """A rough lower bound: Ray and Serve, the embedder, and per model replica Python with torch, weights, KV cache."""
    needed = int(1.2 * GIB) + (GIB // 2 if config.cache.enabled else 0)
    for model in config.models:
        kv = model.engine.kv_cache_memory_bytes or 0
        needed += model.num_replicas * (GIB // 2 + kv + weight_bytes(model.source))
    return needed


def weight_bytes(source: str) -> int:
    """Of the weights in memory; 0 where nothing is known yet (a hub id that is not downloaded)."""
    path = find_on_this_machine(source)
    if path is None:
        return 0
    if path.is_dir():
        return sum(f.stat().st_size for f in path.glob("*.safetensors"))
    # A 4-bit file grows about fourfold when it is dequantized to 16 bits; larger types grow less.
    return 4 * path.stat().st_size


def available_bytes() -> int:
    """What this process may still take: the machine's available memory, within the cgroup's limit."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    for limit, usage in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):
            available = min(available, int(Path(limit).read_text()) - int(Path(usage).read_text()))
    return available


def check_port(flag: str, host: str, port: int) -> None:
    """Raises StartError where nobody could listen there now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise StartError(f"port {port} on {host} is in use; choose another with {flag}") from None
            if error.errno == errno.EACCES:
                raise StartError(f"port {port} may be taken by root only; choose one above 1023 with {flag}") from None
            raise StartError(f"cannot listen on {host}: {error.strerror}; name an address of this machine") from None


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def logs_directory() -> str:
    return "/tmp/ray/session_latest/logs/serve"


def _import_ray() -> Any:
    try:
        import ray
        import ray.serve
    except ImportError as error:
        raise StartError(f"the installation is broken ({error}); run `make clean` and install again") from None
    return ray


def _why_not_deployed(status: Any, error: BaseException) -> str:
    """The sentence that a replica's constructor raised, out of Serve's report."""
    for app in status.applications.values():
        for name, deployment in app.deployments.items():
            causes = re.findall(r"^(?:\w+\.)*(?:\w*Error|\w*Exception): (.+)$", deployment.message, re.M)
            if causes and deployment.status != "HEALTHY":
                return f"{name}: {causes[-1]}"
        if causes := re.findall(r"(?:ValueError|ConfigError)[:(] ?['\"]?(.+?)['\"]?\)?$", app.message or "", re.M):
            return str(causes[-1])
    return f"{_last_line(error)}; see {logs_directory()}"


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
