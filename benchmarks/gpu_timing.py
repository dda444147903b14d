"""Time on a device and its two ceilings, measured: bytes copied and matrix products, per second."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_s(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Of single runs, each waited for; two more before them warm up."""
    times = []
    for _ in range(repeats + 2):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def mean_s(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Of runs that follow one another without waiting: the device's time where the host is faster."""
    run()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def copy_bytes_per_s(device: torch.device, num_bytes: int) -> float:
    """Bytes read plus bytes written, of a copy many times the caches' size."""
    source = torch.randint(256, (num_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / mean_s(lambda: target.copy_(source), device, 10)


def matmul_flops_per_s(device: torch.device, size: int) -> float:
    """Of bf16 products of random values: zeros are faster than life."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / mean_s(lambda: a @ b, device, 10)
