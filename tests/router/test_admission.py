"""Bounded, fair, and never a place lost: against random arrivals, cancels and releases."""

from __future__ import annotations

import asyncio
import random

import pytest

from replicas.types import Overloaded
from router.admission import Admission, Permit


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


async def test_places_then_queue_then_refusal() -> None:
    admission = Admission(2, 1, Clock())
    first, second = await admission.acquire(), await admission.acquire()
    waiting = asyncio.create_task(admission.acquire())
    await asyncio.sleep(0)
    assert (admission.num_running, admission.num_waiting) == (2, 1)
    with pytest.raises(Overloaded) as caught:
        await admission.acquire()
    assert caught.value.retry_after_s >= 1.0
    first.release()
    first.release()
    third = await waiting
    assert (admission.num_running, admission.num_waiting) == (2, 0)
    for permit in (second, third):
        permit.release()
    assert admission.num_running == 0


async def test_first_come_first_served() -> None:
    admission = Admission(1, 10, Clock())
    held = await admission.acquire()
    served: list[int] = []

    async def ask(index: int) -> None:
        permit = await admission.acquire()
        served.append(index)
        await asyncio.sleep(0)
        permit.release()

    tasks = [asyncio.create_task(ask(index)) for index in range(5)]
    await asyncio.sleep(0)
    held.release()
    await asyncio.gather(*tasks)
    assert served == list(range(5))


async def test_retry_after_follows_how_long_requests_take() -> None:
    clock = Clock()
    admission = Admission(1, 0, clock)
    for _ in range(60):
        permit = await admission.acquire()
        clock.now_s += 20.0
        permit.release()
    held = await admission.acquire()
    with pytest.raises(Overloaded) as caught:
        admission.check()
    assert caught.value.retry_after_s == pytest.approx(20.0, rel=0.05)
    held.release()


@pytest.mark.parametrize("seed", range(20))
async def test_random_arrivals_cancels_and_releases(seed: int) -> None:
    rng = random.Random(seed)
    max_concurrent, max_queued = rng.randint(1, 4), rng.randint(0, 5)
    admission = Admission(max_concurrent, max_queued, Clock())
    num_held = 0

    async def visit() -> None:
        nonlocal num_held
        permit: Permit = await admission.acquire()
        num_held += 1
        assert num_held <= max_concurrent
        try:
            for _ in range(rng.randint(0, 4)):
                await asyncio.sleep(0)
        finally:
            num_held -= 1
            permit.release()

    tasks: list[asyncio.Task[None]] = []
    for _ in range(300):
        tasks.append(asyncio.create_task(visit()))
        if rng.random() < 0.4:
            rng.choice(tasks).cancel()
        if rng.random() < 0.6:
            await asyncio.sleep(0)
        assert admission.num_running <= max_concurrent
        assert admission.num_waiting <= max_queued
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert (admission.num_running, admission.num_waiting, num_held) == (0, 0, 0)
    assert {type(outcome) for outcome in outcomes} <= {type(None), Overloaded, asyncio.CancelledError}
