"""Where entries outlive the process: one SQLite file of one owner, or a Redis that several cache replicas share.

A store keeps what it is told and decides nothing: expiry, eviction and the index belong to `SemanticCache`.
Nothing is pickled: an entry is a JSON record and the raw float32 bytes of its embedding.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import redis.asyncio as aioredis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError

from cache.types import CachedAnswer
from replicas.types import MillraceError

logger = logging.getLogger(__name__)
T = TypeVar("T")

_MAX_CONNECTIONS = 16
_SCAN_PAGE = 1_000
_LOAD_BATCH = 32
_LOAD_TIMEOUT_S = 5.0
"""For one page or batch of a whole load, which nobody waits for."""
ENTRY_OVERHEAD_BYTES = 1024
"""Keys, dates, dictionaries and index ids of one entry, roughly."""


class StoreError(MillraceError):
    """The store cannot be used at all; the message says what to do. Raised by `start` only."""


class StoreUnavailable(MillraceError):
    """This one operation failed; the store may come back."""


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """One stored answer. Times are in seconds since the Unix epoch."""

    key: str
    version: str
    """Unique to this writing of the key: a late deletion never hits a newer answer."""
    partition: str
    text: str | None
    answer: CachedAnswer
    embedder: str | None
    """Which model made `embedding`; None: none was made."""
    embedding: npt.NDArray[np.float32] | None
    created_at: float
    expires_at: float
    last_used: float

    @property
    def size_bytes(self) -> int:
        text = len((self.text or "").encode("utf-8", "surrogatepass"))
        answer = len(self.answer.text.encode("utf-8", "surrogatepass"))
        vector = 0 if self.embedding is None else self.embedding.nbytes
        return text + answer + vector + ENTRY_OVERHEAD_BYTES


@dataclass(frozen=True, slots=True)
class Change:
    """What another owner of the same store did. `resync`: changes were missed, load everything."""

    kind: Literal["put", "delete", "resync"]
    key: str = ""
    version: str = ""


class Store(Protocol):
    """All operations but `start` raise `StoreUnavailable` where they fail: those on one entry within a fixed time, so
    that no lookup waits for a lost store; `load` and `delete` take as long as they have entries."""

    @property
    def is_shared(self) -> bool:
        """Others write to it too: ask it before a miss, and `follow` it."""
        ...

    @property
    def is_up(self) -> bool: ...

    async def start(self) -> None:
        """Raises `StoreError` where the store can never work."""
        ...

    async def load(self, now_s: float) -> list[Entry]:
        """All entries that have not expired, least recently used first."""
        ...

    async def get(self, key: str) -> Entry | None: ...

    async def put(self, entry: Entry) -> None: ...

    async def delete(self, versions: Mapping[str, str]) -> None:
        """Delete each key that still has the version given."""
        ...

    async def touch(self, last_used: Mapping[str, float]) -> None: ...

    def follow(self) -> AsyncIterator[Change]:
        """Changes as they come, this owner's own included; never ends for a shared store, at once for another."""
        ...

    async def close(self) -> None: ...


