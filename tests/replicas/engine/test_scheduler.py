"""The scheduler's rules, one by one: budget, order, preemption, admission, refusal, abort."""

from typing import Any

import numpy as np
import pytest

from replicas.engine.batch import Scheduled, StepOutput, build_batch
from replicas.engine.block_manager import BlockManager
from replicas.engine.config import SchedulerConfig
from replicas.engine.request import Request, Status
from replicas.engine.sampling_params import SamplingParams
from replicas.engine.scheduler import RequestOutput, Scheduler
from replicas.types import InvalidRequest, Overloaded, PromptTooLong

BLOCK_SIZE = 4


def make_scheduler(num_blocks: int = 16, max_model_len: int = 64, **config: int) -> Scheduler:
    blocks = BlockManager(num_blocks, BLOCK_SIZE, enable_prefix_caching=False)
    return Scheduler(SchedulerConfig(**config), blocks, max_model_len)


def make(name: str, num_prompt: int = 4, **sampling: Any) -> Request:
    return Request(name, [1] * num_prompt, SamplingParams(**sampling))


def run(scheduler: Scheduler, scheduled: list[Scheduled], token: int = 5) -> list[RequestOutput]:
    batch = build_batch(scheduled, BLOCK_SIZE)
    return scheduler.update(scheduled, batch, StepOutput(np.full(len(batch.sampled_requests), token, np.int64)))


def shares(scheduled: list[Scheduled]) -> dict[str, int]:
    return {item.request.request_id: item.num_new_tokens for item in scheduled}


def test_one_budget_running_first_prompts_in_chunks() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=10)
    scheduler.add(make("a", 4))
    scheduler.add(make("b", 12))
    scheduled = scheduler.schedule()
    assert shares(scheduled) == {"a": 4, "b": 6}
    assert [output.request_id for output in run(scheduler, scheduled)] == ["a"]
    scheduler.add(make("c", 8))
    scheduled = scheduler.schedule()
    assert shares(scheduled) == {"a": 1, "b": 6, "c": 3}
    assert [output.request_id for output in run(scheduler, scheduled)] == ["a", "b"]
    assert shares(scheduler.schedule()) == {"a": 1, "b": 1, "c": 5}


def test_at_most_max_num_seqs_run() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    for name in "abc":
        scheduler.add(make(name, max_tokens=2))
    assert shares(scheduler.schedule()) == {"a": 4, "b": 4}
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 1)


def test_the_tail_is_preempted_and_nobody_is_admitted_in_that_step() -> None:
    scheduler = make_scheduler(num_blocks=4, max_model_len=16)
    scheduler.add(make("a", 3))
    scheduler.add(make("b", 3))
    scheduled = scheduler.schedule()
    for _ in range(5):
        run(scheduler, scheduled)
        scheduled = scheduler.schedule()
    run(scheduler, scheduled)
    # Both hold two full blocks now; a's next token needs a fifth.
    late = make("c", 1)
    scheduler.add(late)
    scheduled = scheduler.schedule()
    assert shares(scheduled) == {"a": 1}
    assert scheduler.counters.num_preemptions == 1
    assert scheduler.num_waiting == 2
    scheduler.check_integrity()
    run(scheduler, scheduled)
    scheduler.abort("a")
    # b comes back before c and computes all it has; the block that is left is kept for b to grow.
    assert shares(scheduler.schedule()) == {"b": 9}


def test_the_bound_counts_only_requests_that_never_ran() -> None:
    scheduler = make_scheduler(max_num_seqs=1, max_queued_requests=2)
    for name in "ab":
        scheduler.add(make(name))
    with pytest.raises(Overloaded):
        scheduler.add(make("c"))
    run(scheduler, scheduler.schedule())
    scheduler.add(make("c"))
    with pytest.raises(Overloaded):
        scheduler.check_queue(0, is_resumed=False)
    scheduler.abort("c")
    scheduler.check_queue(0, is_resumed=False)
    with pytest.raises(Overloaded):
        scheduler.check_queue(1, is_resumed=False)


def test_a_resumed_request_is_taken_by_a_full_queue() -> None:
    scheduler = make_scheduler(max_queued_requests=1)
    scheduler.add(make("a"))
    scheduler.add(Request("resumed", [1] * 4, SamplingParams(), emitted_token_ids=[1]))
    assert scheduler.num_waiting == 2
    with pytest.raises(Overloaded):
        scheduler.add(make("b"))


