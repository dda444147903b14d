"""Outputs on their way out of the step thread: which may wait for company.

What a chunk costs on its way to the client is paid in processor time that the next steps lack, so tokens drawn within a
few milliseconds travel together. The first tokens of an answer and its end never wait. Knows no threads and no streams.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from replicas.engine.scheduler import RequestOutput


class Outbox:
    """Asked once per step. An output waits while the next step will, by the pace of the last one, be over before the
    output has waited for `max_hold_s`."""

    def __init__(self, max_hold_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_hold_s = max_hold_s
        self._clock = clock
        self._outputs: list[RequestOutput] = []
        self._begun: set[str] = set()
        self._is_urgent = False
        self._oldest_s = self._last_asked_s = clock()

    def put(self, outputs: Iterable[RequestOutput]) -> None:
        """In the order of the steps; each request's last output has a `finish`."""
        for output in outputs:
            if not self._outputs:
                self._oldest_s = self._clock()
            self._outputs.append(output)
            if output.finish is not None:
                self._begun.discard(output.request_id)
                self._is_urgent = True
            elif output.request_id not in self._begun:
                self._begun.add(output.request_id)
                self._is_urgent = True

    def take_due(self) -> list[RequestOutput]:
        """Everything, if something of it must leave now, else nothing."""
        now_s = self._clock()
        pace_s, self._last_asked_s = now_s - self._last_asked_s, now_s
        is_due = self._is_urgent or now_s + pace_s - self._oldest_s > self._max_hold_s
        return self.take_all() if is_due else []

    def take_all(self) -> list[RequestOutput]:
        outputs, self._outputs, self._is_urgent = self._outputs, [], False
        return outputs
