"""Randomised requests with random aborts against a running endpoint: no 5xx, blocks intact when idle, memory flat.

    python benchmarks/chaos.py --url http://127.0.0.1:8000 --model smollm2-135m --requests 2000

Each request is drawn from everything a client may send, nonsense included; about a third is abandoned before, amid or
after its first bytes. Afterwards `/metrics` must report, for every replica, nothing running, every block free and an
intact block table. With `--pid` of the server's process the memory of its whole tree is sampled; the second half of the
run may not grow by more than `--max-growth`. Ends with one JSON line; exits 1 if a promise is broken.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import psutil

NONSENSE: tuple[dict[str, Any], ...] = (
    {"temperature": -1},
    {"max_tokens": 0},
    {"max_tokens": 10**12},
    {"n": 10**6},
    {"top_p": 7},
    {"stop": [""]},
    {"stop": 5},
    {"logit_bias": {"-4": 1}},
    {"logit_bias": {"99999999": 1}},
    {"seed": "x"},
    {"unknown_field": 1},
    {"stop_token_ids": [-1]},
    {"prompt": []},
    {"prompt": "x " * 20_000},
    {"prompt": None},
    {"min_tokens": 10**9},
)


def random_body(rng: random.Random, model: str) -> dict[str, Any]:
    words = ["river", "mill", "stone", "wheel", "東京", "🙂", "race", "water", "grain", "café"]
    body: dict[str, Any] = {"model": model, "prompt": " ".join(rng.choices(words, k=rng.randint(1, 120)))}
    body["max_tokens"] = rng.choice([1, 2, 8, 24, 48])
    body["stream"] = rng.random() < 0.6
    optional: dict[str, Callable[[], object]] = {
        "temperature": lambda: rng.choice([0, 0.3, 1, 2]),
        "top_p": lambda: rng.choice([0.1, 0.9, 1]),
        "top_k": lambda: rng.choice([-1, 1, 40]),
        "min_p": lambda: rng.random() / 2,
        "presence_penalty": lambda: rng.uniform(-2, 2),
        "frequency_penalty": lambda: rng.uniform(-2, 2),
        "repetition_penalty": lambda: rng.uniform(0.5, 2),
        "logit_bias": lambda: {str(rng.randrange(200)): rng.uniform(-100, 100)},
        "logprobs": lambda: rng.randint(0, 5),
        "seed": lambda: rng.getrandbits(40),
        "stop": lambda: rng.choice(["e", ["the", "a "], "\n"]),
        "n": lambda: rng.randint(1, 3),
        "ignore_eos": lambda: True,
        "min_tokens": lambda: 1,
    }
    for name, draw in optional.items():
        if rng.random() < 0.2:
            body[name] = draw()
    if "min_tokens" in body or "n" in body:
        body.pop("logprobs", None)
    if rng.random() < 0.08:
        body |= rng.choice(NONSENSE)
    return body


async def one(client: httpx.AsyncClient, rng: random.Random, model: str, outcomes: Counter[str]) -> None:
    body = random_body(rng, model)
    patience_s = rng.expovariate(4) if rng.random() < 0.33 else None
    try:
        async with asyncio.timeout(patience_s), client.stream("POST", "/v1/completions", json=body) as response:
            outcomes[str(response.status_code)] += 1
            text = (await response.aread()).decode()
        if response.status_code >= 500 or (response.status_code == 200 and has_error(text)):
            outcomes["broken"] += 1
            print(f"{response.status_code}: {text[-300:]} for {json.dumps(body)[:300]}", file=sys.stderr)
    except TimeoutError:
        outcomes["abandoned"] += 1


def has_error(text: str) -> bool:
    """Of a reply with status 200: a whole answer, or the events of a stream."""
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: {")] or [text]
    return any("error" in json.loads(event) for event in events)


async def wait_for_idle(client: httpx.AsyncClient, timeout_s: float = 60) -> tuple[bool, bool]:
    """(nothing runs and every block is free, no block was ever lost), over all replicas, once they fall idle."""
    deadline = time.monotonic() + timeout_s
    while True:
        gauges: dict[str, list[float]] = {}
        for line in (await client.get("/metrics")).text.splitlines():
            name, _, rest = line.partition("{")
            gauges.setdefault(name, []).append(float(rest.rpartition(" ")[2]) if rest else 0.0)
        busy = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
        idle = not any(sum(gauges[name]) for name in busy) and all(gauges["millrace:replicas"])
        if idle or time.monotonic() > deadline:
            return idle, all(gauges["millrace:blocks_intact"])
        await asyncio.sleep(0.5)


async def sample_memory(pid: int | None, samples: list[float]) -> None:
    while pid is not None:
        total = 0
        for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
            try:
                total += process.memory_full_info().uss
            except psutil.Error:
                continue
        samples.append(total / 2**20)
        await asyncio.sleep(1.0)


async def run(args: argparse.Namespace) -> dict[str, Any]:
    rng, outcomes = random.Random(args.seed), Counter[str]()
    memory: list[float] = []
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=args.url, timeout=300, limits=limits) as client:
        sampler = asyncio.create_task(sample_memory(args.pid, memory))
        todo = iter(range(args.requests))

        async def worker() -> None:
            for _ in todo:
                await one(client, rng, args.model, outcomes)

        started = time.perf_counter()
        await asyncio.gather(*[worker() for _ in range(args.concurrency)])
        elapsed_s = time.perf_counter() - started
        idle, intact = await wait_for_idle(client)
        sampler.cancel()
    # The first half warms allocators and caches; growth is the last quarter against the third.
    half, quarter = len(memory) // 2, len(memory) // 4
    growth = float(np.median(memory[-quarter:]) / np.median(memory[half:-quarter]) - 1) if quarter >= 4 else 0.0
    return {
        "requests": args.requests,
        "seconds": round(elapsed_s, 1),
        "outcomes": dict(outcomes),
        "server_errors": outcomes["broken"],
        "idle_with_all_blocks_free": idle,
        "blocks_intact": intact,
        "memory_growth": round(growth, 4),
        "memory_mib": [round(m) for m in memory[:: max(1, len(memory) // 12)]],
        "ok": outcomes["broken"] == 0 and idle and intact and growth <= args.max_growth,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pid", type=int, help="the process of `millrace serve`, for the memory figure")
    parser.add_argument("--max-growth", type=float, default=0.02)
    report = asyncio.run(run(parser.parse_args()))
    print(json.dumps(report))
    sys.exit(not report["ok"])


if __name__ == "__main__":
    main()
