"""What this process may use of its machine: cores and memory, after the limits of a container.

Linux control groups (versions 1 and 2) and /proc; elsewhere the machine's own figures. Reads files, no environment.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")


def usable_cores(cgroup: Path = _CGROUP) -> int:
    """Cores of the affinity mask, or fewer where a quota of processor time is smaller; at least 1."""
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    quota = _cpu_quota(cgroup)
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def available_memory_bytes(cgroup: Path = _CGROUP, meminfo: Path = _MEMINFO) -> int:
    """Bytes that can still be taken before the machine swaps or the container is killed."""
    host = _host_available(meminfo)
    limited = _cgroup_available(cgroup)
    return host if limited is None else min(host, limited)


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
