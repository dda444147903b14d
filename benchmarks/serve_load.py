"""TTFT, TPOT and throughput through the whole road (HTTP, gateway, cache, Serve, engine) at several concurrencies.

    python benchmarks/serve_load.py                     starts `millrace serve` with the bundled model itself
    python benchmarks/serve_load.py --url http://...    measures what runs there

Ends with one JSON line; every figure is the median of the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
from typing import Any

import aiohttp
from load import closed_loop, http_ask, median_of, served


async def measure(url: str, args: argparse.Namespace) -> dict[str, Any]:
    report: dict[str, Any] = {}
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=900)) as session:
        ask = http_ask(session, url, args.model)
        await closed_loop(ask, 2, 1, args.prompt_tokens, 16, seed=0)
        for concurrency in map(int, args.concurrency.split(",")):
            rounds = [
                await closed_loop(
                    ask, concurrency, args.per_worker, args.prompt_tokens, args.output_tokens, 1000 * concurrency + r
                )
                for r in range(args.rounds)
            ]
            report[f"c{concurrency}"] = median_of(rounds)
            print(f"c={concurrency:<3} {report[f'c{concurrency}']}", file=sys.stderr, flush=True)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--concurrency", default="1,8,32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--per-worker", type=int, default=1, help="requests per concurrent worker and round")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=128)
    args = parser.parse_args()
    with contextlib.nullcontext(args.url) if args.url else served() as url:
        report = asyncio.run(measure(url, args))
    print(json.dumps({"benchmark": "serve_load", **report}))


if __name__ == "__main__":
    main()
