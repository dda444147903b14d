"""What gateway, cache and Serve add over the bare engine: the same load on both, in turn, in one run.

The engine runs in this process, the whole road in a `millrace serve` of its own; while one is measured the other
sleeps. The cache is off on both sides. Ends with one JSON line: per concurrency both sides' medians, the difference of
TTFT in ms (p50 and p99) and the ratios of TPOT and throughput, whole road over bare engine.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import sys
import time
from typing import Any

import aiohttp
from load import Ask, Timing, closed_loop, http_ask, median_of, served

from cluster.local import prepare_environment
from replicas.engine.async_engine import AsyncEngine
from replicas.engine.config import EngineConfig, ModelConfig
from replicas.engine.sampling_params import SamplingParams
from replicas.types import GenerateRequest, TextPrompt

MODEL = "smollm2-135m"


def engine_ask(engine: AsyncEngine) -> Ask:
    ids = itertools.count()

    async def ask(prompt: str, num_tokens: int) -> Timing:
        sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
        request = GenerateRequest(f"bench-{next(ids)}", MODEL, TextPrompt(prompt), sampling)
        started = time.perf_counter()
        first = last = 0.0
        counted = 0
        async for chunk in engine.generate(request):
            last = time.perf_counter()
            first = first or last
            counted += len(chunk.token_ids)
        return Timing(first - started, last - started, counted)

    return ask


async def measure(url: str, args: argparse.Namespace) -> dict[str, Any]:
    engine = AsyncEngine.from_config(EngineConfig(ModelConfig(f"bundled:{MODEL}")), MODEL)
    await engine.start()
    report: dict[str, Any] = {}
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=900)) as session:
        sides = {"engine": engine_ask(engine), "road": http_ask(session, url, MODEL)}
        for ask in sides.values():
            await closed_loop(ask, 2, 1, args.prompt_tokens, 16, seed=0)
        for concurrency in map(int, args.concurrency.split(",")):
            per_worker = max(args.per_worker, args.min_requests // concurrency)
            rounds: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
            for r in range(args.rounds):
                for i, (name, ask) in enumerate(sides.items()):
                    seed = 1000 * concurrency + 10 * r + i
                    figures = await closed_loop(
                        ask, concurrency, per_worker, args.prompt_tokens, args.output_tokens, seed
                    )
                    rounds[name].append(figures)
            report[f"c{concurrency}"] = compare(median_of(rounds["engine"]), median_of(rounds["road"]))
            print(f"c={concurrency:<3} {report[f'c{concurrency}']}", file=sys.stderr, flush=True)
    await engine.shutdown()
    return report


def compare(engine: dict[str, float], road: dict[str, float]) -> dict[str, Any]:
    return {
        "engine": engine,
        "road": road,
        "added_ttft_p50_ms": round(road["ttft_p50_ms"] - engine["ttft_p50_ms"], 2),
        "added_ttft_p99_ms": round(road["ttft_p99_ms"] - engine["ttft_p99_ms"], 2),
        "tpot_p50_ratio": round(road["tpot_p50_ms"] / engine["tpot_p50_ms"], 3),
        "tpot_p99_ratio": round(road["tpot_p99_ms"] / engine["tpot_p99_ms"], 3),
        "throughput_ratio": round(road["tok_s"] / engine["tok_s"], 3),
    }


def with_server_environment() -> None:
    """Both sides get the thread settings of `millrace serve`; OpenMP reads them when a process starts."""
    if "GOMP_SPINCOUNT" not in os.environ:
        prepare_environment()
        os.execv(sys.executable, [sys.executable, *sys.argv])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrency", default="1,8,32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--per-worker", type=int, default=1)
    parser.add_argument("--min-requests", type=int, default=8, help="per round, so that c = 1 has more than one")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    args = parser.parse_args()
    with_server_environment()
    with served("--no-cache") as url:
        report = asyncio.run(measure(url, args))
    print(json.dumps({"benchmark": "overhead", **report}))


if __name__ == "__main__":
    main()
