"""The engine's step against FakeExecutor, whose tokens change with any wrong slot, table or prefix."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from replicas.engine.batch import Batch, StepOutput
from replicas.engine.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from replicas.engine.engine import Engine
from replicas.engine.request import Request, Status
from replicas.engine.sampling_params import SamplingParams
from replicas.engine.scheduler import RequestOutput
from tests.fakes import EOS, FakeExecutor, FakeModelInfo, expected_tokens

BLOCK_SIZE = 4


def make_engine(
    executor: FakeExecutor | None = None, caching: bool = True, max_model_len: int = 256, **scheduler: int
) -> Engine:
    executor = executor or FakeExecutor(num_blocks=512)
    config = EngineConfig(
        ModelConfig("fake"),
        CacheConfig(block_size=executor.block_size, enable_prefix_caching=caching),
        SchedulerConfig(**scheduler),
    )
    engine = Engine(config, FakeModelInfo(max_model_len=max_model_len), executor)
    engine.start()
    return engine


def make(name: str, prompt: Sequence[int], emitted: Sequence[int] = (), **sampling: Any) -> Request:
    params = SamplingParams(**{"ignore_eos": True, "max_tokens": 20, **sampling})
    return Request(name, prompt, params, eos_token_ids=frozenset({EOS}), emitted_token_ids=emitted)


def drain(engine: Engine) -> dict[str, list[RequestOutput]]:
    outputs: dict[str, list[RequestOutput]] = {}
    while engine.has_work:
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
    engine.check_integrity()
    assert engine.stats().is_intact
    assert engine.stats().num_free_blocks == engine.stats().num_blocks
    return outputs


def tokens_of(outputs: list[RequestOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def prompts(num: int, seed: int = 0) -> list[list[int]]:
    """Random ones, many of which share a beginning."""
    rng = random.Random(seed)
    shared = [rng.randrange(97, 123) for _ in range(30)]
    return [
        shared[: rng.randrange(31)] + [rng.randrange(97, 123) for _ in range(rng.randrange(1, 40))] for _ in range(num)
    ]


@pytest.mark.parametrize("caching", [True, False], ids=["prefix cache", "no cache"])
@pytest.mark.parametrize("num_blocks", [512, 28], ids=["roomy", "preempting"])
@pytest.mark.parametrize("max_num_batched_tokens", [1, 7, 16, 64, 10**6])
def test_tokens_do_not_depend_on_chunks_cache_preemption_or_company(
    max_num_batched_tokens: int, num_blocks: int, caching: bool
) -> None:
    engine = make_engine(FakeExecutor(num_blocks), caching, 100, max_num_batched_tokens=max_num_batched_tokens)
    requests = [make(str(index), prompt, seed=index, temperature=1.0) for index, prompt in enumerate(prompts(32))]
    wanted = [expected_tokens(r.prompt_token_ids.tolist(), 20, r.sampling.seed) for r in requests]
    for repetition in ("cold", "warm"):
        for request in requests:
            engine.add(make(request.request_id, request.prompt_token_ids.tolist(), seed=request.sampling.seed))
        outputs = drain(engine)
        got = [tokens_of(outputs[request.request_id]) for request in requests]
        assert got == wanted, repetition
    counters = engine.stats().counters
    # One token per step never leaves two requests running at once for long enough to collide.
    assert (counters.num_preemptions > 0) == (num_blocks == 28 and max_num_batched_tokens > 1)
    assert (counters.prefix_hits > 0) == caching
    assert counters.num_completion_tokens == 2 * 32 * 20


def test_alone_equals_the_oracle() -> None:
    for index, prompt in enumerate(prompts(8, seed=3)):
        engine = make_engine()
        engine.add(make("r", prompt, seed=index, temperature=0.7))
        assert tokens_of(drain(engine)["r"]) == expected_tokens(prompt, 20, index)


def test_a_resumed_request_goes_on_as_if_never_interrupted() -> None:
    prompt = prompts(1)[0]
    wanted = expected_tokens(prompt, 20, 5)
    for cut in range(20):
        engine = make_engine()
        engine.add(make("r", prompt, wanted[:cut], seed=5, temperature=1.0))
        outputs = drain(engine)["r"]
        assert tokens_of(outputs) == wanted[cut:]
        assert outputs[-1].finish is not None
        assert outputs[-1].finish.reason == "length"


def test_cached_tokens_are_reported_and_never_exceed_the_prompt() -> None:
    engine = make_engine()
    prompt = [97] * 10
    engine.add(make("cold", prompt))
    assert drain(engine)["cold"][0].num_cached_tokens == 0
    engine.add(make("warm", prompt))
    assert drain(engine)["warm"][0].num_cached_tokens == 8
    answer = expected_tokens(prompt, 20)
    engine.add(make("resumed", prompt, answer[:12]))
    assert drain(engine)["resumed"][0].num_cached_tokens == 10


def test_a_broken_row_fails_alone() -> None:
    executor = FakeExecutor(fail_row=lambda request_id: "its logits are NaN" if request_id == "bad" else None)
    engine = make_engine(executor)
    for name in ("good", "bad", "fine"):
        engine.add(make(name, list(name.encode())))
    outputs = drain(engine)
    assert tokens_of(outputs["good"]) == expected_tokens(b"good", 20)
    assert tokens_of(outputs["fine"]) == expected_tokens(b"fine", 20)
    finish = outputs["bad"][-1].finish
    assert finish is not None
    assert (finish.status, finish.error) == (Status.FINISHED_FAILED, "its logits are NaN")


def test_a_step_that_raises_fails_its_requests_and_the_engine_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    def explode(batch: Batch) -> None:
        if "poison" in batch.request_ids:
            raise MemoryError("out of memory")

    engine = make_engine(FakeExecutor(before_step=explode), max_num_seqs=2)
    for name in ("victim", "poison", "later"):
        engine.add(make(name, list(name.encode())))
    outputs = drain(engine)
    for name in ("victim", "poison"):
        finish = outputs[name][-1].finish
        assert finish is not None
        assert finish.status is Status.FINISHED_FAILED
        assert "out of memory" in (finish.error or "")
    assert tokens_of(outputs["later"]) == expected_tokens(b"later", 20)
    assert "a step of 2 requests failed" in caplog.text
    # What the failed step half wrote must not be found by anybody.
    engine.add(make("victim", list(b"victim")))
    assert tokens_of(drain(engine)["victim"]) == expected_tokens(b"victim", 20)


def test_what_a_broken_row_stored_is_found_by_nobody() -> None:
    is_broken = True
    engine = make_engine(FakeExecutor(fail_row=lambda request_id: "its logits are NaN" if is_broken else None))
    engine.add(make("bad", b"the very same prompt"))
    drain(engine)
    is_broken = False
    engine.add(make("good", b"the very same prompt"))
    assert drain(engine)["good"][0].num_cached_tokens == 0


@pytest.mark.parametrize("damage", [lambda ids: ids[:-1], lambda ids: ids[:, None], lambda ids: ids * np.nan])
def test_an_output_of_another_shape_fails_everybody_in_the_step(damage: Callable[[Any], Any]) -> None:
    """The first request would end in this step: its end must not be lost for what is wrong with the others."""
    executor = FakeExecutor()
    engine = make_engine(executor)
    engine.add(make("short", b"short", max_tokens=1))
    engine.add(make("long", b"long"))
    execute = executor.execute
    executor.execute = lambda batch: StepOutput(damage(execute(batch).token_ids))  # type: ignore[method-assign]
    outputs = drain(engine)
    for name in ("short", "long"):
        finish = outputs[name][-1].finish
        assert finish is not None
        assert finish.status is Status.FINISHED_FAILED
        assert tokens_of(outputs[name]) == []


def test_a_leak_is_logged_and_shown(caplog: pytest.LogCaptureFixture) -> None:
    engine = make_engine()
    engine.add(make("r", [97]))
    drain(engine)
    leaky = make("leak", [98])
    assert engine._blocks.allocate(leaky, 1)
    engine.add(make("r", [97]))
    while engine.has_work:
        engine.step()
    engine.check_integrity()
    assert not engine.stats().is_intact
    assert "lost its integrity" in caplog.text


@pytest.mark.parametrize("seed", range(6))
def test_chaos(seed: int) -> None:
    """Hundreds of requests through a tiny pool, aborted in every state, steps and rows failing now and then."""
    rng = random.Random(seed)
    is_failing = False

    def maybe_explode(batch: Batch) -> None:
        for request_id in batch.request_ids:
            if rng.random() < 0.01:
                engine.abort(request_id)  # in flight
        if is_failing:
            raise RuntimeError("chaos")

    executor = FakeExecutor(
        num_blocks=rng.randrange(16, 40),
        before_step=maybe_explode,
        fail_row=lambda request_id: "chaos" if request_id.endswith("7") and rng.random() < 0.05 else None,
    )
    engine = make_engine(
        executor, max_model_len=60, max_num_batched_tokens=rng.choice([5, 30, 200]), max_num_seqs=rng.choice([3, 16])
    )
    requests = {
        str(index): make(str(index), prompt[:40], seed=index, max_tokens=rng.randrange(1, 20), ignore_eos=False)
        for index, prompt in enumerate(prompts(250, seed))
    }
    arriving = list(requests.values())
    outputs: dict[str, list[RequestOutput]] = {}
    while arriving or engine.has_work:
        for _ in range(min(len(arriving), rng.randrange(6))):
            engine.add(arriving.pop())
        if rng.random() < 0.3:
            engine.abort(str(rng.randrange(250)))
        is_failing = rng.random() < 0.01
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
        engine._scheduler.check_integrity()
    assert engine.stats().num_free_blocks == engine.stats().num_blocks
    assert set(outputs) == set(requests)
    for name, request in requests.items():
        ends = [output.finish for output in outputs[name] if output.finish is not None]
        assert len(ends) == 1, f"{name} ended {len(ends)} times"
        assert outputs[name][-1].finish is not None
        tokens = tokens_of(outputs[name])
        assert tokens == expected_tokens(request.prompt_token_ids.tolist(), 20, request.sampling.seed)[: len(tokens)]
    assert engine.stats().counters.num_preemptions > 0
