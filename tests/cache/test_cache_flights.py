"""One leader per key at a time, whatever the leaders and the waiters do."""

from __future__ import annotations

import asyncio
import random

import pytest

from cache.flights import Flights
from cache.types import CachedAnswer, CacheHit

HIT = CacheHit(CachedAnswer("text", "model", 1, 1, None), "hit-exact", 1.0, 0.0)


def join(flights: Flights, can_lead: bool = True, accepts: bool = True) -> asyncio.Task[str | CacheHit | None]:
    return asyncio.create_task(flights.join("key", lambda hit: accepts, can_lead))


async def test_waiters_get_the_leaders_answer() -> None:
    flights = Flights(lease_s=5.0)
    token = flights.lead("key")
    assert token is not None
    assert flights.lead("key") is None
    waiters = [join(flights) for _ in range(3)]
    await asyncio.sleep(0)
    assert flights.num_waiters == 3
    flights.settle("key", token, HIT)
    assert await asyncio.gather(*waiters) == [HIT] * 3
    assert (len(flights), flights.num_waiters) == (0, 0)


async def test_an_abandoned_flight_goes_to_one_waiter() -> None:
    flights = Flights(lease_s=5.0)
    token = flights.lead("key")
    assert token is not None
    waiters = [join(flights, can_lead=i > 0) for i in range(3)]
    await asyncio.sleep(0)
    flights.abandon(token)
    heir = await waiters[1]  # the first that may lead
    assert isinstance(heir, str)
    assert flights.leads(heir)
    assert not waiters[0].done()
    assert not waiters[2].done()
    flights.abandon(token)  # outdated: nothing happens
    assert flights.leads(heir)
    flights.settle("key", heir, HIT)
    assert await asyncio.gather(*waiters[::2]) == [HIT, HIT]


async def test_the_lease_of_a_dead_leader_ends() -> None:
    flights = Flights(lease_s=0.05)
    dead = flights.lead("key")
    assert dead is not None
    heir = await join(flights)
    assert isinstance(heir, str)
    assert heir != dead
    flights.settle("key", dead, HIT)  # it was only slow: its answer counts, the heir keeps the flight
    assert flights.leads(heir)
    await asyncio.sleep(0.1)  # the heir dies too, and nobody waits
    assert len(flights) == 0


async def test_dead_leaders_release_one_waiter_each() -> None:
    flights = Flights(lease_s=0.05)
    assert flights.lead("key") is not None
    waiters = {join(flights) for _ in range(3)}
    while waiters:  # no heir ever answers: each in turn is found dead, and no two lead at once
        done, waiters = await asyncio.wait(waiters, return_when=asyncio.FIRST_COMPLETED)
        assert [type(task.result()) for task in done] == [str]
    assert flights.num_waiters == 0


async def test_a_renewed_lease_goes_on() -> None:
    flights = Flights(lease_s=0.4)
    token = flights.lead("key")
    assert token is not None
    waiter = join(flights)
    for _ in range(12):
        await asyncio.sleep(0.05)
        flights.renew(token)
    assert not waiter.done()
    flights.settle("key", token, HIT)
    assert await waiter == HIT
    flights.renew(token)  # outdated: nothing happens
    assert len(flights) == 0


async def test_who_refuses_the_answer_takes_over() -> None:
    flights = Flights(lease_s=5.0)
    token = flights.lead("key")
    assert token is not None
    picky, easy = join(flights, accepts=False), join(flights)
    await asyncio.sleep(0)
    flights.settle("key", token, HIT)
    assert await easy == HIT
    heir = await picky
    assert isinstance(heir, str)
    flights.abandon(heir)
    assert len(flights) == 0


async def test_without_an_heir_all_go_alone() -> None:
    flights = Flights(lease_s=5.0)
    token = flights.lead("key")
    assert token is not None
    waiters = [join(flights, can_lead=False) for _ in range(2)]
    await asyncio.sleep(0)
    flights.abandon(token)
    assert await asyncio.gather(*waiters) == [None, None]


async def test_leadership_does_not_leave_with_a_cancelled_waiter() -> None:
    flights = Flights(lease_s=5.0)
    token = flights.lead("key")
    assert token is not None
    first, second = join(flights), join(flights)
    await asyncio.sleep(0)
    flights.abandon(token)  # hands over to `first` …
    first.cancel()  # … which is cancelled before it runs
    with pytest.raises(asyncio.CancelledError):
        await first
    heir = await second
    assert isinstance(heir, str)
    assert flights.leads(heir)
    flights.close()


async def test_random_lives_never_give_two_leaders() -> None:
    rng = random.Random(0)
    flights = Flights(lease_s=0.2)
    leading: dict[str, int] = {}

    async def live(key: str) -> None:
        outcome = await flights.join(key, lambda hit: True, rng.random() < 0.9)
        if not isinstance(outcome, str):
            return
        leading[key] = leading.get(key, 0) + 1
        assert leading[key] == 1, "two leaders at once"
        try:
            await asyncio.sleep(rng.random() * 0.01)
        finally:
            leading[key] -= 1
            if rng.random() < 0.5:
                flights.settle(key, outcome, HIT)
            else:
                flights.abandon(outcome)

    tasks = []
    for _ in range(600):
        tasks.append(asyncio.create_task(live(f"key {rng.randrange(5)}")))
        if rng.random() < 0.3:
            rng.choice(tasks).cancel()
        if rng.random() < 0.2:
            await asyncio.sleep(0.001)
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(outcome is None or isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)
    assert (len(flights), flights.num_waiters) == (0, 0)
