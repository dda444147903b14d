"""What this process may use of its machine, cores and memory, after the limits of a container; and how it asks the
kernel for huge pages.

Linux control groups (versions 1 and 2), /proc and /sys; elsewhere the machine's own figures. Reads no environment.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import re
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")
_TOPOLOGY = Path("/sys/devices/system/cpu")


def usable_cores(cgroup: Path = _CGROUP) -> int:
    """Cores of the affinity mask, or fewer where a quota of processor time is smaller; at least 1."""
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    quota = _cpu_quota(cgroup)
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def processors(topology: Path = _TOPOLOGY) -> list[int]:
    """Numbers of the processors in the affinity mask, those of one core side by side; empty where nobody tells."""
    if not hasattr(os, "sched_getaffinity"):
        return []

    def core_of(processor: int) -> int:
        siblings = _read(topology / f"cpu{processor}" / "topology" / "thread_siblings_list") or ""
        first = re.match(r"\d+", siblings)
        return int(first[0]) if first else processor

    return sorted(os.sched_getaffinity(0), key=lambda processor: (core_of(processor), processor))


def available_memory_bytes(cgroup: Path = _CGROUP, meminfo: Path = _MEMINFO) -> int:
    """Bytes that can still be taken before the machine swaps or the container is killed."""
    host = _host_available(meminfo)
    limited = _cgroup_available(cgroup)
    return host if limited is None else min(host, limited)


def advise_huge_pages(address: int, num_bytes: int) -> None:
    """Asks for huge pages behind memory that is not written yet, its first and last pages perhaps left out. A wish:
    where they are not to be had, nothing changes."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    begin = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (address + num_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if begin < end:
        libc = ctypes.CDLL(None)
        libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), ctypes.c_int(mmap.MADV_HUGEPAGE))


def _cpu_quota(cgroup: Path) -> float | None:
    words = (_read(cgroup / "cpu.max") or "").split()
    if len(words) != 2:
        words = [_read(cgroup / "cpu" / f"cpu.cfs_{name}_us") or "" for name in ("quota", "period")]
    quota, period = words
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else None


def _host_available(meminfo: Path) -> int:
    for line in (_read(meminfo) or "").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cgroup_available(cgroup: Path) -> int | None:
    """Limit less use; file pages that the kernel can drop at once do not count as used."""
    for limit_file, usage_file, stat_file, reclaimable in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    ):
        limit, usage = _read(cgroup / limit_file), _read(cgroup / usage_file)
        if limit is None or usage is None or not limit.isdigit():
            continue
        stat = dict(line.split() for line in (_read(cgroup / stat_file) or "").splitlines())
        return max(0, int(limit) - int(usage) + int(stat.get(reclaimable, 0)))
    return None


def _read(file: Path) -> str | None:
    try:
        return file.read_text().strip()
    except OSError:
        return None
