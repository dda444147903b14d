"""Both stores keep what they are told, byte for byte; each fails in its own way, and soon."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from cache.store import Change, Entry, RedisStore, SqliteStore, Store, StoreError, StoreUnavailable
from cache.types import CachedAnswer
from tests.cache.cache_fakes import RedisServer


def entry(
    key: str, version: str = "v1", ttl_s: float = 1000.0, used: float = 0.0, text: str | None = "a question"
) -> Entry:
    now_s = time.time()
    answer = CachedAnswer(f"answer to {key} \ud800 é", "model", 3, 4, 0.25, stop_reason="END")
    vector = None if text is None else np.arange(8, dtype=np.float32) / np.float32(7)
    embedder = None if text is None else "words"
    return Entry(key, version, "partition", text, answer, embedder, vector, now_s, now_s + ttl_s, used)


def assert_same(a: Entry | None, b: Entry) -> None:
    assert a is not None
    for name in ("key", "version", "partition", "text", "answer", "embedder", "created_at", "expires_at", "size_bytes"):
        assert getattr(a, name) == getattr(b, name), name
    assert (a.embedding is None) == (b.embedding is None)
    if a.embedding is not None and b.embedding is not None:
        assert a.embedding.tobytes() == b.embedding.tobytes()


@contextlib.asynccontextmanager
async def opened(store: Store) -> AsyncIterator[Store]:
    await store.start()
    try:
        yield store
    finally:
        await store.close()


async def check_store(store: Store) -> None:
    first, second = entry("a", used=2.0), entry("b", used=1.0, text=None)
    await store.put(first)
    await store.put(second)
    assert_same(await store.get("a"), first)
    assert_same(await store.get("b"), second)
    assert await store.get("c") is None
    assert [kept.key for kept in await store.load(time.time())] == ["b", "a"]
    await store.touch({"b": 3.0, "unknown": 4.0})
    assert [(kept.key, kept.last_used) for kept in await store.load(time.time())] == [("a", 2.0), ("b", 3.0)]

    newer = entry("a", "v2")
    await store.put(newer)
    await store.delete({"a": "v1", "b": "v1", "never": "v1"})
    assert_same(await store.get("a"), newer)  # the deletion meant the older writing
    assert await store.get("b") is None
    assert [kept.key for kept in await store.load(time.time())] == ["a"]


async def test_sqlite_keeps_what_it_is_told(tmp_path: Path) -> None:
    async with opened(SqliteStore(tmp_path / "new" / "cache.db")) as store:
        await check_store(store)
        assert [change async for change in store.follow()] == []


async def test_sqlite_survives_a_restart_and_forgets_what_expired(tmp_path: Path) -> None:
    path = tmp_path / "cache.db"
    async with opened(SqliteStore(path)) as store:
        await store.put(entry("stays"))
        await store.put(entry("goes", ttl_s=-1.0))
    async with opened(SqliteStore(path)) as store:
        assert [kept.key for kept in await store.load(time.time())] == ["stays"]


async def test_sqlite_ignores_an_unreadable_record(tmp_path: Path) -> None:
    path = tmp_path / "cache.db"
    async with opened(SqliteStore(path)) as store:
        await store.put(entry("good"))
        await store.put(entry("bad"))
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE entries SET record = '{\"answer\": 3}' WHERE key = 'bad'")
    async with opened(SqliteStore(path)) as store:
        assert [kept.key for kept in await store.load(time.time())] == ["good"]


async def test_sqlite_says_what_is_wrong_with_the_file(tmp_path: Path) -> None:
    garbage = tmp_path / "garbage.db"
    garbage.write_bytes(b"this is no database, and long enough to be read as one" * 40)
    foreign = tmp_path / "foreign.db"
    with contextlib.closing(sqlite3.connect(foreign)) as db, db:
        db.execute("CREATE TABLE precious (x)")
    folder = tmp_path / "folder"
    folder.mkdir()
    for path, says in ((garbage, "damaged"), (foreign, "another program"), (folder, "cannot open")):
        with pytest.raises(StoreError, match=says) as raised:
            await SqliteStore(path).start()
        assert str(path) in raised.value.message


async def test_sqlite_notices_pages_that_were_damaged(tmp_path: Path) -> None:
    path = tmp_path / "cache.db"
    async with opened(SqliteStore(path)) as store:
        for i in range(50):
            await store.put(entry(f"key {i}"))
    raw = bytearray(path.read_bytes())
    raw[4096 : 4096 * 3] = b"\xff" * 8192
    path.write_bytes(raw)
    with pytest.raises(StoreError, match="damaged"):
        await SqliteStore(path).start()


@pytest.mark.slow  # waits out SQLite's own patience of 2 s
async def test_sqlite_file_has_one_owner(tmp_path: Path) -> None:
    path = tmp_path / "cache.db"
    async with opened(SqliteStore(path)) as store:
        await store.put(entry("a"))
        with pytest.raises(StoreError, match="another process"):
            await SqliteStore(path).start()
        assert await store.get("a") is not None


async def test_redis_keeps_what_it_is_told(redis_server: RedisServer) -> None:
    async with opened(RedisStore(redis_server.url)) as store:
        await check_store(store)


async def test_redis_lets_entries_expire(redis_server: RedisServer) -> None:
    async with opened(RedisStore(redis_server.url)) as store:
        await store.put(entry("brief", ttl_s=0.05))
        await store.put(entry("long"))
        await asyncio.sleep(0.1)
        assert await store.get("brief") is None
        assert [kept.key for kept in await store.load(time.time())] == ["long"]


async def test_redis_namespaces_do_not_meet(redis_server: RedisServer) -> None:
    async with opened(RedisStore(redis_server.url, "one")) as one, opened(RedisStore(redis_server.url, "two")) as two:
        await one.put(entry("a"))
        assert await two.get("a") is None
        assert await two.load(time.time()) == []


async def test_redis_tells_of_changes(redis_server: RedisServer) -> None:
    async with opened(RedisStore(redis_server.url)) as one, opened(RedisStore(redis_server.url)) as two:
        changes = two.follow()
        await one.put(entry("a"))
        await one.delete({"a": "other"})
        await one.delete({"a": "v1"})
        async with asyncio.timeout(5):
            seen = [await anext(changes), await anext(changes)]
        assert seen == [Change("put", "a", "v1"), Change("delete", "a", "v1")]


async def test_redis_flushed_or_trimmed_asks_for_a_resync(redis_server: RedisServer) -> None:
    async with opened(RedisStore(redis_server.url)) as store:
        assert isinstance(store, RedisStore)
        changes = store.follow()
        await store.put(entry("a"))
        async with asyncio.timeout(5):
            assert (await anext(changes)).kind == "put"
            await store._redis.flushdb()
            assert await anext(changes) == Change("resync")
            await store.put(entry("b"))
            assert await anext(changes) == Change("put", "b", "v1")


async def test_lost_redis_fails_soon_and_heals(redis_server: RedisServer) -> None:
    async with opened(RedisStore(redis_server.url)) as store:
        changes = store.follow()
        await store.put(entry("a"))
        async with asyncio.timeout(10):
            assert (await anext(changes)).kind == "put"
            next_change = asyncio.ensure_future(anext(changes))
            redis_server.kill()
            start_s = time.monotonic()
            for _ in range(200):
                with pytest.raises(StoreUnavailable):
                    await store.get("a")
            assert time.monotonic() - start_s < 1.0
            was_up = store.is_up  # asserted by itself, the property would be False to mypy from here on
            assert not was_up
            redis_server.start()
            assert await next_change == Change("resync")  # the new server has an empty log
            assert store.is_up
            assert await store.get("a") is None


async def test_redis_that_hangs_costs_one_timeout(redis_server: RedisServer) -> None:
    async with opened(RedisStore(redis_server.url, timeout_s=0.2)) as store:
        assert isinstance(store, RedisStore)
        await store._redis.client_pause(1500, all=True)
        start_s = time.monotonic()
        results = await asyncio.gather(*(store.get("a") for _ in range(50)), return_exceptions=True)
        assert all(isinstance(result, StoreUnavailable) for result in results)
        with pytest.raises(StoreUnavailable):
            await store.put(entry("a"))
        assert time.monotonic() - start_s < 1.0


async def test_redis_takes_any_number_of_calls_at_once(redis_server: RedisServer) -> None:
    async with opened(RedisStore(redis_server.url, timeout_s=10.0)) as store:
        await asyncio.gather(*(store.put(entry(str(i))) for i in range(400)))
        assert None not in await asyncio.gather(*(store.get(str(i)) for i in range(400)))
        assert store.is_up


async def test_a_full_redis_refuses_and_is_not_lost(redis_server: RedisServer) -> None:
    async with opened(RedisStore(redis_server.url)) as store:
        await store.put(entry("a"))
        await store._redis.config_set("maxmemory", "1")  # type: ignore[attr-defined]
        with pytest.raises(StoreUnavailable, match="refuses"):
            await store.put(entry("b"))
        assert store.is_up
        assert await store.get("a") is not None
        async with opened(RedisStore(redis_server.url)) as late:
            assert late.is_up, "one that starts now reads what there is"
            assert len(await late.load(time.time())) == 1


async def test_many_entries_are_loaded_in_order_of_use(redis_server: RedisServer) -> None:
    async with opened(RedisStore(redis_server.url, timeout_s=10.0)) as store:
        await asyncio.gather(*(store.put(entry(str(i), used=float((i * 7919) % 3001))) for i in range(3001)))
        used = [kept.last_used for kept in await store.load(time.time())]
        assert used == sorted(used)
        assert len(used) == 3001


async def test_a_follower_ends_whenever_it_is_told_to(redis_server: RedisServer) -> None:
    """`asyncio.wait_for`, on Python 3.11, swallows a cancellation that comes in the tick in which its work is done."""
    async with opened(RedisStore(redis_server.url)) as store:

        async def drain() -> None:
            async for _ in store.follow():
                pass

        for ticks in range(60):
            following = asyncio.create_task(drain())
            await store.put(entry("a", version=str(ticks)))
            for _ in range(ticks):
                await asyncio.sleep(0)
            following.cancel()
            done, _ = await asyncio.wait({following}, timeout=10.0)
            assert done, f"a cancellation after {ticks} ticks was lost"


async def test_redis_may_be_down_at_the_start(redis_server: RedisServer) -> None:
    redis_server.kill()
    async with opened(RedisStore(redis_server.url)) as store:
        assert not store.is_up
        with pytest.raises(StoreUnavailable):
            await store.load(0.0)
    with pytest.raises(StoreError, match="redis_url"):
        RedisStore("http://example.com")
