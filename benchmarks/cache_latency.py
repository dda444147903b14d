"""How fast a repeated question is answered over HTTP: exactly repeated, and in other words, against the model itself.

    python benchmarks/cache_latency.py [--url http://...]

Asks `--questions` different questions once (misses), then each again (exact hits), then each with a small change of
wording (semantic hits). Ends with one JSON line: p50 and p99 in ms of each kind, and the share of the repetitions that
were hits of the kind they should be.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
import uuid

import httpx
import numpy as np
from load import served

SUBJECTS = (
    *("river", "mountain", "volcano", "desert", "glacier", "island", "forest", "planet", "comet", "engine", "bridge"),
    *("castle", "violin", "compass", "telescope", "battery", "whale", "falcon", "orchid", "mushroom", "diamond"),
)


def ask(client: httpx.Client, model: str, question: str) -> tuple[float, str]:
    body = {"model": model, "temperature": 0, "max_tokens": 64, "stop": [".", "\n", ","]}
    started = time.perf_counter()
    answer = client.post("/v1/chat/completions", json={**body, "messages": [{"role": "user", "content": question}]})
    elapsed_s = time.perf_counter() - started
    answer.raise_for_status()
    return elapsed_s * 1e3, answer.headers["x-millrace-cache"]


def figures(results: list[tuple[float, str]], kind: str) -> dict[str, float]:
    latencies = [ms for ms, outcome in results if outcome == kind]
    if not latencies:
        return {"share": 0.0}
    p50, p99 = np.percentile(latencies, [50, 99])
    return {"p50_ms": round(p50, 2), "p99_ms": round(p99, 2), "share": round(len(latencies) / len(results), 3)}


def measure(url: str, model: str, num_questions: int) -> dict[str, object]:
    run = uuid.uuid4().hex[:8]
    names = [f"{SUBJECTS[i % len(SUBJECTS)]} {run}{i}" for i in range(num_questions)]
    with httpx.Client(base_url=url, timeout=120) as client:
        misses = [ask(client, model, f"What can you tell me about the {name}?") for name in names]
        exact = [ask(client, model, f"What can you tell me about the {name}?") for name in names]
        semantic = [ask(client, model, f"what can you tell me about the {name}") for name in names]
    return {
        "miss": figures(misses, "miss"),
        "exact": figures(exact, "hit-exact"),
        "semantic": figures(semantic, "hit-semantic"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--questions", type=int, default=60)
    args = parser.parse_args()
    with contextlib.nullcontext(args.url) if args.url else served() as url:
        report = measure(url, args.model, args.questions)
    print(json.dumps({"benchmark": "cache_latency", **report}))


if __name__ == "__main__":
    main()