class SqliteStore:
    """One file, one owner: WAL journal, a writer thread of its own, the file locked against a second process."""

    is_shared = False
    is_up = True
    _APPLICATION_ID = 0x4D494C43  # "MILC", in the file's header: we do not write into somebody else's database
    _SCHEMA = 1

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="cache-store")
        self._db: sqlite3.Connection | None = None

    async def start(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, self._open)

    async def load(self, now_s: float) -> list[Entry]:
        def read(db: sqlite3.Connection) -> list[Entry]:
            db.execute("DELETE FROM entries WHERE expires_at <= ?", (now_s,))
            rows = db.execute("SELECT key, version, record, vector, last_used FROM entries ORDER BY last_used, rowid")
            return [entry for row in rows if (entry := _decode(*row)) is not None]

        return await self._run(read)

    async def get(self, key: str) -> Entry | None:
        def read(db: sqlite3.Connection) -> Entry | None:
            row = db.execute(
                "SELECT key, version, record, vector, last_used FROM entries WHERE key = ?", (key,)
            ).fetchone()
            return None if row is None else _decode(*row)

        return await self._run(read)

    async def put(self, entry: Entry) -> None:
        record, vector = _encode(entry)
        row = (entry.key, entry.version, record, vector, entry.expires_at, entry.last_used)
        await self._run(lambda db: db.execute("INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?, ?, ?)", row))

    async def delete(self, versions: Mapping[str, str]) -> None:
        rows = list(versions.items())
        await self._run(lambda db: db.executemany("DELETE FROM entries WHERE key = ? AND version = ?", rows))

    async def touch(self, last_used: Mapping[str, float]) -> None:
        rows = [(used, key) for key, used in last_used.items()]
        await self._run(lambda db: db.executemany("UPDATE entries SET last_used = ? WHERE key = ?", rows))

    async def follow(self) -> AsyncIterator[Change]:
        nobody_else: tuple[Change, ...] = ()
        for change in nobody_else:
            yield change

    async def close(self) -> None:
        def shut() -> None:
            if self._db is not None:
                self._db.close()
                self._db = None

        await asyncio.get_running_loop().run_in_executor(self._thread, shut)
        await asyncio.to_thread(self._thread.shutdown)

    async def _run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        def in_transaction() -> T:
            if self._db is None:
                raise StoreUnavailable("the cache database is not open")
            try:
                with self._db:
                    return work(self._db)
            except sqlite3.Error as error:
                raise StoreUnavailable(f"the cache database failed: {error}") from error

        return await asyncio.get_running_loop().run_in_executor(self._thread, in_transaction)

    def _open(self) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            db = sqlite3.connect(self._path, timeout=2.0, check_same_thread=False)
        except (OSError, sqlite3.Error) as error:
            raise StoreError(
                f"cache.path: cannot open {self._path}: {error}; name a file that can be written"
            ) from error
        try:
            self._prepare(db)
        except sqlite3.DatabaseError as error:
            db.close()
            raise StoreError(f"cache.path: {self._path} {_diagnosis(error)} ({error})") from error
        except StoreError:
            db.close()
            raise
        self._db = db

    def _prepare(self, db: sqlite3.Connection) -> None:
        db.execute("PRAGMA locking_mode = EXCLUSIVE")
        owner = db.execute("PRAGMA application_id").fetchone()[0]
        has_tables = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] > 0
        if has_tables and owner != self._APPLICATION_ID:
            raise StoreError(f"cache.path: {self._path} is a database of another program; name another file")
        if has_tables and db.execute("PRAGMA user_version").fetchone()[0] != self._SCHEMA:
            raise StoreError(f"cache.path: {self._path} was written by another version of Millrace; delete it")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        if (verdict := db.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            raise sqlite3.DatabaseError(verdict)
        with db:
            db.execute(f"PRAGMA application_id = {self._APPLICATION_ID}")
            db.execute(f"PRAGMA user_version = {self._SCHEMA}")
            db.execute(
                "CREATE TABLE IF NOT EXISTS entries (key TEXT PRIMARY KEY, version TEXT NOT NULL, "
                "record TEXT NOT NULL, vector BLOB, expires_at REAL NOT NULL, last_used REAL NOT NULL)"
            )


def _diagnosis(error: sqlite3.DatabaseError) -> str:
    if "locked" in str(error) or "busy" in str(error):
        return "is in use by another process: stop that one, or give each its own file, or use Redis"
    if isinstance(error, sqlite3.OperationalError):
        return "cannot be used: check its folder's permissions and free space"
    return "is damaged or no database: move it away or delete it, it holds only cached answers"


class RedisStore:
    """Entries as hashes with a time to live, and a stream as change log that other replicas follow.

    Keys, all under `{namespace}:` (one cluster slot): `entry:<key>` hash of version, record, vector; `used` sorted set
    of keys by last use; `log` stream of changes. A command fails within `timeout_s`; after one that Redis did not
    answer all others fail at once until the follower reaches it again, so nothing piles up behind a lost server.
    """

    is_shared = True
    _LOG_LENGTH = 10_000
    _BLOCK_MS = 500
    _BATCH = 256

    # Compare and delete; the log tells the others. A hash that expired by itself leaves its place in `used`.
    _DELETE = """
    local version = redis.call('HGET', KEYS[1], 'version')
    if version and version ~= ARGV[2] then return 0 end
    redis.call('DEL', KEYS[1])
    redis.call('ZREM', KEYS[2], ARGV[1])
    if version then
        redis.call('XADD', KEYS[3], 'MAXLEN', '~', ARGV[3], '*', 'kind', 'delete', 'key', ARGV[1], 'version', version)
    end
    return 1
    """

    def __init__(self, url: str, namespace: str = "millrace-cache", timeout_s: float = 0.25) -> None:
        self._prefix = "{" + namespace + "}:"
        self._used = self._prefix + "used"
        self._log = self._prefix + "log"
        self._timeout_s = timeout_s
        self._position: bytes | None = None  # the last change seen; None: lost track
        self._is_up = False
        try:
            # Any: the library's own types differ from release to release; replies are bytes.
            self._redis: Any = _connect(url, timeout_s)
            self._follower: Any = _connect(url, timeout_s)
        except ValueError as error:
            raise StoreError(f"cache.redis_url: {error}") from error

    @property
    def is_up(self) -> bool:
        return self._is_up

    async def start(self) -> None:
        """A Redis that is down now is no error: the follower finds it later."""
        try:
            await self._attempt(self._mark())
        except StoreUnavailable as error:
            logger.warning("cache starts without its store: %s", error.message)

    async def load(self, now_s: float) -> list[Entry]:
        self._refuse_if_down()
        keys: list[tuple[bytes, float]] = []
        cursor = 0
        while True:  # in pages, each soon answered, however many entries there are
            scan = self._redis.zscan(self._used, cursor, count=_SCAN_PAGE)
            cursor, page = await self._attempt(scan, _LOAD_TIMEOUT_S)
            keys += page
            if cursor == 0:
                break
        # A scan may bring a key twice while the set grows.
        ordered = sorted(dict(keys).items(), key=lambda pair: pair[1])
        entries: list[Entry] = []
        for start in range(0, len(ordered), _LOAD_BATCH):
            entries += await self._load_batch(ordered[start : start + _LOAD_BATCH], now_s)
        return entries

    async def get(self, key: str) -> Entry | None:
        self._refuse_if_down()
        fields = await self._attempt(self._redis.hgetall(self._entry(key)))
        return _from_hash(key, fields, time.time())

    async def put(self, entry: Entry) -> None:
        self._refuse_if_down()
        record, vector = _encode(entry)
        fields = {"version": entry.version, "record": record, "vector": vector or b""}
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.delete(self._entry(entry.key))
            pipe.hset(self._entry(entry.key), mapping=fields)
            pipe.pexpire(self._entry(entry.key), max(1, int(1000 * (entry.expires_at - entry.created_at))))
            pipe.zadd(self._used, {entry.key: entry.last_used})
            self._note(pipe, "put", entry.key, entry.version)
            await self._attempt(pipe.execute())

    async def delete(self, versions: Mapping[str, str]) -> None:
        self._refuse_if_down()
        items = list(versions.items())
        for start in range(0, len(items), self._BATCH):
            async with self._redis.pipeline(transaction=False) as pipe:
                for key, version in items[start : start + self._BATCH]:
                    pipe.eval(self._DELETE, 3, self._entry(key), self._used, self._log, key, version, self._LOG_LENGTH)
                await self._attempt(pipe.execute())

    async def touch(self, last_used: Mapping[str, float]) -> None:
        self._refuse_if_down()
        await self._attempt(self._redis.zadd(self._used, dict(last_used), xx=True))

    async def follow(self) -> AsyncIterator[Change]:
        pause_s = 0.05
        while True:
            try:
                if self._position is None:
                    await self._mark()
                    changes = [Change("resync")]
                else:
                    changes = await self._read_log(self._position)
                self._set_up(True)
                pause_s = 0.05
            except (RedisError, OSError, TimeoutError) as error:
                self._set_up(False, error)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, 1.0)
                continue
            for change in changes:
                yield change

    async def close(self) -> None:
        await self._redis.aclose()
        await self._follower.aclose()

    async def _mark(self) -> None:
        """Begin to follow here, at an entry of our own: should it vanish from the log, changes were missed."""
        async with asyncio.timeout(self._timeout_s):
            try:
                self._position = await self._follower.xadd(
                    self._log, {"kind": "mark"}, maxlen=self._LOG_LENGTH, approximate=True
                )
            except ResponseError:  # full or read-only: what is there can still be read
                newest = await self._follower.xrevrange(self._log, count=1)
                if not newest:
                    raise
                self._position = newest[0][0]
        self._set_up(True)

    async def _read_log(self, position: bytes) -> list[Change]:
        async with asyncio.timeout(self._timeout_s + self._BLOCK_MS / 1000):
            answer = await self._follower.xread({self._log: position}, count=self._BATCH, block=self._BLOCK_MS)
            is_intact = await self._follower.xrange(self._log, position, position, count=1)
        if not is_intact:  # trimmed past us, or flushed
            self._position = None
            return []
        rows = [row for _, batch in answer or () for row in batch]
        if rows:
            self._position = rows[-1][0]
        return [change for _, fields in rows if (change := _to_change(fields)) is not None]

    async def _load_batch(self, keys: Sequence[tuple[bytes, float]], now_s: float) -> list[Entry]:
        async with self._redis.pipeline(transaction=False) as pipe:
            for key, _ in keys:
                pipe.hgetall(self._entry(key.decode()))
            found = await self._attempt(pipe.execute(), _LOAD_TIMEOUT_S)
        entries: list[Entry] = []
        gone: list[bytes] = []
        for (key, used), fields in zip(keys, found, strict=True):
            entry = _from_hash(key.decode(), fields, used)
            if entry is None:
                gone.append(key)
            elif entry.expires_at > now_s:
                entries.append(entry)
        if gone:
            await self._attempt(self._redis.zrem(self._used, *gone))
        return entries

    def _note(self, pipe: Any, kind: str, key: str, version: str) -> None:
        pipe.xadd(self._log, {"kind": kind, "key": key, "version": version}, maxlen=self._LOG_LENGTH, approximate=True)

    def _entry(self, key: str) -> str:
        return f"{self._prefix}entry:{key}"

    async def _attempt(self, operation: Awaitable[T], timeout_s: float | None = None) -> T:
        try:
            async with asyncio.timeout(timeout_s or self._timeout_s):
                return await operation
        except ResponseError as error:  # it answers, and refuses: full, read-only
            raise StoreUnavailable(f"Redis refuses: {error}") from error
        except (RedisError, OSError, TimeoutError) as error:
            self._set_up(False, error)
            raise StoreUnavailable(f"Redis does not answer: {error or 'timeout'}") from error

    def _refuse_if_down(self) -> None:
        if not self._is_up:
            raise StoreUnavailable("Redis is out of reach")

    def _set_up(self, is_up: bool, error: BaseException | None = None) -> None:
        if is_up != self._is_up:
            self._is_up = is_up
            if is_up:
                logger.info("cache store: Redis answers")
            else:
                logger.warning("cache store: Redis is lost, lookups go on without it: %s", error or "timeout")


