"""Limits of a container are seen, in both versions of control groups."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import pytest

from replicas.engine.host import advise_huge_pages, available_memory_bytes, processors, usable_cores

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


@pytest.mark.parametrize(
    ("siblings", "expected"),
    [
        ({}, [0, 1, 2, 3]),
        ({0: "0,2", 2: "0,2", 1: "1,3", 3: "1,3"}, [0, 2, 1, 3]),
        ({0: "0-1", 1: "0-1", 2: "2-3", 3: "2-3"}, [0, 1, 2, 3]),
        ({0: "0,2", 1: "nonsense", 2: "0,2"}, [0, 2, 1, 3]),
    ],
)
def test_processors_of_a_core_stand_side_by_side(
    siblings: dict[int, str], expected: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {3, 1, 2, 0})
    for processor, text in siblings.items():
        write(tmp_path, {f"cpu{processor}/topology/thread_siblings_list": f"{text}\n"})
    assert processors(tmp_path) == expected


def test_huge_pages_are_asked_for_within_the_memory_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    class Libc:
        def madvise(self, begin: ctypes.c_void_p, length: ctypes.c_size_t, _: ctypes.c_int) -> None:
            asked.append((begin.value or 0, length.value))

    monkeypatch.setattr("ctypes.CDLL", lambda _: Libc())
    page = mmap.PAGESIZE
    advise_huge_pages(10 * page + 1, 3 * page)
    advise_huge_pages(10 * page + 1, page)
    assert asked == [(11 * page, 2 * page)]


def test_this_machine_has_cores_and_memory() -> None:
    assert usable_cores() >= 1
    assert available_memory_bytes() > 0
