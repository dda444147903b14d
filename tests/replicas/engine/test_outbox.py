"""What waits, what does not, and that nothing is lost, doubled or overtaken."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from replicas.engine.outbox import Outbox
from replicas.engine.request import Finish, Status
from replicas.engine.scheduler import RequestOutput

END = Finish(Status.FINISHED_LENGTH)


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def token(request_id: str, finish: Finish | None = None) -> RequestOutput:
    return RequestOutput(request_id, (1,), 0, finish=finish)


def numbers_of_outputs(outbox: Outbox, clock: Clock, step_s: float, num_steps: int) -> list[int]:
    """How many outputs leave at each step, one request drawing a token in each, its first being out already."""
    outbox.put([token("a")])
    assert len(outbox.take_due(1)) == 1, "the first token of an answer waits for nothing"
    left = []
    for _ in range(num_steps):
        clock.now_s += step_s
        outbox.put([token("a")])
        left.append(len(outbox.take_due(1)))
    return left


def test_tokens_of_fast_steps_travel_together() -> None:
    clock = Clock()
    assert numbers_of_outputs(Outbox(0.031, clock), clock, 0.010, 8) == [0, 0, 0, 4, 0, 0, 0, 4]


def test_tokens_of_slow_steps_leave_at_once() -> None:
    clock = Clock()
    assert numbers_of_outputs(Outbox(0.030, clock), clock, 0.031, 4) == [1, 1, 1, 1]


def test_without_a_hold_everything_leaves_at_once() -> None:
    clock = Clock()
    assert numbers_of_outputs(Outbox(0.0, clock), clock, 0.001, 3) == [1, 1, 1]


def test_nothing_waits_for_a_step_of_more_tokens() -> None:
    clock = Clock()
    outbox = Outbox(0.030, clock)
    numbers_of_outputs(outbox, clock, 0.001, 2)
    assert len(outbox.take_due(512)) == 2, "a prompt is about to be computed"
    clock.now_s += 0.001
    outbox.put([token("a")])
    assert outbox.take_due(512) == []


def test_a_request_in_a_hurry_takes_everybody_along() -> None:
    clock = Clock()
    outbox = Outbox(0.030, clock)
    outbox.hurry("b")
    numbers_of_outputs(outbox, clock, 0.001, 2)
    outbox.put([token("b")])
    assert len(outbox.take_due(1)) == 3
    outbox.put([token("b"), token("a")])
    assert len(outbox.take_due(1)) == 2
    outbox.put([token("b", END)])
    outbox.take_due(1)
    outbox.put([token("b")])
    outbox.take_due(1)
    outbox.put([token("b")])
    assert outbox.take_due(1) == [], "an id that comes again is in no hurry by itself"


def test_an_end_takes_along_what_waits() -> None:
    clock = Clock()
    outbox = Outbox(0.030, clock)
    outbox.put([token("a"), token("b")])
    outbox.take_due(1)
    clock.now_s += 0.001
    outbox.put([token("a"), token("b")])
    assert outbox.take_due(1) == []
    outbox.put([token("a"), token("b", END)])
    assert [output.request_id for output in outbox.take_due(1)] == ["a", "b", "a", "b"]


def test_an_id_that_comes_again_begins_again() -> None:
    clock = Clock()
    outbox = Outbox(0.030, clock)
    for _ in range(2):
        outbox.put([token("a")])
        assert len(outbox.take_due(1)) == 1
        outbox.put([token("a", END)])
        assert len(outbox.take_due(1)) == 1


@given(
    steps=st.lists(
        st.tuples(st.floats(1e-4, 0.05), st.lists(st.tuples(st.sampled_from("abcd"), st.booleans()), max_size=4)),
        max_size=40,
    ),
    hold_s=st.floats(0, 0.04),
)
def test_nothing_is_lost_doubled_or_overtaken(steps: list[tuple[float, list[tuple[str, bool]]]], hold_s: float) -> None:
    clock = Clock()
    outbox = Outbox(hold_s, clock)
    put: list[RequestOutput] = []
    taken: list[RequestOutput] = []
    for pause_s, outputs in steps:
        clock.now_s += pause_s
        new = [token(request_id, END if is_last else None) for request_id, is_last in outputs]
        outbox.put(new)
        put += new
        taken += outbox.take_due(1)
        assert not any(output.finish for output in put[len(taken) :]), "an end waits for nothing"
    taken += outbox.take_all()
    assert [id(output) for output in taken] == [id(output) for output in put]
    assert outbox.take_all() == []


@given(step_s=st.floats(1e-3, 0.05), hold_s=st.floats(0, 0.04))
def test_at_a_steady_pace_nothing_waits_longer_than_it_may(step_s: float, hold_s: float) -> None:
    clock = Clock()
    outbox = Outbox(hold_s, clock)
    outbox.put([token("a")])
    outbox.take_due(1)
    waiting_since: list[float] = []
    for _ in range(30):
        clock.now_s += step_s
        outbox.put([token("a")])
        waiting_since.append(clock.now_s)
        if outbox.take_due(1):
            assert clock.now_s - waiting_since[0] <= hold_s + 1e-9
            waiting_since = []
