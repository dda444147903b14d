"""The entries that one process holds, and their vectors: lookup tables, order of use, byte count, expiry. No I/O.

Decides nothing about answers and knows no store; `SemanticCache` owns one and keeps the store in step with it.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from cache.index import VectorIndex
from cache.store import Entry


@dataclass(frozen=True, slots=True)
class _Record:
    entry: Entry
    """Without its embedding, which the index holds."""
    id: int | None
    """In the index; None: only an exact match finds it."""
    size_bytes: int


class Entries:
    def __init__(self, index: VectorIndex, embedder: str, max_entries: int, max_bytes: int) -> None:
        """Only vectors that `embedder` made are indexed."""
        self._index = index
        self._embedder = embedder
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._records: OrderedDict[str, _Record] = OrderedDict()  # least recently used first
        self._key_of: dict[int, str] = {}
        self._next_id = 0
        self._expiries: list[tuple[float, str, str]] = []  # heap of (expires_at, key, version); some are outdated
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, key: str) -> bool:
        return key in self._records

    def get(self, key: str) -> Entry | None:
        record = self._records.get(key)
        return None if record is None else record.entry

    def at(self, id: int) -> Entry | None:
        """The entry of an id that the index found; None: gone since."""
        return self.get(self._key_of.get(id, ""))

    def version(self, key: str) -> str | None:
        record = self._records.get(key)
        return None if record is None else record.entry.version

    def versions(self) -> dict[str, str]:
        return {key: record.entry.version for key, record in self._records.items()}

    def mark_used(self, key: str) -> None:
        self._records.move_to_end(key)

    def insert(self, entry: Entry) -> None:
        """Add or replace, as the most recently used."""
        self.drop([entry.key])
        id = None
        vector = entry.embedding
        if vector is not None and entry.embedder == self._embedder and vector.shape == (self._index.dim,):
            id = self._next_id
            self._next_id += 1
            self._index.add(id, entry.partition, vector)
            self._key_of[id] = entry.key
        self._records[entry.key] = _Record(replace(entry, embedding=None), id, entry.size_bytes)
        self.num_bytes += entry.size_bytes
        heapq.heappush(self._expiries, (entry.expires_at, entry.key, entry.version))
        self._prune_expiries()

    def drop(self, keys: Iterable[str]) -> None:
        ids: list[int] = []
        for key in keys:
            record = self._records.pop(key, None)
            if record is None:
                continue
            self.num_bytes -= record.size_bytes
            if record.id is not None:
                del self._key_of[record.id]
                ids.append(record.id)
        if ids:
            self._index.remove(ids)

    def evict(self) -> Mapping[str, str]:
        """Down to the bounds, the least recently used first; 1 % further, so that a full cache pays once per batch.

        Returns the versions of the keys that left.
        """
        if len(self._records) <= self._max_entries and self.num_bytes <= self._max_bytes:
            return {}
        max_entries = self._max_entries - self._max_entries // 100
        max_bytes = self._max_bytes - self._max_bytes // 100
        left: dict[str, str] = {}
        num_bytes = self.num_bytes
        for key, record in self._records.items():
            if len(self._records) - len(left) <= max_entries and num_bytes <= max_bytes:
                break
            left[key] = record.entry.version
            num_bytes -= record.size_bytes
        self.drop(left)
        return left

    def expire(self, now_s: float) -> Mapping[str, str]:
        """Remove what has expired; returns the versions of the keys that left."""
        left: dict[str, str] = {}
        while self._expiries and self._expiries[0][0] <= now_s:
            _, key, version = heapq.heappop(self._expiries)
            if self.version(key) == version:
                left[key] = version
        self.drop(left)
        return left

    def check_integrity(self) -> None:
        indexed = {record.id for record in self._records.values() if record.id is not None}
        assert indexed == self._index.ids() == set(self._key_of), "entries and index disagree"
        assert all(self._records[key].id == id for id, key in self._key_of.items()), "ids point to other entries"
        total = sum(record.size_bytes for record in self._records.values())
        assert total == self.num_bytes, f"{total} bytes held, {self.num_bytes} accounted"
        pending = {(key, version) for _, key, version in self._expiries}
        assert pending >= set(self.versions().items()), "an entry would never expire"

    def check_bounds(self) -> None:
        assert len(self._records) <= self._max_entries, "more entries than allowed"
        assert self.num_bytes <= self._max_bytes, "more bytes than allowed"

    def _prune_expiries(self) -> None:
        """Evicted and replaced entries leave their dates behind: clear them before they outnumber the living."""
        if len(self._expiries) > 2 * len(self._records) + 64:
            self._expiries = [item for item in self._expiries if self.version(item[1]) == item[2]]
            heapq.heapify(self._expiries)
