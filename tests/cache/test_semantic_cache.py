"""The story of lookups and stores, alone, in crowds, and beside a Redis that comes and goes."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from cache.decision import ThresholdDecision
from cache.index import VectorIndex
from cache.semantic_cache import CacheSettings, SemanticCache
from cache.store import RedisStore, SqliteStore, Store
from cache.types import CachedAnswer, CacheHit, CacheMiss, CacheQuery, LookupResult
from tests.cache.cache_fakes import Clock, RedisServer, WordEmbedder, eventually


def ask(text: str | None, partition: str = "p", **options: Any) -> CacheQuery:
    return CacheQuery(f"{partition}/{text}", partition, text, **options)


def answer(text: str = "Because.") -> CachedAnswer:
    return CachedAnswer(text, "model", 5, 2, 0.001)


@contextlib.asynccontextmanager
async def running(
    store: Store, clock: Callable[[], float], embedder: WordEmbedder | None = None, **settings: Any
) -> AsyncIterator[SemanticCache]:
    embedder = WordEmbedder() if embedder is None else embedder
    # On a busy machine too, a lookup waits for its embedding.
    patient = CacheSettings(**{"embedding_timeout_s": 10.0, **settings})
    cache = SemanticCache(store, embedder, VectorIndex(embedder.dim), ThresholdDecision(0.8), patient, clock)
    await cache.start()
    try:
        yield cache
        await cache.check_integrity()
    finally:
        await cache.close()


async def fill(cache: SemanticCache, *queries: CacheQuery, with_answer: CachedAnswer | None = None) -> None:
    for query in queries:
        miss = await cache.lookup(query)
        assert isinstance(miss, CacheMiss), f"{query.text} is answered already"
        await cache.store(query, miss, answer() if with_answer is None else with_answer)


def hit(result: LookupResult) -> CacheHit:
    assert isinstance(result, CacheHit), result
    return result


async def misses(cache: SemanticCache, query: CacheQuery) -> CacheMiss:
    result = await cache.lookup(query)
    assert isinstance(result, CacheMiss), result
    await cache.abandon(result)
    return result


@pytest.fixture
def store(tmp_path: Path) -> SqliteStore:
    return SqliteStore(tmp_path / "cache.db")


async def test_a_repeated_question_is_an_exact_hit_and_embeds_nothing(store: SqliteStore, clock: Clock) -> None:
    embedder = WordEmbedder()
    async with running(store, clock, embedder) as cache:
        await fill(cache, ask("why is the sky blue"))
        num_texts = embedder.num_texts
        clock.now_s += 5
        assert await cache.lookup(ask("why is the sky blue")) == CacheHit(answer(), "hit-exact", 1.0, 5.0)
        assert embedder.num_texts == num_texts == 1


async def test_a_rephrased_question_hits_inside_its_partition_only(store: SqliteStore, clock: Clock) -> None:
    async with running(store, clock) as cache:
        await fill(cache, ask("why is the big sky over us blue today"))
        found = hit(await cache.lookup(ask("why is that big sky over us blue today")))
        assert found.kind == "hit-semantic"
        assert 0.8 < found.similarity < 1.0
        miss = await misses(cache, ask("why is that big sky over us blue today", partition="other"))
        assert miss.embedding is not None
        assert len(miss.embedding) == WordEmbedder.dim


async def test_gate_and_threshold_turn_neighbours_down(store: SqliteStore, clock: Clock) -> None:
    async with running(store, clock) as cache:
        await fill(cache, ask("how do i enable the dark mode of the new editor for 12 users"))
        await misses(cache, ask("how do i disable the dark mode of the new editor for 12 users"))
        await misses(cache, ask("how do i enable the dark mode of the new editor for 13 users"))
        await misses(cache, ask("what shall we cook"))
        counts = cache.stats().counts
        assert (counts["gate-polarity"], counts["gate-numbers"], counts["below-threshold"]) == (1, 1, 1)


async def test_truncated_questions_match_exactly_only(store: SqliteStore, clock: Clock) -> None:
    async with running(store, clock, WordEmbedder(max_words=4)) as cache:
        await fill(cache, ask("a b c d and more"))
        assert hit(await cache.lookup(ask("a b c d and more"))).kind == "hit-exact"
        assert (await misses(cache, ask("a b c d"))).embedding is not None
        assert (await misses(cache, ask("a b c d and less"))).embedding is not None
        assert cache.stats().num_partitions == 0


async def test_questions_without_text_match_exactly(store: SqliteStore, clock: Clock) -> None:
    embedder = WordEmbedder()
    async with running(store, clock, embedder) as cache:
        await fill(cache, ask(None))
        assert hit(await cache.lookup(ask(None))).kind == "hit-exact"
        assert embedder.num_texts == 0


async def test_entries_expire_and_max_age_is_kept(store: SqliteStore, clock: Clock) -> None:
    async with running(store, clock, ttl_s=100.0) as cache:
        await fill(cache, ask("a question"))
        clock.now_s += 50
        assert hit(await cache.lookup(ask("a question", max_age_s=60))).age_s == 50
        await misses(cache, ask("a question", max_age_s=40))
        clock.now_s += 50
        await misses(cache, ask("a question"))
        await cache.tidy()
        assert (cache.stats().num_entries, cache.stats().num_bytes, cache.stats().num_partitions) == (0, 0, 0)
        assert await store.load(0.0) == []


async def test_no_cache_answers_afresh_and_no_store_keeps_nothing(store: SqliteStore, clock: Clock) -> None:
    async with running(store, clock) as cache:
        await fill(cache, ask("a question"))
        await fill(cache, ask("a question", may_read=False), with_answer=answer("New."))
        assert hit(await cache.lookup(ask("a question"))).answer.text == "New."
        private = ask("another matter", may_store=False)
        miss = await cache.lookup(private)
        assert isinstance(miss, CacheMiss)
        assert miss.flight is None
        await cache.store(private, miss, answer())
        await misses(cache, ask("another matter"))


async def test_entries_survive_a_restart(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "cache.db"
    async with running(SqliteStore(path), clock) as cache:
        await fill(cache, ask("why is the big sky over us blue today"), ask(None))
        num_bytes = cache.stats().num_bytes
    async with running(SqliteStore(path), clock) as cache:
        assert (cache.stats().num_entries, cache.stats().num_bytes) == (2, num_bytes)
        assert hit(await cache.lookup(ask(None))).kind == "hit-exact"
        assert hit(await cache.lookup(ask("why is that big sky over us blue today"))).kind == "hit-semantic"


async def test_another_embedders_vectors_are_not_compared(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "cache.db"
    async with running(SqliteStore(path), clock) as cache:
        await fill(cache, ask("why is the big sky over us blue today"))
    other = WordEmbedder()
    other.name = "other words"
    async with running(SqliteStore(path), clock, other) as cache:
        await misses(cache, ask("why is that big sky over us blue today"))
        assert hit(await cache.lookup(ask("why is the big sky over us blue today"))).kind == "hit-exact"


async def test_the_least_recently_used_are_evicted(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "cache.db"
    async with running(SqliteStore(path), clock, max_entries=3) as cache:
        await fill(cache, *(ask(f"question {word}") for word in ("alpha", "beta", "gamma")))
        clock.now_s += 1
        hit(await cache.lookup(ask("question alpha")))
        await fill(cache, ask("question delta"))
        await misses(cache, ask("question beta"))
    async with running(SqliteStore(path), clock, max_entries=2) as cache:  # use is remembered across the restart
        hit(await cache.lookup(ask("question alpha")))
        hit(await cache.lookup(ask("question delta")))
        assert cache.stats().num_entries == 2


async def test_bytes_are_bounded(store: SqliteStore, clock: Clock) -> None:
    async with running(store, clock, max_bytes=20_000) as cache:
        for i in range(30):
            await fill(cache, ask(f"question number {i}"), with_answer=answer("x" * 1000))
            assert cache.stats().num_bytes <= 20_000
        assert cache.stats().num_entries > 5
        await fill(cache, ask("too long to keep"), with_answer=answer("x" * 30_000))
        await misses(cache, ask("too long to keep"))


async def test_identical_questions_share_one_flight(store: SqliteStore, clock: Clock) -> None:
    embedder = WordEmbedder()
    async with running(store, clock, embedder) as cache:
        query = ask("a question")
        lookups = [asyncio.create_task(cache.lookup(query)) for _ in range(50)]
        miss = await asyncio.wait_for(lookups[0], 5)
        assert isinstance(miss, CacheMiss)
        assert miss.flight is not None
        assert not any(lookup.done() for lookup in lookups[1:])
        await cache.store(query, miss, answer())
        assert all(hit(result).kind == "hit-exact" for result in await asyncio.gather(*lookups[1:]))
        assert embedder.num_texts == 1
        assert cache.stats().num_flights == 0


async def test_a_semantic_hit_serves_those_who_wait(store: SqliteStore, clock: Clock) -> None:
    embedder = WordEmbedder()
    async with running(store, clock, embedder) as cache:
        await fill(cache, ask("why is the big sky over us blue today"))
        embedder.delay_s = 0.02
        query = ask("why is that big sky over us blue today")
        results = await asyncio.gather(*(cache.lookup(query) for _ in range(10)))
        assert {hit(result).kind for result in results} == {"hit-semantic"}
        assert embedder.num_texts == 2


async def test_a_failing_embedder_makes_misses(store: SqliteStore, clock: Clock) -> None:
    embedder = WordEmbedder()
    embedder.fails = True
    async with running(store, clock, embedder) as cache:
        await fill(cache, ask("a question"))
        assert hit(await cache.lookup(ask("a question"))).kind == "hit-exact"
        assert (await misses(cache, ask("a question indeed"))).embedding is None
        embedder.fails = False
        assert (await misses(cache, ask("a question indeed"))).embedding is not None


async def test_a_slow_embedder_makes_misses_in_time(store: SqliteStore, clock: Clock) -> None:
    embedder = WordEmbedder()
    async with running(store, clock, embedder, embedding_timeout_s=0.05) as cache:
        await fill(cache, ask("a question"))
        embedder.delay_s = 1.0
        start_s = time.monotonic()
        lookups = [asyncio.create_task(cache.lookup(ask("a question indeed"))) for _ in range(3)]
        first = await lookups[0]
        assert time.monotonic() - start_s < 0.9
        assert isinstance(first, CacheMiss)
        assert first.flight is not None
        assert first.embedding is None
        assert cache.stats().counts["embedder-slow"] >= 1
        await cache.store(ask("a question indeed"), first, answer())
        assert all(hit(result).kind == "hit-exact" for result in await asyncio.gather(*lookups[1:]))
        assert (cache.stats().num_flights, cache.stats().num_waiters) == (0, 0)


async def test_an_embedding_that_came_too_late_for_the_lookup_is_made_for_the_entry(
    store: SqliteStore, clock: Clock
) -> None:
    embedder = WordEmbedder()
    async with running(store, clock, embedder, embedding_timeout_s=0.05) as cache:
        embedder.delay_s = 0.2
        miss = await misses(cache, ask("what is a mill race"))
        assert miss.embedding is None
        await asyncio.sleep(0.2)
        embedder.delay_s = 0.0
        await cache.store(ask("what is a mill race"), miss, answer())
        assert hit(await cache.lookup(ask("What is a mill race?"))).kind == "hit-semantic"


async def test_a_store_outlives_its_caller(store: SqliteStore, clock: Clock) -> None:
    async with running(store, clock) as cache:
        query = ask("a question")
        miss = await cache.lookup(query)
        assert isinstance(miss, CacheMiss)
        storing = asyncio.create_task(cache.store(query, miss, answer()))
        await asyncio.sleep(0)
        storing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await storing
        await eventually(lambda: cache.stats().num_entries == 1)
        assert cache.stats().num_flights == 0


async def test_embed_counts_tokens(store: SqliteStore, clock: Clock) -> None:
    async with running(store, clock) as cache:
        vectors, num_tokens = await cache.embed(["one two", "three"])
        assert num_tokens == 3
        assert [len(vector) for vector in vectors] == [64, 64]
        assert sum(x * x for x in vectors[0]) == pytest.approx(1.0, abs=1e-5)


async def test_randomised_crowd_keeps_its_books(tmp_path: Path, clock: Clock) -> None:
    """Hundreds of askers who store, abandon, vanish and are cancelled, while entries expire and are evicted."""
    rng = random.Random(1)
    embedder = WordEmbedder()
    settings = {"max_entries": 25, "max_bytes": 60_000, "ttl_s": 40.0, "flight_lease_s": 60.0}
    leading: set[str] = set()
    words = ["sky", "sea", "tea", "sun", "moon", "wind"]

    async def one_life(cache: SemanticCache) -> None:
        text = " ".join(rng.choices(words, k=2)) if rng.random() < 0.9 else None
        query = ask(text, f"p{rng.randrange(3)}", may_read=rng.random() < 0.9, may_store=rng.random() < 0.9)
        result = await cache.lookup(query)
        if isinstance(result, CacheHit):
            assert query.may_read
            assert result.answer.text.startswith(query.partition)
            return
        if result.flight is not None:
            assert query.exact_key not in leading, "two leaders of one key"
            leading.add(query.exact_key)
        try:
            await asyncio.sleep(rng.random() * 0.01)
        finally:
            if result.flight is not None:
                leading.discard(query.exact_key)
            fate = rng.random()
            if fate < 0.7:
                await cache.store(query, result, answer(query.partition + "x" * rng.randrange(5000)))
            else:
                await cache.abandon(result)

    async with running(SqliteStore(tmp_path / "cache.db"), clock, embedder, **settings) as cache:
        tasks: list[asyncio.Task[None]] = []
        for step in range(500):
            tasks.append(asyncio.create_task(one_life(cache)))
            clock.now_s += rng.random()
            embedder.fails = step % 100 > 90
            if rng.random() < 0.2:
                rng.choice(tasks).cancel()
            if rng.random() < 0.3:
                await asyncio.sleep(0.001)
            if step % 97 == 0:
                await cache.tidy()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert [o for o in outcomes if o is not None and not isinstance(o, asyncio.CancelledError)] == []
        await eventually(lambda: cache.stats().num_flights == 0)
        assert cache.stats().num_waiters == 0
        await cache.check_integrity()
        assert cache.stats().num_entries > 0
        clock.now_s += 1000
        await cache.tidy()
        assert (cache.stats().num_entries, cache.stats().num_bytes) == (0, 0)
        assert (len(cache._touched), len(cache._doomed)) == (0, 0)


async def test_redis_replicas_see_one_anothers_entries(redis_server: RedisServer) -> None:
    async with running(RedisStore(redis_server.url, timeout_s=2.0), time.time) as one:
        await fill(one, ask("stored before the other began to follow"))
        async with running(RedisStore(redis_server.url, timeout_s=2.0), time.time, max_entries=2) as two:
            assert two.stats().num_entries == 1
            await fill(one, ask("why is the big sky over us blue today"))
            assert hit(await two.lookup(ask("why is the big sky over us blue today"))).kind == "hit-exact"
            await eventually(lambda: two.stats().num_entries == 2)
            assert hit(await two.lookup(ask("why is that big sky over us blue today"))).kind == "hit-semantic"
            await fill(two, ask("one more than the second may hold"))  # evicts, everywhere
            await eventually(lambda: one.stats().num_entries == 2)
            assert (
                {entry.key for entry in await one._store.load(0.0)}
                == set(one._entries.versions())
                == set(two._entries.versions())
            )


async def test_redis_refreshed_entry_replaces_the_old_one_everywhere(redis_server: RedisServer) -> None:
    async with (
        running(RedisStore(redis_server.url, timeout_s=2.0), time.time) as one,
        running(RedisStore(redis_server.url, timeout_s=2.0), time.time) as two,
    ):
        await fill(one, ask("a question"), with_answer=answer("old"))
        await eventually(lambda: two.stats().num_entries == 1)
        await fill(two, ask("a question", may_read=False), with_answer=answer("new"))

        async def is_new() -> bool:
            return hit(await one.lookup(ask("a question"))).answer.text == "new"

        await eventually(is_new)


async def test_lost_redis_means_misses_and_heals(redis_server: RedisServer) -> None:
    async with (
        running(RedisStore(redis_server.url, timeout_s=2.0), time.time, upkeep_interval_s=0.1) as one,
        running(RedisStore(redis_server.url, timeout_s=2.0), time.time, upkeep_interval_s=0.1) as two,
    ):
        await fill(one, ask("before the loss"))
        await eventually(lambda: two.stats().num_entries == 1)
        redis_server.kill()
        async with asyncio.timeout(30):  # were each to wait for its own time-out, it would take longer
            results = await asyncio.gather(*(one.lookup(ask(f"during the loss {i}")) for i in range(200)))
            for i, result in enumerate(results):
                assert isinstance(result, CacheMiss)
                await one.store(ask(f"during the loss {i}"), result, answer())
        assert not one.stats().is_store_up
        redis_server.start()  # empty: what it held is gone
        await eventually(lambda: one.stats().is_store_up and two.stats().is_store_up)
        await eventually(lambda: one.stats().num_entries == two.stats().num_entries == 0)
        await fill(one, ask("after the loss"))
        await eventually(lambda: two.stats().num_entries == 1)
        assert hit(await two.lookup(ask("after the loss"))).kind == "hit-exact"


async def test_an_answer_that_could_not_be_renewed_is_not_given_any_more(redis_server: RedisServer) -> None:
    async with running(RedisStore(redis_server.url, timeout_s=2.0), time.time) as cache:
        await fill(cache, ask("a question"), with_answer=answer("old"))
        renewal = await cache.lookup(ask("a question", may_read=False))
        assert isinstance(renewal, CacheMiss)
        await cache._store._redis.config_set("maxmemory", "1")  # type: ignore[attr-defined]
        await cache.store(ask("a question", may_read=False), renewal, answer("new"))
        assert cache.stats().num_entries == 0


async def test_randomised_replicas_converge(redis_server: RedisServer) -> None:
    rng = random.Random(2)
    limits: dict[str, Any] = {"max_entries": 20, "flight_lease_s": 60.0, "upkeep_interval_s": 0.1}
    async with (
        running(RedisStore(redis_server.url, timeout_s=2.0), time.time, **limits) as one,
        running(RedisStore(redis_server.url, timeout_s=2.0), time.time, **limits) as two,
    ):

        async def one_life(cache: SemanticCache) -> None:
            query = ask(f"question {rng.randrange(60)}", may_read=rng.random() < 0.5)
            result = await cache.lookup(query)
            if isinstance(result, CacheMiss):
                await cache.store(query, result, answer(str(rng.random())))

        tasks = []
        for _ in range(250):
            tasks.append(asyncio.create_task(one_life(rng.choice([one, two]))))
            if rng.random() < 0.1:
                rng.choice(tasks).cancel()
            await asyncio.sleep(0.001 * (rng.random() < 0.3))
        await asyncio.gather(*tasks, return_exceptions=True)

        async def have_converged() -> bool:
            kept = {entry.key: entry.version for entry in await one._store.load(time.time())}
            return all(kept == cache._entries.versions() for cache in (one, two))

        await eventually(lambda: 0 < one.stats().num_entries <= 20)
        await eventually(have_converged)
