"""The engine beside a loop: chunks, stop strings, resumption, cancellation, refusal, drain and death."""

import asyncio
import random
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, cast

import pytest

from replicas.engine.async_engine import AsyncEngine
from replicas.engine.batch import Batch
from replicas.engine.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from replicas.engine.engine import Engine
from replicas.engine.sampling_params import SamplingParams
from replicas.engine.tokenizer import LONG_TEXT_CHARS, Tokenizer
from replicas.types import (
    ChatPrompt,
    Chunk,
    Emitted,
    EngineError,
    GenerateRequest,
    InvalidRequest,
    Overloaded,
    Prompt,
    PromptTooLong,
    ReplicaUnavailable,
    TextPrompt,
    TokenPrompt,
)
from tests.fakes import EOS, FakeExecutor, FakeModelInfo, FakeSamplingDefaults, FakeTokenizer, expected_tokens

PROMPT = b"why is the sky blue"
NOTHING = Emitted()
FAKE_MODEL = FakeModelInfo()


def make(
    prompt: Prompt | bytes = PROMPT, name: str = "r", emitted: Emitted = NOTHING, **sampling: Any
) -> GenerateRequest:
    params = SamplingParams(**{"max_tokens": 40, "ignore_eos": True, "temperature": 0.0, **sampling})
    prompt = TokenPrompt(tuple(prompt)) if isinstance(prompt, bytes) else prompt
    return GenerateRequest(name, "fake", prompt, params, emitted)


HOLD_S = [0.0]


@pytest.fixture(autouse=True, params=[0.0, 0.01], ids=["at-once", "held"])
def hold(request: pytest.FixtureRequest) -> None:
    """Every test here holds whether or not tokens wait to travel together."""
    HOLD_S[0] = request.param


def make_engine(
    executor: FakeExecutor, info: FakeModelInfo = FAKE_MODEL, **scheduler: int
) -> tuple[Engine, AsyncEngine]:
    config = EngineConfig(ModelConfig("fake"), CacheConfig(block_size=4), SchedulerConfig(**scheduler))
    engine = Engine(config, info, executor)
    return engine, AsyncEngine(engine, cast(Tokenizer, FakeTokenizer()), "fake", HOLD_S[0])


@asynccontextmanager
async def running(
    executor: FakeExecutor | None = None, info: FakeModelInfo | None = None, **scheduler: int
) -> AsyncIterator[AsyncEngine]:
    executor = executor or FakeExecutor(num_blocks=512, drawable=b"abcdefghij ")
    _, async_engine = make_engine(executor, info or FakeModelInfo(), **scheduler)
    await async_engine.start()
    try:
        yield async_engine
        await settle(async_engine)
        assert async_engine.stats().is_intact
    finally:
        await async_engine.shutdown()
        assert executor.is_shut_down
        assert not any(thread.name == "engine" for thread in threading.enumerate())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 the engine's thread sets no event of this loop
            await asyncio.sleep(0.001)


async def settle(engine: AsyncEngine) -> None:
    """Until nothing runs and every block is free."""

    def is_settled() -> bool:
        stats = engine.stats()
        return stats.num_free_blocks == stats.num_blocks and stats.num_running == stats.num_waiting == 0

    await until(is_settled)


async def collect(engine: AsyncEngine, request: GenerateRequest) -> list[Chunk]:
    return [chunk async for chunk in engine.generate(request)]


