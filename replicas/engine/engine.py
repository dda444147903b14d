"""One model copy's step: schedule, execute, update. Synchronous, single-threaded, without text and without clients.

`AsyncEngine` runs it in a thread. A failure stays as small as it is: a row's own error ends that request, a step that
raises ends the requests in it, and the engine goes on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from replicas.engine.batch import build_batch
from replicas.engine.block_manager import BlockManager
from replicas.engine.config import EngineConfig
from replicas.engine.executor import Executor
from replicas.engine.request import Request
from replicas.engine.scheduler import RequestOutput, Scheduler, SchedulerCounters

logger = logging.getLogger(__name__)


class SamplingDefaults(Protocol):
    """What the model's authors recommend; None where they say nothing."""

    @property
    def temperature(self) -> float | None: ...
    @property
    def top_p(self) -> float | None: ...
    @property
    def top_k(self) -> int | None: ...
    @property
    def repetition_penalty(self) -> float | None: ...


class ModelFacts(Protocol):
    """What the engine must know of a model; `models.loader.ModelInfo` has it."""

    @property
    def max_model_len(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def eos_token_ids(self) -> frozenset[int]: ...
    @property
    def sampling_defaults(self) -> SamplingDefaults: ...


@dataclass(frozen=True, slots=True)
class EngineStats:
    num_running: int
    num_waiting: int
    num_blocks: int
    num_free_blocks: int
    counters: SchedulerCounters
    is_intact: bool
    last_beat_s: float
    """`time.monotonic()` of the last sign of life of the step loop."""


class Engine:
    """Only the thread that calls `start` may call the rest, but for `info`, the two checks and `stats`."""

    def __init__(self, config: EngineConfig, info: ModelFacts, executor: Executor) -> None:
        self.info = info
        self.executor = executor
        self._config = config
        self._started: tuple[Scheduler, BlockManager] | None = None
        self._is_intact = True
        self._is_checked = True
        self._last_beat_s = time.monotonic()

    def start(self) -> None:
        """Load the model and reserve the KV cache. Raises ValueError with one clear sentence where that fails."""
        num_blocks = self.executor.start()
        cache = self._config.cache
        blocks = BlockManager(num_blocks, cache.block_size, cache.enable_prefix_caching)
        self._started = Scheduler(self._config.scheduler, blocks, self.info.max_model_len), blocks
        self.beat()

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    @property
    def max_model_len(self) -> int:
        """The model's context, or the tokens that the KV cache holds if those are fewer."""
        return self._scheduler.max_model_len

    def check(self, request: Request) -> None:
        """Refuse what can never run. Raises PromptTooLong or InvalidRequest."""
        self._scheduler.check(request)

    def check_queue(self, num_arriving: int, is_resumed: bool) -> None:
        """Raises Overloaded where the queue is full, `num_arriving` being requests not yet added."""
        self._scheduler.check_queue(num_arriving, is_resumed)

    def add(self, request: Request) -> None:
        """Queue a request; raises what `check` and `check_queue` raise."""
        self._scheduler.add(request)

    def abort(self, request_id: str) -> None:
        """End a request in any state; ids that are gone are ignored."""
        self._scheduler.abort(request_id)

    def step(self, before_execution: Callable[[int], None] = lambda num_tokens: None) -> list[RequestOutput]:
        """Everything that happened to requests in this step, ends included. Raises nothing that one request causes.

        `before_execution(num_tokens)` is called once all is prepared: what it sets off runs beside the executor."""
        self.beat()
        scheduled = self._scheduler.schedule()
        if not scheduled:
            return self._scheduler.take_aborted()
        self._is_checked = False
        try:
            batch = build_batch(scheduled, self._config.cache.block_size)
            before_execution(len(batch.token_ids))
            return self._scheduler.update(scheduled, batch, self.executor.execute(batch))
        except Exception as error:
            logger.exception("a step of %d requests failed", len(scheduled))
            return self._scheduler.fail(scheduled, f"the engine failed in a step of this request: {error}")

    def beat(self) -> None:
        """A sign of life; a step gives one by itself."""
        self._last_beat_s = time.monotonic()

    def check_integrity(self) -> None:
        """For idle moments: account for every block. A leak is logged and shown in the stats, never a crash."""
        if self._is_checked:
            return
        self._is_checked = True
        try:
            self._scheduler.check_integrity()
        except AssertionError as error:
            self._is_intact = False
            logger.error("the block manager lost its integrity: %s", error)
        else:
            self._is_intact = True

    def stats(self) -> EngineStats:
        """A reading from any thread; its figures may be one step apart."""
        scheduler = self._scheduler
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_blocks=self._blocks.num_blocks,
            num_free_blocks=self._blocks.num_free_blocks,
            counters=scheduler.counters,
            is_intact=self._is_intact,
            last_beat_s=self._last_beat_s,
        )

    def shutdown(self) -> None:
        self.executor.shutdown()

    @property
    def _scheduler(self) -> Scheduler:
        assert self._started is not None, "the engine is not started"
        return self._started[0]

    @property
    def _blocks(self) -> BlockManager:
        assert self._started is not None, "the engine is not started"
        return self._started[1]
