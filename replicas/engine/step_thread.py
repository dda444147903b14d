"""The thread that steps an engine, and the two ways into and out of it.

    loop ── commands (one SimpleQueue) ──▶ thread           the thread sleeps on the queue when it has no work
    loop ◀── outputs (a call per step, or for several) ─ thread

Outputs leave when the next step is prepared, so that the loop passes them on while kernels run, which need no
interpreter; at once where no step follows. All torch work happens here, loading included. Knows no text and no streams.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from replicas.engine.engine import Engine
from replicas.engine.outbox import Outbox
from replicas.engine.request import Request
from replicas.engine.scheduler import RequestOutput
from replicas.types import EngineError, MillraceError, ReplicaUnavailable

logger = logging.getLogger(__name__)

Delivery = tuple[str, RequestOutput | MillraceError]
"""(request id, what became of it)"""


@dataclass(frozen=True, slots=True)
class _Add:
    request: Request


@dataclass(frozen=True, slots=True)
class _Abort:
    request_id: str


@dataclass(frozen=True, slots=True)
class _Stop:
    pass


class StepThread:
    """Public methods belong to the loop, which also runs `deliver` and, once the thread has ended, `end`."""

    def __init__(
        self,
        engine: Engine,
        outbox: Outbox,
        deliver: Callable[[list[Delivery]], None],
        end: Callable[[ReplicaUnavailable], None],
    ) -> None:
        self._engine = engine
        self._outbox = outbox
        self._deliver = deliver
        self._end = end
        self._commands: SimpleQueue[_Add | _Abort | _Stop] = SimpleQueue()
        # Written by one side each; the difference is what the thread has not seen yet.
        self._num_sent = 0
        self._num_received = 0
        self._thread: threading.Thread | None = None
        self._is_sleeping = False

    async def start(self) -> None:
        """Start the engine and begin to step. Raises what `Engine.start` raises."""
        assert self._thread is None, "an engine starts once"
        loop = asyncio.get_running_loop()
        started: asyncio.Future[None] = loop.create_future()
        self._thread = threading.Thread(target=self._run, args=(loop, started), name="engine", daemon=True)
        self._thread.start()
        await started

    async def stop(self) -> None:
        """End after the step in flight."""
        if self._thread is not None:
            self._commands.put(_Stop())
            await asyncio.to_thread(self._thread.join)

    def add(self, request: Request) -> None:
        self._num_sent += 1
        self._commands.put(_Add(request))

    def abort(self, request_id: str) -> None:
        self._commands.put(_Abort(request_id))

    @property
    def num_arriving(self) -> int:
        """Requests sent that the engine has not seen yet."""
        return self._num_sent - self._num_received

    def heartbeat_age_s(self, last_beat_s: float) -> float:
        """A thread that sleeps for want of work is well; one that died or hangs in a step grows old."""
        is_alive = self._thread is not None and self._thread.is_alive()
        return 0.0 if is_alive and self._is_sleeping else time.monotonic() - last_beat_s

    def _run(self, loop: asyncio.AbstractEventLoop, started: asyncio.Future[None]) -> None:
        try:
            self._engine.start()
        except BaseException as error:
            _call(loop, _settle, started, error)
            return
        _call(loop, _settle, started, None)
        end = ReplicaUnavailable("the replica is shut down")
        try:
            while self._obey(loop):
                self._outbox.put(
                    self._engine.step(lambda num_tokens: self._hand_over(loop, self._outbox.take_due(num_tokens)))
                )
        except BaseException:
            logger.exception("the step loop died")
            end = ReplicaUnavailable("the replica's step loop died")
        finally:
            self._hand_over(loop, self._outbox.take_all())
            self._engine.shutdown()
            _call(loop, self._end, end)

    def _hand_over(self, loop: asyncio.AbstractEventLoop, outputs: list[RequestOutput]) -> None:
        if outputs:
            _call(loop, self._deliver, [(output.request_id, output) for output in outputs])

    def _obey(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Carry out what was asked since the last step, sleeping while there is nothing to do; False: stop."""
        while True:
            try:
                command = self._commands.get_nowait()
            except Empty:
                if self._engine.has_work:
                    return True
                self._hand_over(loop, self._outbox.take_all())
                command = self._sleep()
            if isinstance(command, _Stop):
                return False
            if isinstance(command, _Abort):
                self._engine.abort(command.request_id)
            else:
                self._receive(command.request, loop)

    def _sleep(self) -> _Add | _Abort | _Stop:
        self._engine.check_integrity()
        self._is_sleeping = True
        command = self._commands.get()
        # In this order, or the age of a long sleep would show for a moment.
        self._engine.beat()
        self._is_sleeping = False
        return command

    def _receive(self, request: Request, loop: asyncio.AbstractEventLoop) -> None:
        self._num_received += 1
        try:
            self._engine.add(request)
            if request.sampling.stop:
                self._outbox.hurry(request.request_id)
        except MillraceError as error:
            _call(loop, self._deliver, [(request.request_id, error)])
        except Exception as error:
            logger.exception("request %s could not be added", request.request_id)
            _call(loop, self._deliver, [(request.request_id, EngineError(f"the engine cannot take it: {error}"))])


def _call(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *arguments: object) -> None:
    try:
        loop.call_soon_threadsafe(function, *arguments)
    except RuntimeError:
        # The loop was closed without `shutdown`: nobody is left to tell.
        logger.warning("the event loop closed before the engine stopped")


def _settle(started: asyncio.Future[None], error: BaseException | None) -> None:
    if started.done():
        return
    if error is None:
        started.set_result(None)
    else:
        started.set_exception(error)
