"""Parts the tests of the cache share: a deterministic embedder, a clock to turn, a real Redis server to kill."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import socket
import subprocess
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt


class WordEmbedder:
    """Bag of hashed words: texts that share words are near, and every run gives the same vectors."""

    name = "words"
    dim = 64

    def __init__(self, max_words: int = 64) -> None:
        """Each word is a token."""
        self.max_tokens = max_words
        self.batches: list[list[str]] = []
        self.fails = False
        self.delay_s = 0.0

    def embed(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.float32], list[int], list[bool]]:
        if self.fails:
            raise RuntimeError("out of order")
        time.sleep(self.delay_s)
        self.batches.append(list(texts))
        counts = self.count_tokens(texts)
        vectors = np.stack([self._vector(text) for text in texts])
        return vectors, [min(n, self.max_tokens) for n in counts], [n > self.max_tokens for n in counts]

    @property
    def num_texts(self) -> int:
        return sum(map(len, self.batches))

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return [len(text.split()) for text in texts]

    def _vector(self, text: str) -> npt.NDArray[np.float32]:
        total = np.zeros(self.dim, np.float32)
        for word in text.lower().split()[: self.max_tokens]:
            seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big")
            total += np.random.default_rng(seed).standard_normal(self.dim).astype(np.float32)
        return np.asarray(total / np.linalg.norm(total), np.float32)


class Clock:
    def __init__(self, now_s: float = 1_000_000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


class RedisServer:
    """A redis-server process of our own, on a free port, with nothing on disk."""

    def __init__(self, binary: str, folder: Path) -> None:
        self._binary = binary
        self._folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [self._binary, "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        self._process = subprocess.Popen(
            [*command, "--dir", str(self._folder)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline_s = time.monotonic() + 10
        while time.monotonic() < deadline_s:
            try:
                with socket.create_connection(("127.0.0.1", self.port), timeout=0.2) as connection:
                    connection.sendall(b"PING\r\n")
                    if connection.recv(16).startswith(b"+PONG"):
                        return
            except OSError:
                time.sleep(0.02)
        raise RuntimeError("redis-server did not answer within 10 s")

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


async def eventually(holds: Callable[[], bool | Awaitable[bool]], timeout_s: float = 10.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    for _ in itertools.count():
        result = holds()
        if result if isinstance(result, bool) else await result:
            return
        assert time.monotonic() < deadline_s, "it never came to hold"
        await asyncio.sleep(0.01)