def text_of(chunks: list[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


def ids_of(chunks: list[Chunk]) -> list[int]:
    return [token_id for chunk in chunks for token_id in chunk.token_ids]


def letters(num: int, seed: int = 0) -> bytes:
    return bytes(expected_tokens(PROMPT, num, seed, b"abcdefghij "))


async def test_an_answer_streams_with_usage_at_both_ends() -> None:
    has_first = threading.Event()

    def wait_for_reader(batch: Batch) -> None:
        assert executor.num_steps == 0 or has_first.wait(5), "the first token waits for a later one"

    executor = FakeExecutor(num_blocks=512, drawable=b"abcdefghij ", before_step=wait_for_reader)
    async with running(executor) as engine:
        chunks = []
        async for chunk in engine.generate(make()):
            chunks.append(chunk)
            has_first.set()
    assert ids_of(chunks) == list(letters(40))
    assert text_of(chunks) == letters(40).decode()
    assert len(chunks[0].token_ids) == 1
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish_reason == "length"
    assert chunks[0].usage is not None
    assert chunks[0].usage.num_completion_tokens == 1
    assert chunks[-1].usage is not None
    assert (chunks[-1].usage.num_prompt_tokens, chunks[-1].usage.num_completion_tokens) == (len(PROMPT), 40)
    assert [chunk.usage for chunk in chunks[1:-1]] == [None] * (len(chunks) - 2)


async def test_a_slow_reader_gets_several_steps_in_one_chunk() -> None:
    async with running() as engine:
        chunks = []
        async for chunk in engine.generate(make()):
            chunks.append(chunk)
            await asyncio.sleep(0.02)
    assert ids_of(chunks) == list(letters(40))
    assert len(chunks) < 20


async def test_many_at_once_equal_each_alone() -> None:
    rng = random.Random(1)
    bodies = [bytes(rng.choices(b"klmnop", k=rng.randrange(1, 60))) for _ in range(32)]
    executor = FakeExecutor(num_blocks=60)
    async with running(executor, max_num_batched_tokens=50) as engine:
        requests = [make(body, str(seed), temperature=1.0, seed=seed) for seed, body in enumerate(bodies)]
        answers = await asyncio.gather(*(collect(engine, request) for request in requests))
        assert engine.stats().num_preemptions > 0
    for seed, (body, chunks) in enumerate(zip(bodies, answers, strict=True)):
        assert ids_of(chunks) == expected_tokens(body, 40, seed)


@pytest.mark.parametrize("is_included", [False, True])
async def test_a_stop_string_ends_the_answer_and_the_engine_request(is_included: bool) -> None:
    full = letters(40).decode()
    stop = full[10:13]
    start = full.index(stop)
    # Slow enough that the abort overtakes the 200 tokens.
    async with running(FakeExecutor(num_blocks=512, drawable=b"abcdefghij ", step_s=0.002)) as engine:
        request = make(stop=(stop, "never"), max_tokens=200, include_stop_str_in_output=is_included)
        chunks = await collect(engine, request)
        await settle(engine)
        assert engine.stats().num_completion_tokens < 200
    assert text_of(chunks) == full[: start + len(stop) * is_included]
    assert (chunks[-1].finish_reason, chunks[-1].stop_reason) == ("stop", stop)
    assert ids_of(chunks) == list(full.encode()[: start + len(stop)])
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.num_completion_tokens == start + len(stop)


async def test_stop_tokens_and_eos_end_the_answer_without_their_text() -> None:
    full = letters(40)
    token = full[7]
    end = full.index(token) + 1
    async with running() as engine:
        chunks = await collect(engine, make(stop_token_ids=(token,)))
        assert (chunks[-1].finish_reason, chunks[-1].stop_reason) == ("stop", token)
        assert ids_of(chunks) == list(full[:end])
        assert text_of(chunks) == full[: end - 1].decode()
        early = await collect(engine, make(stop_token_ids=(token,), min_tokens=end + 2))
        assert token not in ids_of(early)[: end + 2]
    async with running(FakeExecutor(drawable=(EOS,))) as engine:
        chunks = await collect(engine, make(ignore_eos=False, skip_special_tokens=False))
        assert (ids_of(chunks), text_of(chunks)) == ([EOS], "")
        assert (chunks[-1].finish_reason, chunks[-1].stop_reason) == ("stop", None)
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.num_completion_tokens == 1


async def test_logprobs_belong_to_their_tokens() -> None:
    async with running() as engine:
        chunks = await collect(engine, make(logprobs=2, max_tokens=5))
        plain = await collect(engine, make(max_tokens=5))
    logprobs = [logprob for chunk in chunks for logprob in chunk.logprobs]
    assert [logprob.token_id for logprob in logprobs] == ids_of(chunks)
    assert "".join(logprob.token for logprob in logprobs) == text_of(chunks)
    assert all(len(logprob.top) == 2 and logprob.top[0].token_id == logprob.token_id for logprob in logprobs)
    assert all(chunk.logprobs == () for chunk in plain)


@pytest.mark.parametrize("sampling", [{}, {"stop": ("a",)}, {"stop": ("zz",)}, {"stop_token_ids": (ord("c"),)}])
async def test_resumption_at_every_cut_equals_the_whole(sampling: dict[str, Any]) -> None:
    """`num_chars` is what a client held when the stream broke off after a chunk; the answer goes on without a seam."""
    # Bytes of two-byte characters, so that cuts fall within them.
    executor = FakeExecutor(num_blocks=512, drawable=[*"äöü".encode(), *b"abc "])
    async with running(executor) as engine:
        whole = await collect(engine, make(temperature=1.0, seed=4, max_tokens=30, **sampling))
        for cut in range(len(whole) + 1):
            held = whole[:cut]
            emitted = Emitted(tuple(ids_of(held)), len(text_of(held)))
            rest = await collect(engine, make(temperature=1.0, seed=4, max_tokens=30, emitted=emitted, **sampling))
            assert ids_of(held) + ids_of(rest) == ids_of(whole)
            assert text_of(held) + text_of(rest) == text_of(whole)
            assert rest[-1].finish_reason == whole[-1].finish_reason
            assert rest[-1].stop_reason == whole[-1].stop_reason
            assert rest[-1].usage is not None
            assert whole[-1].usage is not None
            assert rest[-1].usage.num_completion_tokens == whole[-1].usage.num_completion_tokens


async def test_resumption_where_nothing_is_left_to_draw() -> None:
    """The replica died between its last token and the end of its stream."""
    room = FAKE_MODEL.max_model_len - len(PROMPT)
    answer = letters(room)
    async with running() as engine:
        for emitted, max_tokens, ignore_eos, reason in [
            (answer, None, True, "length"),
            (answer[:7], 7, True, "length"),
            ((*answer[:7], EOS), 40, False, "stop"),
        ]:
            held = Emitted(tuple(emitted), min(len(emitted), 7))
            chunks = await collect(engine, make(emitted=held, max_tokens=max_tokens, ignore_eos=ignore_eos))
            assert chunks[-1].finish_reason == reason
            assert chunks[-1].usage is not None
            assert ids_of(chunks) == []
            assert chunks[-1].usage.num_completion_tokens == len(emitted)


async def test_closing_a_stream_frees_its_blocks() -> None:
    async with running(FakeExecutor(step_s=0.002, drawable=b"abc")) as engine:
        stream = engine.generate(make(max_tokens=200))
        await anext(stream)
        assert engine.stats().num_running == 1
        await cast(Any, stream).aclose()
        await settle(engine)
        assert engine.stats().num_completion_tokens < 100


async def test_cancelling_a_reader_frees_its_blocks() -> None:
    async with running(FakeExecutor(step_s=0.002, drawable=b"abc")) as engine:
        task = asyncio.create_task(collect(engine, make(max_tokens=200)))
        await until(lambda: engine.stats().num_running > 0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await settle(engine)


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        (make(b""), "prompt"),
        (make(TextPrompt("")), "prompt"),
        (make(TokenPrompt((1, 10**6))), "prompt"),
        (make(TokenPrompt((-1,))), "prompt"),
        (make(max_tokens=1000), "max_tokens"),
        (make(stop_token_ids=(9999,)), "stop_token_ids"),
        (make(logit_bias={-1: 1.0}), "logit_bias"),
        (make(ChatPrompt(({"role": "nobody", "content": "hi"},))), "messages"),
        (replace(make(b"abc" * 20, max_tokens=150), num_siblings=20), "n"),
    ],
)
async def test_bad_requests_are_refused_by_name_and_leave_no_trace(request_: GenerateRequest, param: str) -> None:
    async with running() as engine:
        with pytest.raises(InvalidRequest) as caught:
            await collect(engine, request_)
        assert caught.value.param == param
        assert engine.stats().num_waiting == 0


async def test_a_long_prompt_is_refused_under_its_own_name() -> None:
    async with running() as engine:
        with pytest.raises(PromptTooLong) as text_error:
            await collect(engine, make(TextPrompt("x" * 2 * LONG_TEXT_CHARS)))
        assert text_error.value.param == "prompt"
        with pytest.raises(PromptTooLong) as chat_error:
            await collect(engine, make(ChatPrompt(({"role": "user", "content": "x" * 2 * LONG_TEXT_CHARS},))))
        assert chat_error.value.param == "messages"


@pytest.mark.parametrize("is_nested", [False, True])
async def test_only_a_long_chat_leaves_the_loop(is_nested: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []

    def encode_chat(self: FakeTokenizer, prompt: ChatPrompt, max_num_tokens: int | None = None) -> list[int]:
        threads.append(threading.current_thread().name)
        return [1]

    monkeypatch.setattr(FakeTokenizer, "encode_chat", encode_chat)
    nested: Any = "x" * LONG_TEXT_CHARS
    for _ in range(5000 if is_nested else 0):
        nested = [nested]
    async with running() as engine:
        for tool in ({"short": "x"}, {"long": nested}):
            await engine.tokenize(ChatPrompt(({"role": "user", "content": "hi"},), tools=(tool,)))
    assert threads[0] == threading.current_thread().name
    assert threads[1] != threads[0]


async def test_the_model_recommends_and_the_client_decides() -> None:
    seen: list[tuple[float, float, int, float]] = []

    def look(batch: Batch) -> None:
        columns = batch.sampling
        if len(columns.seed):
            seen.append(
                (
                    float(columns.temperature[0]),
                    float(columns.top_p[0]),
                    int(columns.top_k[0]),
                    float(columns.repetition_penalty[0]),
                )
            )

    info = FakeModelInfo(sampling_defaults=FakeSamplingDefaults(temperature=0.5, top_k=40))
    async with running(FakeExecutor(before_step=look, drawable=b"abc"), info) as engine:
        await collect(engine, make(temperature=None, max_tokens=1))
        await collect(engine, make(temperature=0.0, top_k=0, top_p=0.25, repetition_penalty=2.0, max_tokens=1))
        chunks = await collect(engine, make(max_tokens=None))
    assert seen[:2] == [(0.5, 1.0, 40, 1.0), (0.0, 0.25, 0, 2.0)]
    assert len(PROMPT) + len(ids_of(chunks)) == FakeModelInfo().max_model_len


async def test_a_full_queue_refuses_at_once() -> None:
    gate = threading.Event()
    executor = FakeExecutor(before_step=lambda batch: cast(None, gate.wait(5)), drawable=b"abc")
    async with running(executor, max_num_seqs=1, max_queued_requests=3) as engine:
        tasks = [asyncio.create_task(collect(engine, make(name="first", max_tokens=2)))]
        await until(lambda: engine.stats().num_running > 0)
        tasks += [asyncio.create_task(collect(engine, make(name=str(index), max_tokens=2))) for index in range(3)]
        await asyncio.sleep(0.01)
        assert engine.stats().num_waiting == 3
        with pytest.raises(Overloaded):
            await collect(engine, make())
        # The prompt is not even looked at, and who is in the middle of an answer is taken all the same.
        with pytest.raises(Overloaded):
            await collect(engine, make(ChatPrompt(({"role": "nobody", "content": "hi"},))))
        emitted = Emitted(tuple(b"a"), 1)
        tasks.append(asyncio.create_task(collect(engine, make(name="resumed", emitted=emitted, max_tokens=2))))
        await asyncio.sleep(0.01)
        gate.set()
        assert all(await asyncio.gather(*tasks))


async def test_one_failing_request_is_one_failing_request() -> None:
    executor = FakeExecutor(
        drawable=b"abcdefghij ", fail_row=lambda request_id: "NaN" if request_id.startswith("bad") else None
    )
    async with running(executor) as engine:
        good = asyncio.create_task(collect(engine, make()))
        with pytest.raises(EngineError, match="NaN"):
            await collect(engine, make(name="bad"))
        assert text_of(await good) == letters(40).decode()


async def test_the_same_id_twice_is_two_requests() -> None:
    async with running() as engine:
        first, second = await asyncio.gather(collect(engine, make()), collect(engine, make()))
    assert ids_of(first) == ids_of(second)


async def test_shutdown_ends_open_streams() -> None:
    executor = FakeExecutor(step_s=0.002, drawable=b"abc")
    _, engine = make_engine(executor)
    await engine.start()
    task = asyncio.create_task(collect(engine, make(max_tokens=200)))
    await until(lambda: engine.stats().num_running > 0)
    started = time.monotonic()
    await engine.shutdown()
    assert time.monotonic() - started < 1
    assert executor.is_shut_down
    with pytest.raises(ReplicaUnavailable, match="shut down"):
        await task
    with pytest.raises(ReplicaUnavailable):
        await collect(engine, make())
    await asyncio.wait_for(engine.shutdown(), 1)


async def test_a_model_that_cannot_be_loaded_fails_the_start() -> None:
    class Broken(FakeExecutor):
        def start(self) -> int:
            raise ValueError("model.safetensors is truncated")

    _, async_engine = make_engine(Broken())
    with pytest.raises(ReplicaUnavailable, match="not started"):
        await collect(async_engine, make())
    with pytest.raises(ValueError, match="truncated"):
        await async_engine.start()
    await async_engine.shutdown()


async def test_a_dead_step_loop_ends_streams_and_ages_the_heartbeat() -> None:
    engine, async_engine = make_engine(FakeExecutor(drawable=b"abc"))
    await async_engine.start()
    await collect(async_engine, make(max_tokens=3))
    await asyncio.sleep(0.05)
    assert async_engine.stats().heartbeat_age_s == 0.0, "asleep is not dead"
    engine.step = lambda *_: 1 / 0  # type: ignore[assignment, method-assign]
    with pytest.raises(ReplicaUnavailable, match="step loop died"):
        await collect(async_engine, make())
    with pytest.raises(ReplicaUnavailable, match="step loop died"):
        await collect(async_engine, make())
    await asyncio.sleep(0.05)
    assert async_engine.stats().heartbeat_age_s > 0.04
    await async_engine.shutdown()


async def test_a_hanging_step_ages_the_heartbeat() -> None:
    gate = threading.Event()
    async with running(FakeExecutor(before_step=lambda batch: cast(None, gate.wait(5)), drawable=b"abc")) as engine:
        task = asyncio.create_task(collect(engine, make(max_tokens=1)))
        await asyncio.sleep(0.1)
        assert engine.stats().heartbeat_age_s > 0.05
        gate.set()
        await task


async def test_tokenize_and_detokenize() -> None:
    async with running() as engine:
        assert await engine.tokenize(TextPrompt("hé")) == ([104, 195, 169], 256)
        long = "x" * (LONG_TEXT_CHARS + 1)
        assert (await engine.tokenize(TextPrompt(long)))[0] == list(long.encode())
        assert await engine.detokenize([104, 195, 169, EOS]) == "hé<|eos|>"
        with pytest.raises(InvalidRequest):
            await engine.detokenize([10**6])


@pytest.mark.parametrize("seed", range(3))
async def test_chaos(seed: int) -> None:
    """Readers that come, dawdle and go at any moment; in the end every block is free and every answer was right."""
    rng = random.Random(seed)
    executor = FakeExecutor(num_blocks=40)

    async def client(index: int) -> None:
        await asyncio.sleep(rng.random() * 0.3)
        body = bytes(rng.choices(b"kl", k=rng.randrange(1, 50)))
        request = make(body, str(index), temperature=1.0, seed=index, max_tokens=rng.randrange(1, 40))
        num_wanted = rng.choice([0, 1, 5, 1000, 1000])
        stream = engine.generate(request)
        token_ids: list[int] = []
        try:
            async with asyncio.timeout(rng.choice([0.01, 0.1, 5.0])):
                async for chunk in stream:
                    token_ids += chunk.token_ids
                    if len(token_ids) > num_wanted:
                        break
                    await asyncio.sleep(rng.choice([0, 0, 0.01]))
        except TimeoutError:
            pass
        finally:
            await cast(Any, stream).aclose()
        assert token_ids == expected_tokens(body, 40, index)[: len(token_ids)]

    async with running(executor, max_num_batched_tokens=60, max_num_seqs=8) as engine:
        await asyncio.gather(*(client(index) for index in range(150)))
        await settle(engine)
        assert engine._streams == {}
