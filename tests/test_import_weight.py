"""What must stay light: gateways and head pods load no torch."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["router.server", "cache.server", "cluster.app", "cluster.cli", "replicas.types"])
def test_importing_loads_no_torch(module: str) -> None:
    heavy = "{'torch', 'transformers', 'faiss'}"
    code = f"import sys, {module}; found = {heavy} & set(sys.modules); assert not found, found"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


def test_the_engine_runs_without_ray_and_friends() -> None:
    code = (
        "import sys, replicas.engine.async_engine, replicas.engine.worker, replicas.engine.models.loader;"
        "found = {'ray', 'fastapi', 'pydantic', 'faiss', 'redis'} & set(sys.modules); assert not found, found"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
