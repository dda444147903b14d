"""Which requests compute which tokens in the next step, under one token budget and the blocks there are.

No prefill phase and no decode phase: every request lacks some tokens and gets some of them, running requests first
(Sarathi-Serve's stall-free batching, in the form of vLLM V1's scheduler). When blocks run out the tail of the running
requests is preempted and recomputes later. Owns every Request; knows no tensors, no text and no clock.

    add ─▶ waiting ─▶ running ─▶ finished        abort is possible everywhere; while a step is in flight it marks,
                        │  ▲                     and the step's completion frees
                        ▼  │
                     preempted (admitted again before anything in `waiting`)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from replicas.engine.batch import Batch, Logprobs, Scheduled, StepOutput
from replicas.engine.block_manager import BlockManager
from replicas.engine.config import SchedulerConfig
from replicas.engine.request import Finish, Request, Status
from replicas.types import InvalidRequest, Overloaded, PromptTooLong


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What one step made of one request: tokens drawn (one log-probability each if wanted), and its end if it came."""

    request_id: str
    token_ids: tuple[int, ...]
    num_cached_tokens: int
    logprobs: tuple[Logprobs, ...] = ()
    finish: Finish | None = None


@dataclass(slots=True)
class SchedulerCounters:
    """Since the start. Prefix figures are in prompt tokens and count a request once, however often it is preempted."""

    num_preemptions: int = 0
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0


