"""The semantic cache: the story of a lookup and of a store. Knows no HTTP, no models of language and no Ray.

Owns the entries and the index; the store follows. Belongs to one event loop. A failing embedder or store makes
misses, never errors. What may be compared, and what is near enough, is decided in `policy`, `gate` and `decision`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from cache.decision import Decision
from cache.embedder import Embedded, MicroBatcher, TextEmbedder, Vectors
from cache.entries import Entries
from cache.flights import Flights
from cache.gate import MAX_CHARS, objection
from cache.index import VectorIndex
from cache.store import Change, Entry, Store, StoreUnavailable
from cache.types import FLIGHT_LEASE_S, CachedAnswer, CacheHit, CacheMiss, CacheQuery, LookupResult
from replicas.types import MillraceError

logger = logging.getLogger(__name__)

_NUM_NEIGHBOURS = 8
_MAX_SEARCH_ON_LOOP = 4096
"""A larger partition is searched in a thread: above this a search takes more than 0.4 ms of the event loop."""
_INSERTS_AT_ONCE = 256
_CATCH_UP_S = 0.2
"""Pause before what was missed is asked for again: a store that has just failed is given time."""


@dataclass(frozen=True, slots=True)
class CacheSettings:
    ttl_s: float = 86_400.0
    max_entries: int = 50_000
    max_bytes: int = 512 * 2**20
    flight_lease_s: float = FLIGHT_LEASE_S
    embedding_timeout_s: float = 1.0
    """A lookup that has no embedding by then is a miss: who asks waits for it before a model may begin."""
    upkeep_interval_s: float = 5.0
    """How often expired entries are removed, times of use written to the store, and the bounds enforced on what other
    replicas stored: until then two that evict the same entry at once may leave one too many."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) <= 0:
                raise ValueError(f"cache.{field.name} must be positive, not {getattr(self, field.name)}")


@dataclass(frozen=True, slots=True)
class CacheStats:
    """One reading; counters count from the start."""

    num_entries: int
    num_bytes: int
    num_partitions: int
    num_flights: int
    num_waiters: int
    is_store_up: bool
    counts: Mapping[str, int]
    """hit-exact, hit-semantic, miss, joined, stored, evicted, expired, store-failed, embedder-failed, embedder-slow,
    too-long, below-threshold, and `gate-<reason>` for each neighbour that the gate turned down."""