def _connect(url: str, timeout_s: float) -> Any:
    pool = aioredis.BlockingConnectionPool.from_url(
        url,
        max_connections=_MAX_CONNECTIONS,
        timeout=None,  # to wait for a free connection: our own limit on the whole operation ends that, too
        # No `socket_timeout`: the client would send through `asyncio.wait_for`, which before Python 3.12 may swallow
        # a cancellation, and then a follower that was told to end goes on for good.
        socket_timeout=None,
        socket_connect_timeout=timeout_s,
        retry=Retry(NoBackoff(), 0),
        protocol=2,
        health_check_interval=0,
    )
    return aioredis.Redis.from_pool(pool)


def _encode(entry: Entry) -> tuple[str, bytes | None]:
    """JSON (ASCII, so that any string survives) and the vector as little-endian float32."""
    record = {
        "partition": entry.partition,
        "text": entry.text,
        "answer": asdict(entry.answer),
        "embedder": entry.embedder,
        "created_at": entry.created_at,
        "expires_at": entry.expires_at,
    }
    return json.dumps(record), None if entry.embedding is None else entry.embedding.astype("<f4").tobytes()


def _decode(key: str, version: str, record: str | bytes, vector: bytes | None, last_used: float) -> Entry | None:
    """None, and a line in the log, for a record that is not ours."""
    try:
        fields = json.loads(record)
        embedding = np.frombuffer(vector, "<f4").astype(np.float32) if vector else None
        answer = CachedAnswer(**fields.pop("answer"))
        return Entry(key=key, version=version, answer=answer, embedding=embedding, last_used=last_used, **fields)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        logger.warning("cache store: entry %s is unreadable and ignored: %s", key, error)
        return None


def _from_hash(key: str, fields: Mapping[bytes, bytes], last_used: float) -> Entry | None:
    if not fields:
        return None
    version = fields.get(b"version", b"").decode(errors="replace")
    return _decode(key, version, fields.get(b"record", b""), fields.get(b"vector"), last_used)


def _to_change(fields: Mapping[bytes, bytes]) -> Change | None:
    kind = fields.get(b"kind", b"")
    key, version = fields.get(b"key", b"").decode(), fields.get(b"version", b"").decode()
    if kind == b"put":
        return Change("put", key, version)
    if kind == b"delete":
        return Change("delete", key, version)
    return None