class Scheduler:
    def __init__(self, config: SchedulerConfig, blocks: BlockManager, max_model_len: int) -> None:
        self._config = config
        self._blocks = blocks
        self._model_len = max_model_len
        capacity = blocks.num_blocks * blocks.block_size
        self.max_model_len = min(max_model_len, capacity)
        """What one request can ever hold, prompt and answer: the model's context or, if smaller, the KV cache."""
        self._requests: dict[str, Request] = {}
        self._waiting: deque[Request] = deque()
        self._preempted: deque[Request] = deque()
        # In the order of admission: the tail came last and is preempted first.
        self._running: list[Request] = []
        self._in_flight: set[str] = set()
        self._aborted: list[RequestOutput] = []
        self.counters = SchedulerCounters()

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + len(self._preempted)

    @property
    def has_work(self) -> bool:
        return bool(self._requests or self._aborted)

    def check(self, request: Request) -> None:
        """Refuse what can never run. Reads constants only, so any thread may ask.

        Raises PromptTooLong, or InvalidRequest naming `prompt`, `max_tokens` or `n`."""
        num_prompt, limit = request.num_prompt_tokens, self.max_model_len
        max_tokens = request.sampling.max_tokens
        if num_prompt == 0:
            raise InvalidRequest("the prompt has no tokens; give it some text", "prompt")
        if num_prompt >= limit:
            raise PromptTooLong(
                f"the prompt has {num_prompt} tokens and {self._limit_text()}; at least one must be left for the "
                "answer, so shorten the prompt",
                "prompt",
            )
        if max_tokens is None:
            return
        if max_tokens < 1:
            raise InvalidRequest(f"max_tokens must be at least 1, not {max_tokens}", "max_tokens")
        if num_prompt + max_tokens > limit:
            raise InvalidRequest(
                f"the prompt's {num_prompt} tokens and max_tokens = {max_tokens} together exceed the limit: "
                f"{self._limit_text()}; ask for at most {limit - num_prompt}",
                "max_tokens",
            )
        self._check_siblings(request, max_tokens)

    def check_queue(self, num_arriving: int, is_resumed: bool) -> None:
        """Raises Overloaded when, with `num_arriving` more on their way, the waiting queue is full. A resumed request
        is always taken: its client is in the middle of an answer, for which it was admitted already."""
        if not is_resumed and len(self._waiting) + num_arriving >= self._config.max_queued_requests:
            raise Overloaded(f"{self._config.max_queued_requests} requests are waiting already; try again later")

    def add(self, request: Request) -> None:
        """Queue a request. Raises what `check` and `check_queue` raise; a refused request leaves no trace."""
        assert request.request_id not in self._requests, f"request {request.request_id} is here already"
        self.check(request)
        self.check_queue(0, is_resumed=request.num_output_tokens > 0)
        request.max_num_tokens = min(request.max_num_tokens, self.max_model_len)
        assert request.finish_after_last_token() is None, f"request {request.request_id} is finished already"
        self._requests[request.request_id] = request
        self._waiting.append(request)

    def abort(self, request_id: str) -> None:
        """End a request in whatever state; unknown or finished ones are ignored, for aborts may come late."""
        request = self._requests.get(request_id)
        if request is None:
            return
        if request_id in self._in_flight:
            request.is_abort_requested = True
        else:
            self._aborted.append(self._finish(request, Finish(Status.FINISHED_ABORTED)))

    def schedule(self) -> list[Scheduled]:
        """The next step's work; its requests are in flight until `update` or `fail` is called with it."""
        assert not self._in_flight, "the last step is still in flight"
        budget = self._config.max_num_batched_tokens
        scheduled, has_preempted = self._schedule_running(budget)
        if not has_preempted:
            scheduled += self._admit(budget - sum(item.num_new_tokens for item in scheduled))
        # Every request fits the cache alone, so the first one can always go on.
        assert scheduled or not self._requests, f"{len(self._requests)} requests and none can be scheduled"
        self._in_flight = {item.request.request_id for item in scheduled}
        return scheduled

    def update(self, scheduled: Sequence[Scheduled], batch: Batch, output: StepOutput) -> list[RequestOutput]:
        """Take in what a step computed: publish filled blocks, append drawn tokens, finish who is done.

        Raises ValueError, with nothing changed, where the output is not of this batch: `fail` then ends them all."""
        _check_output(batch, output)
        failed = {int(batch.sampled_requests[row]) for row in output.errors}
        for index, item in enumerate(scheduled):
            item.request.num_computed_tokens += item.num_new_tokens
            if index not in failed:  # what was stored for it may be as broken as its logits
                self._blocks.publish(item.request)
        outputs = []
        for row, index in enumerate(batch.sampled_requests.tolist()):
            request = scheduled[index].request
            if not request.is_abort_requested:
                outputs.append(self._update_row(request, row, output))
        self._finish_marked(scheduled)
        return outputs + self.take_aborted()

    def fail(self, scheduled: Sequence[Scheduled], error: str) -> list[RequestOutput]:
        """The step raised: its requests end here, and their blocks, whose contents are unknown, are not published."""
        outputs = [
            self._finish(item.request, Finish(Status.FINISHED_FAILED, error=error))
            for item in scheduled
            if not item.request.is_abort_requested and not item.request.status.is_finished
        ]
        self._finish_marked(scheduled)
        return outputs + self.take_aborted()

    def take_aborted(self) -> list[RequestOutput]:
        """The ends of aborted requests that no step has reported yet."""
        aborted, self._aborted = self._aborted, []
        return aborted

    def check_integrity(self) -> None:
        """AssertionError saying what is wrong unless every block is accounted for and every request is in one queue."""
        queued = [*self._waiting, *self._preempted, *self._running]
        assert len(queued) == len(self._requests), f"{len(queued)} requests queued, {len(self._requests)} known"
        for request in (*self._waiting, *self._preempted):
            assert len(request.block_table) == 0, f"{request.request_id} holds blocks while it waits"
        self._blocks.check_integrity(self._running)

    def _schedule_running(self, budget: int) -> tuple[list[Scheduled], bool]:
        scheduled: list[Scheduled] = []
        has_preempted = False
        index = 0
        while index < len(self._running) and budget > 0:
            request = self._running[index]
            index += 1
            num_new_tokens = min(request.num_pending_tokens, budget)
            if num_new_tokens == 0:
                continue
            while not (has_blocks := self._blocks.allocate(request, num_new_tokens)):
                # The victim is always the tail, which has not been scheduled in this step.
                victim = self._running[-1]
                self._preempt(victim)
                has_preempted = True
                if victim is request:
                    break
            if has_blocks:
                scheduled.append(Scheduled(request, num_new_tokens))
                budget -= num_new_tokens
        return scheduled, has_preempted

    def _admit(self, budget: int) -> list[Scheduled]:
        scheduled: list[Scheduled] = []
        while budget > 0 and len(self._running) < self._config.max_num_seqs:
            queue = self._preempted or self._waiting
            if not queue:
                break
            request = queue[0]
            prefix = self._blocks.match_prefix(request)
            # The whole prompt must fit now and each running request must have room to grow by a block: to admit
            # more is to preempt it soon and to compute its prompt twice.
            if not self._blocks.can_admit(request, prefix, num_reserved=len(self._running)):
                break
            queue.popleft()
            self._blocks.adopt_prefix(request, prefix)
            num_new_tokens = min(request.num_pending_tokens, budget)
            has_blocks = self._blocks.allocate(request, num_new_tokens)
            assert has_blocks, f"{request.request_id} was admitted without blocks for its tokens"
            if request.status is Status.WAITING:
                self._count_admission(request)
            request.status = Status.RUNNING
            self._running.append(request)
            scheduled.append(Scheduled(request, num_new_tokens))
            budget -= num_new_tokens
        return scheduled

    def _count_admission(self, request: Request) -> None:
        request.num_cached_tokens = min(request.num_computed_tokens, request.num_prompt_tokens)
        self.counters.num_prompt_tokens += request.num_prompt_tokens
        self.counters.prefix_queries += request.num_prompt_tokens
        self.counters.prefix_hits += request.num_cached_tokens

    def _preempt(self, request: Request) -> None:
        self._release(request)
        request.status = Status.PREEMPTED
        self._preempted.appendleft(request)
        self.counters.num_preemptions += 1

    def _update_row(self, request: Request, row: int, output: StepOutput) -> RequestOutput:
        if (error := output.errors.get(row)) is not None:
            return self._finish(request, Finish(Status.FINISHED_FAILED, error=error))
        token_id = int(output.token_ids[row])
        request.token_ids.append(token_id)
        self.counters.num_completion_tokens += 1
        finish = request.finish_after_last_token()
        if finish is not None:
            self._finish(request, finish)
        logprobs = (output.logprobs[row],) if row in output.logprobs else ()
        return RequestOutput(request.request_id, (token_id,), request.num_cached_tokens, logprobs, finish)

    def _finish_marked(self, scheduled: Sequence[Scheduled]) -> None:
        """The step is over: whoever was aborted meanwhile ends now, whether or not the step drew a token for it."""
        self._in_flight = set()
        for item in scheduled:
            if item.request.is_abort_requested and not item.request.status.is_finished:
                self._aborted.append(self._finish(item.request, Finish(Status.FINISHED_ABORTED)))

    def _finish(self, request: Request, finish: Finish) -> RequestOutput:
        if request.status is Status.RUNNING:
            self._release(request)
        elif request.status is Status.PREEMPTED:
            self._preempted.remove(request)
        else:
            self._waiting.remove(request)
        request.status = finish.status
        del self._requests[request.request_id]
        return RequestOutput(request.request_id, (), request.num_cached_tokens, finish=finish)

    def _release(self, request: Request) -> None:
        """The one place where a request leaves `running` and its blocks go back."""
        self._running.remove(request)
        self._blocks.free(request)
        request.num_computed_tokens = 0

    def _check_siblings(self, request: Request, max_tokens: int) -> None:
        """Refuse more answers than the KV cache holds side by side, the full blocks of their prompt counted once."""
        num_prompt, num_answers = request.num_prompt_tokens, request.num_siblings
        num_shared = self._blocks.num_shareable_blocks(num_prompt)
        num_own = self._blocks.num_blocks_for(num_prompt + max_tokens) - num_shared
        num_needed = num_shared + num_answers * num_own
        if num_answers > 1 and num_needed > self._blocks.num_blocks:
            raise InvalidRequest(
                f"n = {num_answers} answers of {num_prompt} + {max_tokens} tokens each need {num_needed} "
                f"blocks of the KV cache, which has {self._blocks.num_blocks}; lower n or max_tokens",
                "n",
            )

    def _limit_text(self) -> str:
        if self.max_model_len < self._model_len:
            return f"the KV cache of this replica holds {self.max_model_len} tokens"
        return f"the model's context is {self.max_model_len} tokens"


def _check_output(batch: Batch, output: StepOutput) -> None:
    drawn, num_rows = output.token_ids, len(batch.sampled_requests)
    if drawn.shape != (num_rows,) or drawn.dtype.kind not in "iu":
        raise ValueError(f"the step's tokens are {drawn.dtype} of shape {drawn.shape}, expected {num_rows} integers")
