"""How many requests the gateway holds at once: a bounded number in work, a bounded queue behind it, then 429.

One event loop owns it; there are no locks because nothing is awaited between reading and changing a count.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from replicas.types import Overloaded

MAX_RETRY_AFTER_S = 60.0
SMOOTHING = 0.1
"""Weight of the newest request in the running mean of how long one holds its place."""


class Permit:
    """The right to be in work. Releasing twice is releasing once."""

    __slots__ = ("_admission", "_since")

    def __init__(self, admission: Admission, since: float) -> None:
        self._admission: Admission | None = admission
        self._since = since

    def release(self) -> None:
        if self._admission is not None:
            admission, self._admission = self._admission, None
            admission._give_back(self._since)


class Admission:
    """First come, first served. `num_running` ≤ `max_concurrent` and `num_waiting` ≤ `max_queued`, always."""

    def __init__(
        self,
        max_concurrent: int,
        max_queued: int,
        clock: Callable[[], float],
        on_refusal: Callable[[], None] = lambda: None,
    ) -> None:
        assert max_concurrent > 0, "a gateway that runs nothing"
        assert max_queued >= 0, "a queue of negative length"
        self._max_concurrent = max_concurrent
        self._max_queued = max_queued
        self._clock = clock
        self._on_refusal = on_refusal
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._mean_hold_s = 1.0
        self.num_running = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    async def acquire(self) -> Permit:
        """Raises `Overloaded` at once where the queue is full. Cancelling the wait leaves the queue."""
        self.check()
        if self.num_running < self._max_concurrent and not self._waiting:
            self.num_running += 1
            return Permit(self, self._clock())
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # the place was handed over in the moment of the cancel
                self._hand_over()
            elif turn in self._waiting:  # or a release has already passed over it
                self._waiting.remove(turn)
            raise
        return Permit(self, self._clock())

    def check(self) -> None:
        """Raises `Overloaded` where `acquire` would: to refuse before a body is read."""
        if self.num_running >= self._max_concurrent and len(self._waiting) >= self._max_queued:
            queue_s = self._mean_hold_s * (len(self._waiting) + 1) / self._max_concurrent
            self._on_refusal()
            retry_after_s = min(MAX_RETRY_AFTER_S, max(1.0, queue_s))
            raise Overloaded("The gateway's queue is full. Retry after the time the header says.", retry_after_s)

    def _give_back(self, since: float) -> None:
        self._mean_hold_s += SMOOTHING * (self._clock() - since - self._mean_hold_s)
        self._hand_over()

    def _hand_over(self) -> None:
        """The place passes straight to the longest waiter, so no newcomer can slip in between."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self.num_running -= 1
