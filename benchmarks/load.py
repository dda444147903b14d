"""A streaming load on an OpenAI-compatible endpoint, and what it measures. Shared by the benchmarks beside it.

Each request has a prompt that shares no prefix with any other, temperature 0 and `ignore_eos`, so that every answer has
exactly the tokens asked for and nothing is answered from a cache.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass

import aiohttp
import numpy as np

WORDS = (
    "river",
    "mill",
    "stone",
    "wheel",
    "water",
    "grain",
    "race",
    "weir",
    "flour",
    "paddle",
    "stream",
    "gear",
    "lamp",
)


@dataclass(frozen=True, slots=True)
class Timing:
    """Of one answer, in seconds from the moment it was asked for."""

    ttft_s: float
    e2e_s: float
    num_tokens: int

    @property
    def tpot_s(self) -> float:
        return (self.e2e_s - self.ttft_s) / max(1, self.num_tokens - 1)


Ask = Callable[[str, int], Awaitable[Timing]]
"""(prompt, number of tokens) -> the timing of one answer."""


def random_prompt(rng: random.Random, num_tokens: int) -> str:
    return f"{rng.randrange(10**9)} " + " ".join(rng.choice(WORDS) for _ in range(max(1, num_tokens - 6)))


async def closed_loop(
    ask: Ask, concurrency: int, per_worker: int, prompt_tokens: int, output_tokens: int, seed: int
) -> dict[str, float]:
    """`concurrency` workers ask one question after the other; throughput in tokens/s, latencies in ms."""
    rng = random.Random(seed)
    timings: list[Timing] = []

    async def worker() -> None:
        for prompt in [random_prompt(rng, prompt_tokens) for _ in range(per_worker)]:
            timing = await ask(prompt, output_tokens)
            timings.append(timing)

    started = time.perf_counter()
    await asyncio.gather(*[worker() for _ in range(concurrency)])
    elapsed_s = time.perf_counter() - started
    return summary(timings, elapsed_s)


def summary(timings: Sequence[Timing], elapsed_s: float) -> dict[str, float]:
    def ms(values: Sequence[float], q: float) -> float:
        return round(float(np.percentile(values, q)) * 1e3, 2)

    ttft, tpot = [t.ttft_s for t in timings], [t.tpot_s for t in timings]
    return {
        "tok_s": round(sum(t.num_tokens for t in timings) / elapsed_s, 1),
        "ttft_p50_ms": ms(ttft, 50),
        "ttft_p99_ms": ms(ttft, 99),
        "tpot_p50_ms": ms(tpot, 50),
        "tpot_p99_ms": ms(tpot, 99),
    }


def median_of(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: round(float(np.median([r[name] for r in rounds])), 2) for name in rounds[0]}


def http_ask(session: aiohttp.ClientSession, url: str, model: str) -> Ask:
    async def ask(prompt: str, num_tokens: int) -> Timing:
        body = {"model": model, "prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        started = time.perf_counter()
        first = last = 0.0
        counted = 0
        async with session.post(f"{url}/v1/completions", json=body) as response:
            if response.status != 200:
                raise RuntimeError(f"{response.status}: {(await response.text())[:300]}")
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(str(event["error"]))
                if event["choices"]:
                    last = time.perf_counter()
                    first = first or last
                if event.get("usage"):
                    counted = event["usage"]["completion_tokens"]
        return Timing(first - started, last - started, counted)

    return ask


@contextlib.contextmanager
def served(*arguments: str) -> Iterator[str]:
    """The URL of a `millrace serve` of one's own, stopped on the way out."""
    port, dashboard_port = _free_port(), _free_port()
    command = [sys.executable, "-m", "cluster", "serve", *arguments]
    command += ["--port", str(port), "--dashboard-port", str(dashboard_port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if "Ctrl-C stops everything" in line:
                break
        else:
            raise RuntimeError("millrace serve did not start; its own words are above")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port
