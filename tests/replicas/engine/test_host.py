"""Limits of a container are seen, in both versions of control groups."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from replicas.engine.host import available_memory_bytes, usable_cores

GIB = 1 << 30


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content + "\n")
    return folder


def meminfo(folder: Path, available_gib: int) -> Path:
    file = folder / "meminfo"
    file.write_text(f"MemTotal: 99 kB\nMemAvailable: {available_gib * 1024 * 1024} kB\n")
    return file


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu.max": "250000 100000"}, 3),
        ({"cpu.max": "10000 100000"}, 1),
        ({"cpu.max": "1600000 100000"}, 8),
        ({"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
    ],
)
def test_a_quota_limits_the_cores(
    files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert usable_cores(write(tmp_path, files)) == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 6 * GIB),
        ({"memory.max": "max", "memory.current": "5"}, 6 * GIB),
        ({"memory.max": str(4 * GIB), "memory.current": str(3 * GIB)}, GIB),
        (
            {
                "memory.max": str(4 * GIB),
                "memory.current": str(3 * GIB),
                "memory.stat": f"anon 1\ninactive_file {GIB}",
            },
            2 * GIB,
        ),
        ({"memory.max": str(2 * GIB), "memory.current": str(3 * GIB)}, 0),
        ({"memory/memory.limit_in_bytes": str(3 * GIB), "memory/memory.usage_in_bytes": str(GIB)}, 2 * GIB),
        ({"memory/memory.limit_in_bytes": str(1 << 63), "memory/memory.usage_in_bytes": "0"}, 6 * GIB),
    ],
)
def test_the_tighter_of_host_and_container_counts(files: dict[str, str], expected: int, tmp_path: Path) -> None:
    (tmp_path / "cgroup").mkdir()
    assert available_memory_bytes(write(tmp_path / "cgroup", files), meminfo(tmp_path, 6)) == expected


def test_this_machine_has_cores_and_memory() -> None:
    assert usable_cores() >= 1
    assert available_memory_bytes() > 0
