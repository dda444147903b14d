"""Everything that only a GPU can tell, in one command of under 8 minutes:

    python3 benchmarks/gpu_check.py --out gpu_check.json

Checks every Triton kernel against its oracle and greedy answers against transformers', measures decode steps and
prefill against what the device can do, and the throughput of 256 requests beside transformers' continuous batching.
Needs torch, triton, transformers, numpy and this repository. Writes one JSON file, after every part, and prints it as
one line; a part that fails is named under `failures`, and the others go on. `--dry-run`: the same in miniature on a
CPU, with Triton's interpreter.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import random
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch

if TYPE_CHECKING:
    from gpu_models import Rig

    from replicas.engine.models.transformer import TransformerConfig


@dataclass(frozen=True)
class Sizes:
    """How much of everything; `context` is the length of each request in a decode step."""

    kernels_s: float
    copy_bytes: int
    matmul_size: int
    batch_sizes: tuple[int, ...]
    context: int
    prompt_len: int
    num_prompts: int
    repeats: int
    num_requests: int
    low: int
    high: int
    tokens_per_step: int
    deadline_s: float


FULL = Sizes(60, 1 << 32, 8192, (1, 8, 64, 256), 512, 2048, 4, 20, 256, 100, 1024, 8192, 460)
DRY = Sizes(3, 1 << 20, 64, (1, 3), 40, 9, 2, 1, 3, 2, 5, 16, 600)


class Report:
    """Collects parts; owner of the file."""

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        self._path = path
        self._start = time.perf_counter()
        self.values: dict[str, Any] = head | {"failures": {}, "part_s": {}}

    @property
    def elapsed_s(self) -> float:
        return time.perf_counter() - self._start

    def part(self, name: str, run: Callable[[], Any]) -> Any:
        """What `run` returns, None if it fails. The memory of earlier parts is free for it."""
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        start = time.perf_counter()
        try:
            self.values[name] = run()
            outcome = json.dumps(self.values[name])
        except Exception:
            self.values["failures"][name] = outcome = traceback.format_exc()[-3000:]
        self.values["part_s"][name] = time.perf_counter() - start
        self._path.write_text(json.dumps(self.values, indent=1) + "\n")
        print(f"[{self.elapsed_s:5.0f} s] {name}: {outcome}", file=sys.stderr, flush=True)
        return self.values.get(name)


def measure_ceilings(device: torch.device, sizes: Sizes) -> dict[str, float]:
    from gpu_timing import copy_bytes_per_s, matmul_flops_per_s

    return {
        "copy_bytes_per_s": copy_bytes_per_s(device, sizes.copy_bytes),
        "matmul_flops_per_s": matmul_flops_per_s(device, sizes.matmul_size),
    }


def check_kernels(device: torch.device, sizes: Sizes) -> dict[str, int]:
    """Cases of each check that passed in the time there is, a different one on every turn."""
    from kernel_cases import CHECKS

    is_large, counts, failures = device.type == "cuda", dict.fromkeys((c.__name__ for c in CHECKS), 0), []
    stop = time.perf_counter() + sizes.kernels_s
    seed = 0
    while seed == 0 or time.perf_counter() < stop:
        for check in CHECKS:
            torch.manual_seed(seed)
            try:
                check(random.Random(seed), device, is_large and seed % 2 == 0)
                counts[check.__name__] += 1
            except Exception as error:
                failures.append(f"{check.__name__}({seed}): {error}")
        seed += 1
    if failures:
        raise AssertionError(f"{len(failures)} of {seed * len(CHECKS)} cases failed\n" + "\n".join(failures[:10]))
    return counts


def check_parity(device: torch.device, is_dry: bool) -> dict[str, float]:
    import gpu_parity

    return gpu_parity.check_parity(device, is_dry)


def measure_decode(rig: Rig, sizes: Sizes, copy_rate: float) -> dict[str, Any]:
    """A greedy step with the host's work and its wait, the same without them, and the least it could take: every
    weight and every cached key and value read once."""
    from gpu_models import BLOCK_SIZE, block_bytes, head_parameters, linear_parameters, make_batch
    from gpu_timing import mean_s, median_s

    config, device = rig.config, rig.device
    itemsize = getattr(torch, config.dtype).itemsize
    weight_bytes = (linear_parameters(config) + head_parameters(config)) * itemsize
    token_bytes = block_bytes(config) // BLOCK_SIZE
    figures = {}
    for size in sizes.batch_sizes:
        batch = make_batch(1, sizes.context, size, config.vocab_size, temperature=0.0)
        drawn = make_batch(1, sizes.context, size, config.vocab_size, temperature=1.0)
        floor_s = (weight_bytes + size * sizes.context * token_bytes) / copy_rate
        step_s = median_s(lambda: rig.execute(batch), device, sizes.repeats)  # noqa: B023
        device_s = mean_s(lambda: rig.forward(batch), device, sizes.repeats)  # noqa: B023
        figures[f"batch {size}"] = {
            "step_ms": step_s * 1e3,
            "drawn_step_ms": median_s(lambda: rig.execute(drawn), device, sizes.repeats) * 1e3,  # noqa: B023
            "forward_ms": device_s * 1e3,
            "floor_ms": floor_s * 1e3,
            "share_of_copy_rate": floor_s / step_s,
            "forward_share_of_copy_rate": floor_s / device_s,
            "tokens_per_s": size / step_s,
        }
    return figures


def measure_prefill(rig: Rig, sizes: Sizes, matmul_rate: float) -> dict[str, Any]:
    from gpu_models import head_parameters, linear_parameters, make_batch
    from gpu_timing import median_s

    config, prompt_len, count = rig.config, sizes.prompt_len, sizes.num_prompts
    batch = make_batch(prompt_len, prompt_len, count, config.vocab_size, temperature=0.0)
    step_s = median_s(lambda: rig.execute(batch), rig.device, sizes.repeats)
    num_tokens = prompt_len * count
    linear = 2 * linear_parameters(config) * num_tokens + 2 * head_parameters(config) * count
    # scores and values: two products over the causal half
    attention = 2 * config.num_layers * config.num_heads * config.head_dim * prompt_len**2 * count
    rate = (linear + attention) / step_s
    return {
        "prompts": f"{count} x {prompt_len}",
        "step_ms": step_s * 1e3,
        "tokens_per_s": num_tokens / step_s,
        "tflops_per_s": rate / 1e12,
        "share_of_matmul_rate": rate / matmul_rate,
    }


def measure_workload(rig: Rig, sizes: Sizes) -> dict[str, Any]:
    """All requests at once through the engine, after short ones that meet every batch size once."""
    from gpu_models import generate, make_engine, uniform_workload
    from gpu_timing import synchronize

    engine, vocab_size = make_engine(rig, sizes.tokens_per_step), rig.config.vocab_size
    start = time.perf_counter()
    generate(engine, uniform_workload(sizes.num_requests, 1, min(128, sizes.high), vocab_size, seed=1))
    warm_up_s = time.perf_counter() - start
    workload = uniform_workload(sizes.num_requests, sizes.low, sizes.high, vocab_size, seed=0)
    synchronize(rig.device)
    start = time.perf_counter()
    outputs = generate(engine, workload)
    seconds = time.perf_counter() - start
    assert [len(tokens) for tokens in outputs] == [max_tokens for _, max_tokens in workload]
    num_tokens = sum(map(len, outputs))
    return {
        "requests": sizes.num_requests,
        "prompt_tokens": sum(len(prompt) for prompt, _ in workload),
        "output_tokens": num_tokens,
        "seconds": seconds,
        "tokens_per_s": num_tokens / seconds,
        "preemptions": engine.stats().counters.num_preemptions,
        "warm_up_s": warm_up_s,
    }


def num_blocks_for(config: TransformerConfig, sizes: Sizes, device: torch.device) -> int:
    """Enough for every measurement, or what the device has left."""
    from gpu_models import BLOCK_SIZE, block_bytes

    per_request = -(-max(2 * sizes.high, sizes.context, sizes.prompt_len) // BLOCK_SIZE)
    wanted = per_request * max(*sizes.batch_sizes, sizes.num_requests)
    if device.type != "cuda":
        return wanted
    free, _ = torch.cuda.mem_get_info(device)
    return min(wanted, int(free * 0.85) // block_bytes(config))


def measure_shape(
    report: Report, name: str, config: TransformerConfig, sizes: Sizes, device: torch.device, ceilings: dict[str, float]
) -> None:
    from gpu_models import Rig, random_model

    rigs: list[Rig] = []

    def build() -> int:
        model = random_model(config, device)
        num_blocks = num_blocks_for(config, sizes, device)
        rigs.append(Rig(model, num_blocks, device))
        return num_blocks

    if report.part(f"{name}: KV blocks", build) is None:
        return
    (rig,) = rigs
    copy_rate, matmul_rate = ceilings["copy_bytes_per_s"], ceilings["matmul_flops_per_s"]
    report.part(f"{name}: decode", lambda: measure_decode(rig, sizes, copy_rate))
    report.part(f"{name}: prefill", lambda: measure_prefill(rig, sizes, matmul_rate))
    report.part(f"{name}: workload", lambda: measure_workload(rig, sizes))


def measure_peer(
    report: Report, name: str, config: TransformerConfig, sizes: Sizes, device: torch.device, share: float
) -> None:
    """In `share` of the time that is left."""
    from gpu_models import uniform_workload

    def run() -> dict[str, Any]:
        from gpu_peer import build_peer, run_peer

        stop_at = time.perf_counter() + (sizes.deadline_s - report.elapsed_s) * share
        workload = uniform_workload(sizes.num_requests, sizes.low, sizes.high, config.vocab_size, seed=0)
        figures = run_peer(build_peer(config, device), workload, stop_at)
        if ours := report.values.get(f"{name}: workload"):
            figures["we_are_faster_at_least"] = ours["tokens_per_s"] / figures["tokens_per_s_at_most"]
        return figures

    report.part(f"{name}: transformers' continuous batching", run)


def describe(device: torch.device) -> dict[str, Any]:
    return {
        "benchmark": "gpu_check",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu, interpreted",
        "cuda": torch.version.cuda,
        "versions": {name: metadata.version(name) for name in ("torch", "triton", "transformers", "numpy")},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"))
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    if not (args.dry_run or torch.cuda.is_available()):
        parser.error("there is no CUDA device here; --dry-run runs in miniature without one")
    logging.basicConfig(level=logging.WARNING)
    from gpu_models import LLAMA_31_8B, MINIATURE, QWEN3_06B

    device = torch.device("cpu" if args.dry_run else "cuda:0")
    sizes = DRY if args.dry_run else FULL
    shapes = {"Qwen3-0.6B's shape without q and k norms": QWEN3_06B, "Llama-3.1-8B's shape": LLAMA_31_8B}
    if args.dry_run:
        shapes = {"miniature": replace(MINIATURE)}

    report = Report(args.out, describe(device))
    ceilings = report.part("ceilings", lambda: measure_ceilings(device, sizes))
    if ceilings is None:
        return 1
    report.part("kernels", lambda: check_kernels(device, sizes))
    report.part("greedy parity", lambda: check_parity(device, args.dry_run))
    for name, config in shapes.items():
        measure_shape(report, name, config, sizes, device, ceilings)
    for i, (name, config) in enumerate(shapes.items()):
        measure_peer(report, name, config, sizes, device, share=1 / (len(shapes) - i) * 0.9)
    print(json.dumps(report.values))
    return 1 if report.values["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