@pytest.mark.parametrize(
    ("request_", "error", "param"),
    [
        (make("r", 0), InvalidRequest, "prompt"),
        (make("r", 64), PromptTooLong, "prompt"),
        (make("r", 60, max_tokens=5), InvalidRequest, "max_tokens"),
        (make("r", 4, max_tokens=0), InvalidRequest, "max_tokens"),
        (Request("r", [1] * 4, SamplingParams(max_tokens=28), num_siblings=3), InvalidRequest, "n"),
    ],
)
def test_what_can_never_fit_is_refused(request_: Request, error: type[InvalidRequest], param: str) -> None:
    scheduler = make_scheduler()
    with pytest.raises(error) as caught:
        scheduler.add(request_)
    assert type(caught.value) is error
    assert caught.value.param == param
    assert not scheduler.has_work


def test_what_just_fits_is_taken() -> None:
    scheduler = make_scheduler()
    scheduler.add(make("longest prompt", 63))
    scheduler.add(make("longest answer", 60, max_tokens=4))
    scheduler.add(Request("siblings", [1] * 4, SamplingParams(max_tokens=28), num_siblings=2))
    assert scheduler.num_waiting == 3


@pytest.mark.parametrize(("num_blocks", "fits"), [(16, True), (15, False)])
def test_the_prompt_that_siblings_share_is_counted_once(num_blocks: int, fits: bool) -> None:
    blocks = BlockManager(num_blocks, BLOCK_SIZE)
    scheduler = Scheduler(SchedulerConfig(), blocks, 64)
    # 17 + 7 tokens: four full blocks of the prompt are common, two blocks are each answer's own.
    siblings = Request("siblings", [1] * 17, SamplingParams(max_tokens=7), num_siblings=6)
    if fits:
        scheduler.check(siblings)
    else:
        with pytest.raises(InvalidRequest, match="need 16 blocks of the KV cache, which has 15"):
            scheduler.check(siblings)


def test_a_cache_smaller_than_the_context_is_the_limit() -> None:
    scheduler = make_scheduler(num_blocks=4, max_model_len=1000)
    assert scheduler.max_model_len == 16
    with pytest.raises(PromptTooLong, match="KV cache of this replica holds 16 tokens"):
        scheduler.add(make("r", 16))
    with pytest.raises(InvalidRequest, match="at most 6"):
        scheduler.add(make("r", 10, max_tokens=7))
    request = make("r", 10)
    scheduler.add(request)
    while not request.status.is_finished:
        outputs = run(scheduler, scheduler.schedule())
    assert request.status is Status.FINISHED_LENGTH
    assert request.num_tokens == 16
    assert outputs[-1].finish is not None
    assert outputs[-1].finish.reason == "length"


def test_abort_while_waiting_running_and_preempted_frees_at_once() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    running, waiting = make("running"), make("waiting")
    scheduler.add(running)
    scheduler.add(waiting)
    run(scheduler, scheduler.schedule())
    scheduler.abort("waiting")
    scheduler.abort("running")
    scheduler.abort("running")
    scheduler.abort("never seen")
    outputs = scheduler.take_aborted()
    assert [(output.request_id, output.finish and output.finish.reason) for output in outputs] == [
        ("waiting", "abort"),
        ("running", "abort"),
    ]
    assert not scheduler.has_work
    scheduler.check_integrity()


@pytest.mark.parametrize("has_failed", [False, True])
def test_abort_of_a_request_in_flight_waits_for_the_step(has_failed: bool) -> None:
    scheduler = make_scheduler()
    scheduler.add(make("a"))
    scheduler.add(make("b"))
    scheduled = scheduler.schedule()
    scheduler.abort("a")
    scheduler.abort("a")
    assert len(scheduled[0].request.block_table) == 1, "its blocks are being written"
    outputs = scheduler.fail(scheduled, "boom") if has_failed else run(scheduler, scheduled)
    ends = {output.request_id: output.finish for output in outputs}
    assert ends["a"] is not None
    assert ends["a"].status is Status.FINISHED_ABORTED
    assert (ends["b"] is not None) == has_failed
    assert len(outputs) == 2
    scheduler.check_integrity()


def test_an_abort_while_a_prompt_is_computed_in_chunks() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=4)
    scheduler.add(make("long", 20))
    run(scheduler, scheduler.schedule())
    scheduled = scheduler.schedule()
    scheduler.abort("long")
    assert [output.finish and output.finish.reason for output in run(scheduler, scheduled)] == ["abort"]
    assert not scheduler.has_work
    scheduler.check_integrity()
