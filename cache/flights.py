"""Single flight: of identical questions asked at the same time one is answered by a model, the others wait for it.

Knows keys, not questions. Per key there is at most one leader at any time; a leader holds a lease, and when it
abandons or the lease runs out unrenewed exactly one waiter takes over. Belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from cache.types import CacheHit


@dataclass(slots=True, eq=False)
class _Waiter:
    outcome: asyncio.Future[str | CacheHit | None]
    accepts: Callable[[CacheHit], bool]
    can_lead: bool


@dataclass(slots=True, eq=False)
class _Flight:
    token: str
    lease: asyncio.TimerHandle
    waiters: deque[_Waiter] = field(default_factory=deque)


class Flights:
    def __init__(self, lease_s: float) -> None:
        assert lease_s > 0, "a lease must have a duration"
        self._lease_s = lease_s
        self._flights: dict[str, _Flight] = {}
        self._key_of: dict[str, str] = {}  # token of each current leader -> key

    def __len__(self) -> int:
        return len(self._flights)

    @property
    def num_waiters(self) -> int:
        return sum(len(flight.waiters) for flight in self._flights.values())

    def leads(self, token: str) -> bool:
        return token in self._key_of

    def lead(self, key: str) -> str | None:
        """A token of leadership, or None where another leads."""
        if key in self._flights:
            return None
        token = self._mint(key)
        self._flights[key] = _Flight(token, self._start_lease(token))
        return token

    async def join(self, key: str, accepts: Callable[[CacheHit], bool], can_lead: bool) -> str | CacheHit | None:
        """The answer of the flight under way, a token where the caller leads now, or None: go on alone.

        `accepts` says whether this caller takes a given answer (its age). Waits for as long as somebody leads: an
        answer under way comes sooner than one begun now.
        """
        flight = self._flights.get(key)
        if flight is None:
            return self.lead(key) if can_lead else None
        waiter = _Waiter(asyncio.get_running_loop().create_future(), accepts, can_lead)
        flight.waiters.append(waiter)
        try:
            return await self._await(waiter)
        finally:
            if waiter in flight.waiters:
                flight.waiters.remove(waiter)

    def renew(self, token: str) -> None:
        """Start the lease anew. Unknown and outdated tokens are ignored."""
        key = self._key_of.get(token)
        if key is not None:
            flight = self._flights[key]
            flight.lease.cancel()
            flight.lease = self._start_lease(token)

    def announce(self, key: str, hit: CacheHit) -> None:
        """Give the answer to all who wait and accept it; the flight stays open for those still to come."""
        flight = self._flights.get(key)
        if flight is None:
            return
        refused: deque[_Waiter] = deque()
        for waiter in flight.waiters:
            if waiter.outcome.done():
                continue
            if waiter.accepts(hit):
                waiter.outcome.set_result(hit)
            else:
                refused.append(waiter)
        flight.waiters = refused

    def settle(self, key: str, token: str | None, hit: CacheHit) -> None:
        """Announce, and end the flight if `token` leads it; who does not accept the answer takes over."""
        self.announce(key, hit)
        if token is not None:
            self.abandon(token)

    def abandon(self, token: str) -> None:
        """The leader gives up: the next waiter leads. Unknown and outdated tokens are ignored."""
        key = self._key_of.pop(token, None)
        if key is None:
            return
        flight = self._flights[key]
        flight.lease.cancel()
        heir = self._pop_heir(flight)
        if heir is None:
            del self._flights[key]
            for waiter in flight.waiters:
                if not waiter.outcome.done():
                    waiter.outcome.set_result(None)
            return
        flight.token = self._mint(key)
        flight.lease = self._start_lease(flight.token)
        heir.outcome.set_result(flight.token)

    def close(self) -> None:
        """End every flight; all who wait go on alone."""
        for flight in self._flights.values():
            flight.lease.cancel()
            for waiter in flight.waiters:
                if not waiter.outcome.done():
                    waiter.outcome.set_result(None)
        self._flights.clear()
        self._key_of.clear()

    async def _await(self, waiter: _Waiter) -> str | CacheHit | None:
        try:
            return await waiter.outcome
        except asyncio.CancelledError:
            # Leadership may have been handed over in the same tick: it must not leave with this waiter.
            if waiter.outcome.done() and not waiter.outcome.cancelled():
                outcome = waiter.outcome.result()
                if isinstance(outcome, str):
                    self.abandon(outcome)
            raise

    def _pop_heir(self, flight: _Flight) -> _Waiter | None:
        for waiter in flight.waiters:
            if waiter.can_lead and not waiter.outcome.done():
                flight.waiters.remove(waiter)
                return waiter
        return None

    def _mint(self, key: str) -> str:
        token = uuid.uuid4().hex
        self._key_of[token] = key
        return token

    def _start_lease(self, token: str) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(self._lease_s, self.abandon, token)
