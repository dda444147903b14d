"""An answer on its way to the client: the gateway's decision, the chunks of all choices, and what they came to.

Knows no HTTP and no cache; whoever makes an `Answer` is told once when it is over, however it ended.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

from replicas.types import Chunk, Usage
from router.catalog import Price
from router.cost import cost_usd, total_usage
from router.failover import close
from router.merging import IndexedChunk
from router.metrics import AnswerClock

CacheOutcome = Literal["hit-exact", "hit-semantic", "miss", "bypass"]


@dataclass(frozen=True, slots=True)
class Decision:
    """What the gateway decided before the first byte; the response headers tell the client."""

    model: str
    reason: str
    cache: CacheOutcome
    cost_usd: float | None
    """Predicted, or 0 for a cached answer; None: the model has no price."""


class Choice:
    """One of the `n` answers, as far as it has come. `text` is kept only where it will be stored."""

    __slots__ = ("_parts", "clock", "finish_reason", "last_usage", "num_tokens", "stop_reason")

    def __init__(self, clock: AnswerClock | None, keeps_text: bool) -> None:
        self._parts: list[str] | None = [] if keeps_text else None
        self.clock = clock
        self.num_tokens = 0
        self.last_usage: Usage | None = None
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None

    @property
    def text(self) -> str:
        assert self._parts is not None, "the text of this choice was not kept"
        return "".join(self._parts)

    @property
    def usage(self) -> Usage:
        """Exact once finished; before, what was forwarded so far."""
        known = self.last_usage or Usage(0, 0, 0)
        if self.finish_reason is not None:
            return known
        return Usage(
            known.num_prompt_tokens, known.num_cached_tokens, max(known.num_completion_tokens, self.num_tokens)
        )

    def note(self, chunk: Chunk, now_s: float) -> None:
        self.num_tokens += len(chunk.token_ids)
        if self._parts is not None:
            self._parts.append(chunk.text)
        if chunk.usage is not None:
            self.last_usage = chunk.usage
        if chunk.finish_reason is not None:
            self.finish_reason, self.stop_reason = chunk.finish_reason, chunk.stop_reason
        if self.clock is not None:
            self.clock.note_chunk(now_s)


class Answer:
    """Iterate it once for `(choice index, chunk)`; then, and whenever iteration stops early, await `aclose()`.

    `awaiting()` is entered for as long as the next chunk is waited for, and never while the client is.

    Not a generator: closing one that was never started runs none of its code, and an answer whose client left before
    the first byte still has streams to abort and a flight to abandon.
    """

    def __init__(
        self,
        decision: Decision,
        first: IndexedChunk,
        rest: AsyncIterator[IndexedChunk],
        *,
        choices: list[Choice],
        num_siblings: int,
        price: Price | None,
        clock: Callable[[], float],
        awaiting: Callable[[], AbstractContextManager[None]],
        on_end: Callable[[Answer], None],
    ) -> None:
        self.decision = decision
        self.choices = choices
        self._num_siblings = num_siblings
        self._price = price
        self._clock = clock
        self._awaiting = awaiting
        self._on_end = on_end
        self._num_open = len(choices)
        self._is_over = False
        self._rest = rest
        self._first: IndexedChunk | None = first
        self._note(first)

    @property
    def is_complete(self) -> bool:
        """Every choice has its finish reason."""
        return self._num_open == 0

    @property
    def usage(self) -> Usage:
        n = self._num_siblings
        usages = [choice.usage for choice in self.choices]
        return total_usage([usages[start : start + n] for start in range(0, len(usages), n)])

    @property
    def cost_usd(self) -> float | None:
        """Exact once complete; a cached answer costs nothing."""
        if self.decision.cache in ("hit-exact", "hit-semantic"):
            return 0.0
        return cost_usd(self._price, self.usage)

    def __aiter__(self) -> Answer:
        return self

    async def __anext__(self) -> IndexedChunk:
        if self._first is not None:
            item, self._first = self._first, None
            return item
        with self._awaiting():
            item = await anext(self._rest)
        self._note(item)
        return item

    async def aclose(self) -> None:
        """Aborts what still runs. Closing twice is closing once."""
        try:
            await close(self._rest)
        finally:
            self._end()

    def _note(self, item: IndexedChunk) -> None:
        index, chunk = item
        self.choices[index].note(chunk, self._clock())
        if chunk.finish_reason is not None:
            self._num_open -= 1
            if self.is_complete:
                self._end()

    def _end(self) -> None:
        if not self._is_over:
            self._is_over = True
            self._on_end(self)
