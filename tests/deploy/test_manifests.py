"""The kustomize builds as a cluster would take them: schemas, references, drain times, fences, capacity."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

Manifest = dict[str, Any]

ROOT = Path(__file__).parents[2]
OVERLAYS = ("cpu", "gpu")
LONGEST_STREAM_S = 600
PROXY_MIN_DRAINING_S = 30
"""Ray's RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S: for so long a stopping gateway still takes requests."""
USER_PROVIDED = {"Secret": {"millrace-redis", "millrace-api-keys", "millrace-hub", "millrace-metrics-key"}}
CLUSTER_SCOPED = {"Namespace"}

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")


@cache
def build(overlay: str) -> tuple[Manifest, ...]:
    return _kustomize(ROOT / "deploy" / "overlays" / overlay)


@cache
def build_monitored(overlay: str) -> tuple[Manifest, ...]:
    """The overlay with the optional monitoring component, the way docs/deploy.md says to take it."""
    with tempfile.TemporaryDirectory() as folder:
        deploy = Path(shutil.copytree(ROOT / "deploy", Path(folder) / "deploy"))
        trial = deploy / "overlays" / "trial"
        trial.mkdir()
        trial.joinpath("kustomization.yaml").write_text(
            f"namespace: millrace\nresources: [../{overlay}]\ncomponents: [../../components/monitoring]\n"
        )
        return _kustomize(trial)


def _kustomize(folder: Path) -> tuple[Manifest, ...]:
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    return tuple(yaml.safe_load_all(done.stdout))


def only(kind: str, overlay: str) -> Manifest:
    [found] = [m for m in build(overlay) if m["kind"] == kind]
    return found


def ray_pods(overlay: str) -> Iterator[tuple[str, Manifest]]:
    """Head and worker groups: name, group spec."""
    cluster = only("RayService", overlay)["spec"]["rayClusterConfig"]
    yield "head", cluster["headGroupSpec"]
    for group in cluster["workerGroupSpecs"]:
        yield group["groupName"], group


def pod_templates(manifests: tuple[Manifest, ...]) -> Iterator[Manifest]:
    for manifest in manifests:
        if manifest["kind"] == "RayService":
            cluster = manifest["spec"]["rayClusterConfig"]
            for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
                yield group["template"]
        elif manifest["kind"] in {"StatefulSet", "Deployment"}:
            yield manifest["spec"]["template"]


def serve_config(overlay: str) -> Manifest:
    config: Manifest = yaml.safe_load(only("RayService", overlay)["spec"]["serveConfigV2"])
    return config


def deployments(overlay: str) -> list[Manifest]:
    [application] = serve_config(overlay)["applications"]
    return list(application["deployments"])


def millrace_config(overlay: str) -> Manifest:
    [application] = serve_config(overlay)["applications"]
    config: Manifest = application["args"]
    return config


def env(pod: Manifest) -> dict[str, str | None]:
    [container] = pod["template"]["spec"]["containers"]
    return {variable["name"]: variable.get("value") for variable in container["env"]}


