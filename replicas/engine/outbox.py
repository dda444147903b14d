"""Outputs on their way out of the step thread: which may wait for company.

What a chunk costs on its way to the client is paid in processor time that the next steps lack, so tokens drawn within a
few milliseconds travel together. The first tokens of an answer and its end never wait, nor does a request that is in a
hurry. Knows no threads and no streams.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from replicas.engine.scheduler import RequestOutput


class Outbox:
    """Asked before each step. An output waits while that step has no more tokens than the last one and will, at the
    last one's pace, be over before the output has waited for `max_hold_s`."""

    def __init__(self, max_hold_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_hold_s = max_hold_s
        self._clock = clock
        self._outputs: list[RequestOutput] = []
        self._begun: set[str] = set()
        self._hurried: set[str] = set()
        self._is_urgent = False
        self._oldest_s = self._last_asked_s = clock()
        self._last_num_tokens = 0

    def hurry(self, request_id: str) -> None:
        """None of this request's outputs will wait: its end may be seen only where its text is."""
        self._hurried.add(request_id)

    def put(self, outputs: Iterable[RequestOutput]) -> None:
        """In the order of the steps; each request's last output has a `finish`."""
        for output in outputs:
            if not self._outputs:
                self._oldest_s = self._clock()
            self._outputs.append(output)
            request_id = output.request_id
            self._is_urgent |= output.finish is not None or request_id in self._hurried or request_id not in self._begun
            if output.finish is None:
                self._begun.add(request_id)
            else:
                self._begun.discard(request_id)
                self._hurried.discard(request_id)

    def take_due(self, num_tokens: int) -> list[RequestOutput]:
        """Everything, if something of it must leave before a step of `num_tokens` tokens, else nothing."""
        now_s = self._clock()
        pace_s, self._last_asked_s = now_s - self._last_asked_s, now_s
        is_longer, self._last_num_tokens = num_tokens > self._last_num_tokens, num_tokens
        is_due = self._is_urgent or is_longer or now_s + pace_s - self._oldest_s > self._max_hold_s
        return self.take_all() if is_due else []

    def take_all(self) -> list[RequestOutput]:
        outputs, self._outputs, self._is_urgent = self._outputs, [], False
        return outputs