class SemanticCache:
    def __init__(
        self,
        store: Store,
        embedder: TextEmbedder,
        index: VectorIndex,
        decision: Decision,
        settings: CacheSettings,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`clock` gives seconds since the epoch: stored dates are compared by other replicas and after a restart."""
        assert index.dim == embedder.dim, f"index of {index.dim} dimensions for an embedder of {embedder.dim}"
        self._store = store
        self._embedder = embedder
        self._index = index
        self._decision = decision
        self._settings = settings
        self._clock = clock
        self._batcher = MicroBatcher(embedder)
        self._flights = Flights(settings.flight_lease_s)
        self._entries = Entries(index, embedder.name, settings.max_entries, settings.max_bytes)
        self._touched: dict[str, float] = {}  # times of use the store has not seen
        self._doomed: dict[str, str] = {}  # key -> version, removed here, not yet in the store
        self._writing = asyncio.Lock()  # store and entries change together, one change at a time
        self._behind = asyncio.Event()  # a change of another replica was missed
        self._is_embedder_failing = False  # told once, not with each question
        self._counts: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()
        self._background: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Raises `StoreError` where the store can never work; a store that is down for now is found later."""
        await self._store.start()
        await self._resync()
        self._background.append(asyncio.create_task(self._upkeep()))
        if self._store.is_shared:
            self._background.append(asyncio.create_task(self._follow()))

    async def close(self) -> None:
        self._flights.close()
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, *self._tasks, return_exceptions=True)
        async with self._writing:
            await self._delete_doomed()
            await self._write_touched()
        await self._batcher.close()
        await self._store.close()

    async def lookup(self, query: CacheQuery) -> LookupResult:
        """The stored answer, or a miss. A miss with a `flight` obliges the caller to `store` or `abandon`
        it, and to `renew` it until then."""
        hit = self._find_exact(query) if query.may_read else None
        if hit is not None:
            return self._counted(hit)
        outcome = await self._take_off(query)
        if isinstance(outcome, CacheHit):
            self._counts["joined"] += 1
            return self._counted(outcome)
        try:
            found, embedding = await self._search(query)
        except BaseException:
            if outcome is not None:
                self._flights.abandon(outcome)
            raise
        if found is not None:
            self._flights.settle(query.exact_key, outcome, found)
            return self._counted(found)
        self._counts["miss"] += 1
        return CacheMiss(outcome, embedding)

    async def store(self, query: CacheQuery, miss: CacheMiss, answer: CachedAnswer) -> None:
        """Give the answer to those who wait for it, and keep it. Completes even if the caller is cancelled."""
        if not query.may_store:
            await self.abandon(miss)
            return
        hit = CacheHit(answer, "hit-exact", similarity=1.0, age_s=0.0)
        self._flights.announce(query.exact_key, hit)
        await self._shielded(self._keep_and_settle(query, miss, hit))

    async def renew(self, flights: Sequence[str]) -> None:
        """The answers of these flights are still being made: each lease begins anew."""
        for flight in flights:
            self._flights.renew(flight)

    async def abandon(self, miss: CacheMiss) -> None:
        if miss.flight is not None:
            self._flights.abandon(miss.flight)

    async def embed(self, texts: Sequence[str], first: int = 0) -> tuple[list[tuple[float, ...]], int]:
        """L2-normalised embeddings and the number of tokens; `first` is what an error calls the first text.

        Raises `PromptTooLong`, `Overloaded` or `EngineError`."""
        embedded = await self._batcher.embed_many(texts, first)
        return [_to_floats(one) for one in embedded], sum(one.num_tokens for one in embedded)

    def stats(self) -> CacheStats:
        return CacheStats(
            num_entries=len(self._entries),
            num_bytes=self._entries.num_bytes,
            num_partitions=self._index.num_partitions,
            num_flights=len(self._flights),
            num_waiters=self._flights.num_waiters,
            is_store_up=self._store.is_up,
            counts=dict(self._counts),
        )

    async def check_integrity(self) -> None:
        """Entries, index and byte count agree with one another, and with the store if that is ours alone."""
        async with self._writing:
            self._entries.check_integrity()
            if not self._store.is_shared:  # another's change may be on its way here
                self._entries.check_bounds()
                await self._delete_doomed()
                kept = {entry.key: entry.version for entry in await self._store.load(0.0)}
                assert kept == self._entries.versions(), "store and entries disagree"

    # The steps of a lookup

    def _find_exact(self, query: CacheQuery) -> CacheHit | None:
        entry = self._entries.get(query.exact_key)
        return None if entry is None else self._hit(entry, query, "hit-exact", 1.0)

    async def _take_off(self, query: CacheQuery) -> str | CacheHit | None:
        """A token of leadership, the answer of whoever leads, or None: on one's own."""
        if query.may_read:
            return await self._flights.join(query.exact_key, lambda hit: _is_young(hit, query), query.may_store)
        return self._flights.lead(query.exact_key) if query.may_store else None

    async def _search(self, query: CacheQuery) -> tuple[CacheHit | None, tuple[float, ...] | None]:
        """The shared store's exact answer or a neighbour's; else the embedding for whoever makes the answer."""
        if query.may_read and (hit := await self._find_shared(query)) is not None:
            return hit, None
        embedded = await self._embed_question(query.text)
        if embedded is None:
            return None, None
        hit = await self._find_neighbour(query, embedded) if query.may_read else None
        return hit, _to_floats(embedded)

    async def _find_shared(self, query: CacheQuery) -> CacheHit | None:
        """An answer that another replica stored and whose news has not come yet."""
        if not (self._store.is_shared and self._store.is_up):
            return None
        try:
            entry = await self._store.get(query.exact_key)
        except StoreUnavailable:
            self._counts["store-failed"] += 1
            return None
        return None if entry is None else self._hit(entry, query, "hit-exact", 1.0)

    async def _embed_question(self, text: str | None) -> Embedded | None:
        if text is None:
            return None
        try:
            async with asyncio.timeout(self._settings.embedding_timeout_s):
                embedded = await self._batcher.embed(text)
        except TimeoutError:
            self._counts["embedder-slow"] += 1
            return None
        except MillraceError as error:
            self._counts["embedder-failed"] += 1
            if not self._is_embedder_failing:
                logger.warning("cache: no embeddings, so no semantic matches: %s", error.message)
            self._is_embedder_failing = True
            return None
        self._is_embedder_failing = False
        return embedded

    async def _find_neighbour(self, query: CacheQuery, embedded: Embedded) -> CacheHit | None:
        assert query.text is not None, "only a text has neighbours"
        if embedded.is_truncated or len(query.text) > MAX_CHARS:  # two long texts that begin alike have one embedding
            self._counts["too-long"] += 1
            return None
        search = (query.partition, embedded.vector, _NUM_NEIGHBOURS)
        if self._index.size(query.partition) > _MAX_SEARCH_ON_LOOP:
            neighbours = await asyncio.to_thread(self._index.search, *search)
        else:
            neighbours = self._index.search(*search)
        for id, similarity in neighbours:
            if similarity < self._decision.min_similarity:
                self._counts["below-threshold"] += 1
                return None
            entry = self._entries.at(id)  # it may have gone while a thread searched
            if entry is not None and (hit := self._judge(entry, query, similarity)) is not None:
                return hit
        return None

    def _judge(self, entry: Entry, query: CacheQuery, similarity: float) -> CacheHit | None:
        assert query.text is not None, "only a text has neighbours"
        assert entry.text is not None, "only entries with a text are indexed"
        reason = objection(query.text, entry.text)
        if reason is not None:
            self._counts[f"gate-{reason}"] += 1
            return None
        if not self._decision.accepts(entry.key, similarity):
            return None
        return self._hit(entry, query, "hit-semantic", min(similarity, 1.0))

    def _hit(self, entry: Entry, query: CacheQuery, kind: Any, similarity: float) -> CacheHit | None:
        """None where the entry is too old, for itself or for the asker."""
        now_s = self._clock()
        hit = CacheHit(entry.answer, kind, similarity, age_s=max(0.0, now_s - entry.created_at))
        if now_s >= entry.expires_at or not _is_young(hit, query):
            return None
        if entry.key in self._entries:
            self._entries.mark_used(entry.key)
            self._touched[entry.key] = now_s
        return hit

    def _counted(self, hit: CacheHit) -> CacheHit:
        self._counts[hit.kind] += 1
        return hit

    # Keeping entries: everything below changes entries and store together, under `_writing`

    async def _keep_and_settle(self, query: CacheQuery, miss: CacheMiss, hit: CacheHit) -> None:
        try:
            await self._keep(query, miss, hit.answer)
        finally:
            # Until now the flight stayed open: a question that came in between waits instead of leading anew.
            self._flights.settle(query.exact_key, miss.flight, hit)

    async def _keep(self, query: CacheQuery, miss: CacheMiss, answer: CachedAnswer) -> None:
        embedding = await self._embedding_to_keep(query.text, miss)
        now_s = self._clock()
        entry = Entry(
            key=query.exact_key,
            version=uuid.uuid4().hex,
            partition=query.partition,
            text=query.text,
            answer=answer,
            embedder=self._embedder.name if embedding is not None else None,
            embedding=embedding,
            created_at=now_s,
            expires_at=now_s + self._settings.ttl_s,
            last_used=now_s,
        )
        if entry.size_bytes > self._settings.max_bytes:
            return
        async with self._writing:
            try:
                await self._store.put(entry)
            except StoreUnavailable as error:
                # Not kept here either: entries stay a subset of the store, and a lost store means misses. What this
                # answer was to replace goes too: somebody found it too old.
                self._counts["store-failed"] += 1
                if (version := self._entries.version(entry.key)) is not None:
                    self._entries.drop([entry.key])
                    self._doomed[entry.key] = version
                if self._store.is_up:  # of one that is down the store itself has told
                    logger.warning("cache: an answer is not stored: %s", error.message)
                return
            self._insert(entry)
            self._counts["stored"] += 1
            self._evict()
            await self._delete_doomed()

    async def _embedding_to_keep(self, text: str | None, miss: CacheMiss) -> Vectors | None:
        """A lookup that had no time for it has left it to be made now."""
        if text is None or not self._is_read_whole(text):
            return None
        if miss.embedding is not None:
            return np.asarray(miss.embedding, np.float32)
        embedded = await self._embed_question(text)
        return None if embedded is None else embedded.vector

    def _is_read_whole(self, text: str) -> bool:
        """By the embedder and by the gate."""
        return len(text) <= MAX_CHARS and self._embedder.count_tokens([text])[0] <= self._embedder.max_tokens

    def _insert(self, entry: Entry) -> None:
        self._doomed.pop(entry.key, None)
        self._entries.insert(entry)

    def _evict(self) -> None:
        evicted = self._entries.evict()
        self._doomed.update(evicted)
        self._counts["evicted"] += len(evicted)

    def _expire(self) -> None:
        expired = self._entries.expire(self._clock())
        self._doomed.update(expired)
        self._counts["expired"] += len(expired)

    async def _delete_doomed(self) -> None:
        """Tell the store what left; what it does not take now it is told again later."""
        if not self._doomed:
            return
        try:
            await self._store.delete(self._doomed)
            self._doomed.clear()
        except StoreUnavailable:
            self._counts["store-failed"] += 1

    async def _write_touched(self) -> None:
        touched, self._touched = self._touched, {}
        if not touched:
            return
        try:
            await self._store.touch(touched)
        except StoreUnavailable:
            self._counts["store-failed"] += 1
            self._touched = touched | self._touched

    # Following the store

    async def _resync(self) -> None:
        """Hold what the store holds."""
        async with self._writing:
            try:
                entries = await self._store.load(self._clock())
            except StoreUnavailable as error:
                self._behind.set()
                logger.warning("cache: entries are not loaded yet: %s", error.message)
                return
            self._behind.clear()
            kept = {entry.key: entry.version for entry in entries}
            self._entries.drop([key for key, version in self._entries.versions().items() if kept.get(key) != version])
            for i, entry in enumerate(entries):
                if entry.key not in self._entries and self._doomed.get(entry.key) != entry.version:
                    self._insert(entry)
                if i % _INSERTS_AT_ONCE == 0:
                    await asyncio.sleep(0)  # lookups go on meanwhile
            self._evict()
            await self._delete_doomed()

    async def _follow(self) -> None:
        async for change in self._store.follow():
            try:
                if change.kind == "resync":
                    await self._resync()
                else:
                    await self._apply(change)
            except Exception:  # one change that cannot be applied must not end the following
                logger.exception("cache: a change of the store could not be applied")
                self._behind.set()

    async def _apply(self, change: Change) -> None:
        async with self._writing:
            held = self._entries.version(change.key)
            if change.kind == "delete" and held == change.version:
                self._entries.drop([change.key])
            elif change.kind == "put" and change.version not in (held, self._doomed.get(change.key)):
                try:
                    entry = await self._store.get(change.key)
                except StoreUnavailable:
                    self._behind.set()
                    return
                if entry is None:  # gone again already: what we hold under this key was overwritten
                    self._entries.drop([change.key])
                elif entry.version != held:
                    self._insert(entry)  # who stored it evicts for it; were we to do so too, twice as much would go

    async def _upkeep(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._settings.upkeep_interval_s):
                    await self._behind.wait()
                    await asyncio.sleep(_CATCH_UP_S)
            try:
                await self.tidy()
            except Exception:  # upkeep must go on whatever one round meets
                logger.exception("cache: upkeep failed")

    async def tidy(self) -> None:
        """Remove what has expired, tell the store what it missed, load what was missed here."""
        async with self._writing:
            self._expire()
            self._evict()
            await self._delete_doomed()
            await self._write_touched()
        if self._behind.is_set() and self._store.is_up:
            await self._resync()

    async def _shielded(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        await asyncio.shield(task)


def _is_young(hit: CacheHit, query: CacheQuery) -> bool:
    return query.max_age_s is None or hit.age_s <= query.max_age_s


def _to_floats(embedded: Embedded) -> tuple[float, ...]:
    return tuple(embedded.vector.tolist())