def walk(node: object) -> Iterator[Manifest]:
    if isinstance(node, dict):
        yield node
        for child in node.values():
            yield from walk(child)
    elif isinstance(node, list):
        for child in node:
            yield from walk(child)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_operator_takes_the_rayservice(overlay: str) -> None:
    tool = ROOT.parent / "shared" / "tools" / "validate_kuberay.py"
    if not tool.exists():
        pytest.skip("the strict RayService schema lies beside a checkout of the project, and is not here")
    text = yaml.safe_dump_all(build(overlay))
    done = subprocess.run([sys.executable, str(tool), "-"], input=text, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_ray_serve_takes_the_serve_config(overlay: str) -> None:
    from ray.serve.schema import ServeDeploySchema

    parsed = ServeDeploySchema.model_validate(serve_config(overlay))
    [application] = parsed.applications
    assert (application.name, application.route_prefix) == ("millrace", "/")
    assert application.import_path == "cluster.app:build_app"
    models = {f"model-{model['id']}" for model in application.args["models"]}
    assert {d.name for d in application.deployments} == {"gateway", "semantic-cache"} | models


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_millrace_takes_its_configuration(overlay: str) -> None:
    config = pytest.importorskip("cluster.config").check_config(millrace_config(overlay))
    by_name = {d["name"]: d["ray_actor_options"] for d in deployments(overlay)}
    for model in config.models:
        options = by_name[f"model-{model.id}"]
        assert (model.num_gpus or 0) == options.get("num_gpus", 0)
        if model.engine.num_threads is not None:
            assert model.engine.num_threads == options["num_cpus"]


def test_the_overlays_differ_in_their_models_only() -> None:
    cpu, gpu = serve_config("cpu"), serve_config("gpu")
    for config in (cpu, gpu):
        [application] = config["applications"]
        del application["args"]["models"]
        application["deployments"] = [d for d in application["deployments"] if not d["name"].startswith("model-")]
    assert cpu == gpu


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_each_drain_fits_into_the_next(overlay: str) -> None:
    stream_s = serve_config(overlay)["http_options"]["request_timeout_s"]
    assert stream_s == LONGEST_STREAM_S
    stop_s = millrace_config(overlay)["server"]["drain_timeout_s"]
    assert stop_s >= stream_s + PROXY_MIN_DRAINING_S
    assert not any("graceful_shutdown_timeout_s" in d for d in deployments(overlay)), "one place says it: args.server"
    for name, pod in ray_pods(overlay):
        drain_s = float(env(pod)["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] or 0)
        spec = pod["template"]["spec"]
        [pre_stop, wait_s] = spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert pre_stop == "sleep"
        assert float(env(pod)["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"] or 0) >= stream_s, name
        assert drain_s >= stop_s + 120, f"{name}: no time to load a replacement before replicas are stopped"
        assert spec["terminationGracePeriodSeconds"] >= int(wait_s) + drain_s + 30, name


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_ray_node_starts_in_the_fast_mode(overlay: str) -> None:
    for name, pod in ray_pods(overlay):
        variables = env(pod)
        assert variables["RAY_SERVE_ENABLE_HA_PROXY"] == "1", name
        assert variables["RAY_SERVE_THROUGHPUT_OPTIMIZED"] == "1", name
        assert variables["RAY_USAGE_STATS_ENABLED"] == "0", name


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_control_state_survives_the_head(overlay: str) -> None:
    cluster = only("RayService", overlay)["spec"]["rayClusterConfig"]
    fault_tolerance = cluster["gcsFaultToleranceOptions"]
    assert "externalStorageNamespace" not in fault_tolerance
    assert "secretKeyRef" in fault_tolerance["redisPassword"]["valueFrom"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    service = only("Service", overlay)
    port = service["spec"]["ports"][0]["port"]
    assert fault_tolerance["redisAddress"] == f"{service['metadata']['name']}:{port}"
    # Cache entries expire and may be evicted; Ray's keys have no TTL and must not be.
    assert "maxmemory-policy volatile-lru" in only("ConfigMap", overlay)["data"]["redis.conf"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_whatever_is_referenced_exists_or_is_documented(overlay: str) -> None:
    manifests = build_monitored(overlay)
    existing = {(m["kind"], m["metadata"]["name"]) for m in manifests}
    guide = (ROOT / "docs" / "deploy.md").read_text()
    for kind, name in set(_references(manifests)):
        if (kind, name) in existing:
            continue
        assert name in USER_PROVIDED.get(kind, set()), f"{kind} {name} is referenced and nobody provides it"
        assert name in guide, f"docs/deploy.md does not say how to make the {kind} {name}"


def _references(manifests: tuple[Manifest, ...]) -> Iterator[tuple[str, str]]:
    keys = {"secretKeyRef": "Secret", "configMapKeyRef": "ConfigMap", "credentials": "Secret", "configMap": "ConfigMap"}
    for node in walk(list(manifests)):
        for key, kind in keys.items():
            if isinstance(node.get(key), dict):
                yield kind, node[key]["name"]
        if isinstance(node.get("secret"), dict):
            yield "Secret", node["secret"]["secretName"]
        if isinstance(node.get("persistentVolumeClaim"), dict):
            yield "PersistentVolumeClaim", node["persistentVolumeClaim"]["claimName"]
        if "serviceAccountName" in node:
            yield "ServiceAccount", node["serviceAccountName"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_pod_can_do_more_than_it_must(overlay: str) -> None:
    for template in pod_templates(build(overlay)):
        spec = template["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
        for container in spec["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]
            assert set(container["resources"]["requests"]) >= {"cpu", "memory"}
            assert set(container["resources"]["limits"]) >= {"cpu", "memory"}
            assert ":" in container["image"]
            assert not container["image"].endswith(":latest")
            assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(container)
            mounted = {mount["name"] for mount in container["volumeMounts"]}
            claimed = {volume["name"] for volume in spec["volumes"]}
            assert mounted - {"data"} <= claimed  # `data` is the claim template of Redis


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_secret_is_committed(overlay: str) -> None:
    assert not [m["metadata"]["name"] for m in build_monitored(overlay) if m["kind"] == "Secret"]
    config = millrace_config(overlay)
    assert config["auth"]["keys_file"].startswith("/etc/millrace/keys/")
    # The password comes from every node's environment, for the application may be built on any of them.
    assert config["cache"]["redis_url"].startswith("redis://:${MILLRACE_REDIS_PASSWORD}@")
    assert all("MILLRACE_REDIS_PASSWORD" in env(pod) for _, pod in ray_pods(overlay))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_disruption_leaves_a_worker_and_is_possible(overlay: str) -> None:
    budgets = {
        m["spec"]["selector"]["matchLabels"]["ray.io/group"]: m for m in _of_kind("PodDisruptionBudget", overlay)
    }
    for name, group in ray_pods(overlay):
        if name == "head":
            continue
        spec = budgets[name]["spec"]
        # Pods without a scale subresource: only an integer `minAvailable` is honoured.
        assert "maxUnavailable" not in spec
        assert isinstance(spec["minAvailable"], int)
        assert 1 <= spec["minAvailable"] < group["minReplicas"]
        labels = group["template"]["metadata"]["labels"]
        wanted = {k: v for k, v in spec["selector"]["matchLabels"].items() if k != "ray.io/group"}
        assert wanted.items() <= labels.items()


def _of_kind(kind: str, overlay: str) -> list[Manifest]:
    return [m for m in build(overlay) if m["kind"] == kind]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_replicas_fit_the_workers(overlay: str) -> None:
    capacity = {"cpu": 0.0, "nvidia.com/gpu": 0.0}
    for name, group in ray_pods(overlay):
        if name != "head":
            limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
            for resource in capacity:
                capacity[resource] += group["replicas"] * float(limits.get(resource, 0))
    needed_cpu = sum(d["num_replicas"] * d["ray_actor_options"]["num_cpus"] for d in deployments(overlay))
    needed_gpu = sum(d["num_replicas"] * d["ray_actor_options"].get("num_gpus", 0) for d in deployments(overlay))
    assert needed_cpu <= capacity["cpu"]
    assert needed_gpu == capacity["nvidia.com/gpu"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_only_the_endpoint_is_open_to_clients(overlay: str) -> None:
    policies = {m["metadata"]["name"]: m["spec"] for m in _of_kind("NetworkPolicy", overlay)}
    ray, redis = policies["millrace-ray"], policies["millrace-redis"]
    assert set(ray["policyTypes"]) == set(redis["policyTypes"]) == {"Ingress", "Egress"}
    clients = [rule for rule in ray["ingress"] if "millrace/access" in json.dumps(rule)]
    assert [[port["port"] for port in rule["ports"]] for rule in clients] == [[8000]]
    [operator] = [rule for rule in ray["ingress"] if "kuberay-operator" in json.dumps(rule)]
    assert operator["ports"] == [_tcp(8265), _tcp(8000)]  # the Serve status and the proxy's health: both or never ready
    for rule in ray["ingress"]:  # all ports are open to Ray's own pods alone, which the pod selector names
        if "ports" not in rule:
            assert rule["from"] == [{"podSelector": ray["podSelector"]}]
    assert redis["ingress"] == [{"from": [{"podSelector": ray["podSelector"]}], "ports": [_tcp(6379)]}]
    assert any({"port": 53, "protocol": "UDP"} in rule.get("ports", []) for rule in ray["egress"])


def _tcp(port: int) -> Manifest:
    return {"port": port, "protocol": "TCP"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_everything_lands_in_the_namespace(overlay: str) -> None:
    for manifest in build_monitored(overlay):
        if manifest["kind"] not in CLUSTER_SCOPED:
            assert manifest["metadata"]["namespace"] == "millrace", manifest["metadata"]["name"]


def test_gpu_pods_find_gpu_nodes_and_keep_their_weights() -> None:
    gpu = dict(ray_pods("gpu"))["gpu"]["template"]["spec"]
    [container] = gpu["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == container["resources"]["requests"]["nvidia.com/gpu"]
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in gpu["tolerations"]
    assert "nvidia.com/gpu.product" in gpu["nodeSelector"]
    hub = env({"template": {"spec": gpu}})["HF_HOME"]
    [mount] = [m for m in container["volumeMounts"] if m["mountPath"] == hub]
    [volume] = [v for v in gpu["volumes"] if v["name"] == mount["name"]]
    assert "persistentVolumeClaim" in volume
    [shm] = [v for v in gpu["volumes"] if v["name"] == "shared-mem"]
    assert shm["emptyDir"]["medium"] == "Memory"


@pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed")
def test_redis_starts_with_the_password_and_without_it_refuses(tmp_path: Path) -> None:
    """Runs the container's own command, its paths and port moved below the test's folder."""
    [container] = only("StatefulSet", "cpu")["spec"]["template"]["spec"]["containers"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    conf = only("ConfigMap", "cpu")["data"]["redis.conf"].replace("port 6379", f"port {port}\nbind 127.0.0.1")
    (tmp_path / "redis.conf").write_text(conf.replace("dir /data", f"dir {tmp_path}"))
    (tmp_path / "password").write_text("s3cret")
    script = container["args"][0].replace("/etc/redis/", f"{tmp_path}/").replace("/etc/millrace/redis/", f"{tmp_path}/")
    server = subprocess.Popen([*container["command"], script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        assert _ping(port, "s3cret", wait_s=10) == "PONG"
        assert "PONG" not in _ping(port, None, wait_s=0)
        assert "s3cret" not in Path(f"/proc/{server.pid}/cmdline").read_text()
    finally:
        server.terminate()
        server.wait(10)


def _ping(port: int, password: str | None, wait_s: float) -> str:
    import redis.backoff
    import redis.retry

    never = redis.retry.Retry(redis.backoff.NoBackoff(), retries=0)
    client = redis.Redis(port=port, password=password, socket_timeout=2, retry=never)
    deadline = time.monotonic() + wait_s
    try:
        while True:
            try:
                return "PONG" if client.ping() else "no answer"
            except redis.RedisError as error:
                if time.monotonic() >= deadline:
                    return str(error)
                time.sleep(0.05)
    finally:
        client.close()
