"""A short run of `benchmarks/chaos.py`; the full 2,000 requests stand in docs/benchmarks.md."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import Server

pytestmark = pytest.mark.e2e

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "chaos.py"


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("model", "requests"), [("tiny", 300), ("smollm2-135m", 60)])
def test_random_requests_and_aborts_break_nothing(server: Server, model: str, requests: int) -> None:
    command = [sys.executable, str(SCRIPT), "--url", server.url, "--model", model, "--requests", str(requests)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=230)
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["ok"], (report, result.stderr[-2000:])
    assert report["outcomes"]["abandoned"] > requests / 20
    assert report["outcomes"]["200"] > requests / 3
