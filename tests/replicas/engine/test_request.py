"""A request's counts, ends and sampling row."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicas.engine.request import Column, Finish, Request, Status
from replicas.engine.sampling_params import SamplingParams


def make(prompt: list[int], emitted: Sequence[int] = (), eos: int = 9, **sampling: Any) -> Request:
    return Request("r", prompt, SamplingParams(**sampling), eos_token_ids=frozenset({eos}), emitted_token_ids=emitted)


@given(st.lists(st.one_of(st.integers(0, 2**31 - 1), st.lists(st.integers(0, 2**31 - 1), max_size=20))))
def test_column_grows_like_a_list_and_old_views_stay(operations: list[int | list[int]]) -> None:
    column, oracle = Column([], np.int64), list[int]()
    views = []
    for operation in operations:
        if isinstance(operation, list):
            column.extend(operation)
            oracle += operation
        else:
            column.append(operation)
            oracle.append(operation)
        views.append((column.view, list(oracle)))
    assert len(column) == len(oracle)
    assert all(view.tolist() == values for view, values in views)


def test_counts_include_emitted_tokens() -> None:
    request = make([1, 2, 3], emitted=[4, 5], max_tokens=6)
    assert (request.num_prompt_tokens, request.num_output_tokens, request.num_tokens) == (3, 2, 5)
    assert request.num_pending_tokens == 5
    assert request.max_num_tokens == 9
    assert request.prompt_token_ids.tolist() == [1, 2, 3]
    assert request.output_token_ids.tolist() == [4, 5]


@pytest.mark.parametrize(
    ("last", "sampling", "finish"),
    [
        (9, {}, Finish(Status.FINISHED_STOPPED)),
        (9, {"ignore_eos": True}, None),
        (9, {"max_tokens": 1}, Finish(Status.FINISHED_STOPPED)),
        (7, {"max_tokens": 1}, Finish(Status.FINISHED_LENGTH)),
        (7, {"stop_token_ids": (7,)}, Finish(Status.FINISHED_STOPPED, 7)),
        (9, {"stop_token_ids": (9,)}, Finish(Status.FINISHED_STOPPED, None)),
        (9, {"stop_token_ids": (9,), "ignore_eos": True}, Finish(Status.FINISHED_STOPPED, 9)),
        (9, {"min_tokens": 2}, None),
        (9, {"min_tokens": 1}, Finish(Status.FINISHED_STOPPED)),
        (7, {}, None),
    ],
)
def test_end_after_the_last_token(last: int, sampling: dict[str, Any], finish: Finish | None) -> None:
    request = make([1], **sampling)
    request.token_ids.append(last)
    assert request.finish_after_last_token() == finish


def test_a_prompt_that_ends_in_eos_is_not_an_end() -> None:
    assert make([1, 9]).finish_after_last_token() is None


def test_stop_tokens_are_banned_until_min_tokens() -> None:
    request = make([1], min_tokens=2, stop_token_ids=(5,))
    assert set(request.banned_token_ids) == {5, 9}
    request.token_ids.extend([2, 3])
    assert request.banned_token_ids == ()
    assert make([1], min_tokens=2, ignore_eos=True).banned_token_ids == ()


def test_sampling_row_clips_what_columns_cannot_hold() -> None:
    row = make([1], top_k=2**40, seed=-1, logprobs=None).sampling_row
    assert row[2] == 2**31 - 1
    assert row[7] == 2**64 - 1
    assert row[8] == -1
    assert make([1], top_k=-1).sampling_row[2] == 0
