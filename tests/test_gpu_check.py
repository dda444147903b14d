"""`benchmarks/gpu_check.py` in miniature, as a machine with a GPU finds it: with few packages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ABSENT = ("ray", "gguf", "xgrammar", "pydantic", "fastapi", "faiss", "redis", "pytest", "hypothesis")


@pytest.mark.slow
def test_every_part_runs_in_miniature(tmp_path: Path) -> None:
    arguments = ["gpu_check.py", "--dry-run", "--out", str(tmp_path / "out.json")]
    code = (
        f"import runpy, sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); sys.argv = {arguments!r};"
        f"sys.modules |= dict.fromkeys({ABSENT!r});"  # an import of None raises
        f"runpy.run_path({str(ROOT / 'benchmarks/gpu_check.py')!r}, run_name='__main__')"
    )
    # elsewhere than in the repository, which the script has to find by itself
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=110,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads(result.stdout.splitlines()[-1])
    assert report == json.loads((tmp_path / "out.json").read_text())
    assert report["failures"] == {}
    assert all(count > 0 for count in report["kernels"].values())
    assert set(report["miniature: decode"]) == {"batch 1", "batch 3"}
    assert report["miniature: workload"]["tokens_per_s"] > 0
    assert report["miniature: transformers' continuous batching"]["is_complete"]
