"""A stream over replicas that die at random points equals the stream of one that lives."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replicas.engine.sampling_params import SamplingParams
from replicas.types import ChatPrompt, Chunk, EngineError, GenerateRequest, Overloaded, ReplicaUnavailable
from router.failover import ATTEMPTS_BEFORE_FALLBACK, close, resumed_stream
from router.settings import FailoverSettings
from tests.router.fake_backend import FakeBackend, answer_chunks, answer_text, answer_tokens

SETTINGS = FailoverSettings(
    max_attempts_before_first_token=4,
    max_attempts_amid_answer=6,
    max_losses=100,
    first_wait_s=1.0,
    max_wait_s=3.0,
)


def a_request(text: str = "hello", seed: int = 0, logprobs: int | None = None) -> GenerateRequest:
    prompt = ChatPrompt(({"role": "user", "content": text},))
    return GenerateRequest("r", "small", prompt, SamplingParams(temperature=1.0, seed=seed, logprobs=logprobs))


async def run(backend: FakeBackend, request: GenerateRequest) -> tuple[list[Chunk], list[float], int]:
    waits: list[float] = []
    resumptions: list[None] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    stream = resumed_stream(backend, request, SETTINGS, sleep=sleep, on_resume=lambda: resumptions.append(None))
    chunks = [chunk async for chunk in stream]
    return chunks, waits, len(resumptions)


async def waits_until_given_up(deaths: list[int]) -> list[float]:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    backend = FakeBackend(deaths=list(deaths))
    with pytest.raises(ReplicaUnavailable, match="No replica of 'small'"):
        _ = [chunk async for chunk in resumed_stream(backend, a_request("four", 3), SETTINGS, sleep=sleep)]
    assert len(backend.attempts) == len(waits) + 1
    return waits


@settings(max_examples=150, deadline=None)
@given(
    text=st.text(max_size=20),
    seed=st.integers(0, 2**64 - 1),
    deaths=st.lists(st.one_of(st.integers(1, 30), st.integers(0, 2)), max_size=12),
)
def test_no_token_is_lost_and_none_comes_twice(text: str, seed: int, deaths: list[int]) -> None:
    request = a_request(text, seed, logprobs=1)
    # more fruitless attempts in a row than are allowed is another test's subject
    fruitless = [0]
    for death in deaths:
        fruitless.append(fruitless[-1] + 1 if death == 0 else 0)
    if max(fruitless) >= SETTINGS.max_attempts_before_first_token - 1:
        return
    backend = FakeBackend(deaths=list(deaths))
    chunks, _, num_resumptions = asyncio.run(run(backend, request))
    tokens, finish_reason = answer_tokens(request)
    assert [token for chunk in chunks for token in chunk.token_ids] == tokens
    assert [entry.token_id for chunk in chunks for entry in chunk.logprobs] == tokens
    assert "".join(chunk.text for chunk in chunks) == answer_text(request)
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == [finish_reason]
    assert num_resumptions == len(backend.attempts) - 1
    assert backend.num_open == 0


@pytest.mark.parametrize("dies_after", range(8))
async def test_usage_is_that_of_an_undisturbed_answer(dies_after: int) -> None:
    request = a_request("four", seed=3)
    num_chunks = len(answer_chunks(request))
    assert num_chunks > 8, "the death must fall inside the answer"
    chunks, _, _ = await run(FakeBackend(deaths=[dies_after]), request)
    assert chunks[-1].usage == answer_chunks(request)[-1].usage
    assert chunks[0].usage == answer_chunks(request)[0].usage


async def test_a_death_between_the_last_token_and_the_finish_reason() -> None:
    request = a_request()
    last = len(answer_chunks(request)) - 1
    chunks, _, num_resumptions = await run(FakeBackend(deaths=[last]), request)
    assert "".join(chunk.text for chunk in chunks) == answer_text(request)
    assert num_resumptions == 1


async def test_fruitless_attempts_are_bounded_and_wait_longer_each_time() -> None:
    assert await waits_until_given_up([0] * 9) == [1.0, 2.0, 3.0]


async def test_an_answer_that_has_begun_is_not_given_up_so_soon() -> None:
    # the first attempt brought two tokens and counts as one fruitless attempt at its end
    assert await waits_until_given_up([2] + [0] * 9) == [1.0, 2.0, 3.0, 3.0, 3.0]


async def test_the_last_allowed_attempt_may_still_succeed() -> None:
    chunks, waits, _ = await run(FakeBackend(deaths=[0, 0, 0]), a_request())
    assert "".join(chunk.text for chunk in chunks) == answer_text(a_request())
    assert waits == [1.0, 2.0, 3.0]


async def test_with_another_model_at_hand_it_gives_up_sooner() -> None:
    backend = FakeBackend(down={"small"})
    quick = FailoverSettings(first_wait_s=0.0, max_wait_s=0.0)
    with pytest.raises(ReplicaUnavailable):
        _ = [chunk async for chunk in resumed_stream(backend, a_request(), quick, may_fall_back=lambda: True)]
    assert len(backend.attempts) == ATTEMPTS_BEFORE_FALLBACK


@pytest.mark.parametrize(
    "deaths", [[1] * 30, [3] + [0] * 30, [2, 0, 1, 0, 3, 1]], ids=["each time", "at one token", "mixed"]
)
async def test_a_request_may_cost_a_bounded_number_of_replicas(deaths: list[int | None]) -> None:
    backend = FakeBackend(deaths=list(deaths))
    stream = resumed_stream(backend, a_request("four", 3), FailoverSettings(first_wait_s=0.0, max_wait_s=0.0))
    with pytest.raises(EngineError, match="5 replicas of 'small' were lost"):
        _ = [chunk async for chunk in stream]
    assert len(backend.attempts) == 5


async def test_waiting_for_a_replacement_is_no_loss() -> None:
    request = a_request("four", 3)
    backend = FakeBackend(deaths=[3])

    async def sleep(seconds: float) -> None:
        backend.down = set() if len(backend.attempts) > 20 else {"small"}

    chunks = [chunk async for chunk in resumed_stream(backend, request, FailoverSettings(), sleep=sleep)]
    assert "".join(chunk.text for chunk in chunks) == answer_text(request)


async def test_an_answer_that_has_begun_waits_for_a_place_at_a_full_replica() -> None:
    request = a_request("four", 3)
    backend = FakeBackend(deaths=[3], full=[False, True, True])
    chunks, waits, _ = await run(backend, request)
    assert "".join(chunk.text for chunk in chunks) == answer_text(request)
    assert waits == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("deaths", [[], [0]])
async def test_an_answer_that_has_not_begun_is_refused_by_a_full_replica(deaths: list[int | None]) -> None:
    backend = FakeBackend(deaths=list(deaths), full=[False] * len(deaths) + [True])
    with pytest.raises(Overloaded):
        await run(backend, a_request())
    assert len(backend.attempts) == len(deaths) + 1


async def test_the_requests_own_error_is_not_retried() -> None:
    backend = FakeBackend(error_after=(2, EngineError("sampling failed")))
    with pytest.raises(EngineError):
        await run(backend, a_request("four", 3))
    assert len(backend.attempts) == 1


async def test_an_answer_that_the_replica_aborts_or_drops_is_resumed() -> None:
    request = a_request("four", 3)
    whole = answer_chunks(request)

    class Dropping(FakeBackend):
        async def stream_once(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
            self.attempts.append(request)
            if len(self.attempts) == 1:
                yield whole[0]
                yield Chunk((), "", finish_reason="abort")
            elif len(self.attempts) == 2:
                yield answer_chunks(request)[0]
            else:
                for chunk in answer_chunks(request):
                    yield chunk

    chunks, _, num_resumptions = await run(Dropping(), request)
    assert "".join(chunk.text for chunk in chunks) == answer_text(request)
    assert num_resumptions == 2


async def test_closing_the_stream_closes_the_attempt() -> None:
    backend = FakeBackend(stall_after=1)
    stream = resumed_stream(backend, a_request("four", 3), SETTINGS)
    await anext(stream)
    assert backend.num_open == 1
    await close(stream)
    assert backend.num_open == 0
