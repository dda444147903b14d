"""Blocks: sharing, eviction order, twins, and integrity under random use."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replicas.engine.block_manager import BlockManager
from replicas.engine.request import Request
from replicas.engine.sampling_params import SamplingParams


def make(tokens: list[int], salt: str = "", name: str = "r") -> Request:
    return Request(name, tokens, SamplingParams(), cache_salt=salt)


def admit(blocks: BlockManager, request: Request, num_tokens: int | None = None) -> int:
    """Allocate and compute the request (or its first tokens) in one step; returns the cached tokens."""
    blocks.adopt_prefix(request, blocks.match_prefix(request))
    num_cached = request.num_computed_tokens
    num_new = (num_tokens or request.num_tokens) - num_cached
    assert blocks.allocate(request, num_new)
    request.num_computed_tokens += num_new
    blocks.publish(request)
    return num_cached


def release(blocks: BlockManager, request: Request) -> None:
    blocks.free(request)
    request.num_computed_tokens = 0


def test_a_prefix_is_shared_and_the_last_token_is_left_to_compute() -> None:
    blocks = BlockManager(8, 4)
    first = make(list(range(8)))
    assert admit(blocks, first) == 0
    same = make(list(range(8)))
    assert admit(blocks, same) == 4  # not 8: one token must be computed to draw the next
    assert same.block_table.view[0] == first.block_table.view[0]
    longer = make([*range(8), 99])
    assert admit(blocks, longer) == 8
    blocks.check_integrity([first, same, longer])


def test_other_tokens_salts_and_parents_do_not_match() -> None:
    blocks = BlockManager(16, 4)
    admit(blocks, make([1, 2, 3, 4, 5, 6, 7, 8, 9]))
    assert len(blocks.match_prefix(make([1, 2, 3, 4, 5, 6, 7, 8, 9]))) == 2
    assert blocks.match_prefix(make([1, 2, 3, 4, 5, 6, 7, 8, 9], salt="tenant")) == []
    assert len(blocks.match_prefix(make([1, 2, 3, 4, 0, 6, 7, 8, 9]))) == 1
    assert blocks.match_prefix(make([0, 2, 3, 4, 5, 6, 7, 8, 9])) == []
    assert blocks.match_prefix(make([5, 6, 7, 8, 9])) == []


def test_a_cached_block_survives_its_request_until_its_turn() -> None:
    blocks = BlockManager(4, 2)
    first = make([1, 2, 3, 4, 5])
    admit(blocks, first)
    release(blocks, first)
    assert blocks.num_free_blocks == 4
    # Two blank blocks go first, then the tail of the cached prefix, then its head.
    one = make([7, 7, 8, 8])
    admit(blocks, one)
    assert len(blocks.match_prefix(first)) == 2
    two = make([6], name="two")
    admit(blocks, two)
    assert len(blocks.match_prefix(first)) == 1
    blocks.check_integrity([one, two])


def test_a_hit_renews_a_block_and_takes_it_out_of_the_middle_of_the_free_list() -> None:
    blocks = BlockManager(3, 2)
    for tokens in ([1, 1], [2, 2], [3, 3]):
        request = make(tokens)
        admit(blocks, request)
        release(blocks, request)
    renewed = make([1, 1, 9])
    assert blocks.match_prefix(renewed) != []
    blocks.adopt_prefix(renewed, blocks.match_prefix(renewed))
    release(blocks, renewed)
    admit(blocks, make([4, 4], name="evicts 2"))
    assert blocks.match_prefix(make([2, 2, 0])) == []
    assert len(blocks.match_prefix(make([1, 1, 0]))) == 1
    assert len(blocks.match_prefix(make([3, 3, 0]))) == 1


def test_a_prefix_whose_head_was_evicted_and_came_back_is_not_mixed_up() -> None:
    blocks = BlockManager(3, 2)
    first = make([1, 1, 2, 2, 3])
    admit(blocks, first)
    release(blocks, first)
    tail_only = make([9] * 6)
    assert blocks.allocate(tail_only, 6)
    release(blocks, tail_only)
    assert admit(blocks, make([1, 1, 2, 2, 3])) == 0


def test_twins_computed_at_once_are_tolerated() -> None:
    blocks = BlockManager(8, 2)
    twins = [make([1, 2, 3], name=name) for name in "ab"]
    for twin in twins:
        assert blocks.match_prefix(twin) == []
        assert blocks.allocate(twin, 3)
    for twin in twins:
        twin.num_computed_tokens = 3
        blocks.publish(twin)
    blocks.check_integrity(twins)
    for twin in twins:
        release(blocks, twin)
    blocks.check_integrity([])
    assert len(blocks.match_prefix(twins[0])) == 1


def test_allocation_beyond_the_pool_changes_nothing() -> None:
    blocks = BlockManager(2, 2)
    request = make([1] * 5)
    assert not blocks.allocate(request, 5)
    assert len(request.block_table) == 0
    assert blocks.num_free_blocks == 2


def test_prefix_blocks_in_the_free_list_are_not_counted_twice() -> None:
    blocks = BlockManager(3, 2)
    first = make([1, 2, 3, 4, 5])
    admit(blocks, first)
    release(blocks, first)
    holder = make([8, 8], name="holder")
    assert blocks.allocate(holder, 2)
    again = make([1, 2, 3, 4, 5])
    prefix = blocks.match_prefix(again)
    assert len(prefix) == 2
    assert not blocks.can_admit(again, prefix, num_reserved=0)  # 2 free, both in the prefix, a third is needed


def test_integrity_check_names_what_is_wrong() -> None:
    blocks = BlockManager(4, 2)
    request = make([1, 2, 3])
    admit(blocks, request)
    with pytest.raises(AssertionError, match="2 free \\+ 0 held of 4"):
        blocks.check_integrity([])
    twice = make([5], name="twice")
    twice.block_table.extend([2, 2])
    with pytest.raises(AssertionError, match="twice holds a block twice"):
        blocks.check_integrity([request, twice])
    free = make([5], name="thief")
    free.block_table.extend([request.block_table.view[0]])
    with pytest.raises(AssertionError, match="counts 1 holders, 2 hold it"):
        blocks.check_integrity([request, free])


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    num_blocks=st.integers(2, 24),
    block_size=st.integers(1, 5),
)
def test_random_use_keeps_integrity_and_never_shares_wrongly(seed: int, num_blocks: int, block_size: int) -> None:
    """An oracle array stands for the cache: what a table's slots hold must be the request's own whole prefix."""
    rng = random.Random(seed)
    blocks = BlockManager(num_blocks, block_size)
    stored: dict[int, tuple[object, ...]] = {}
    live: list[Request] = []
    for step in range(60):
        if live and rng.random() < 0.4:
            request = live.pop(rng.randrange(len(live)))
            assert_holds_own_prefix(request, stored, block_size)
            release(blocks, request)
        else:
            tokens = [rng.randrange(2) for _ in range(rng.randrange(1, 4 * block_size + 2))]
            request = make(tokens, salt=rng.choice(["", "t"]), name=str(step))
            prefix = blocks.match_prefix(request)
            if not blocks.can_admit(request, prefix, num_reserved=0):
                continue
            num_cached = admit(blocks, request)
            assert num_cached < request.num_tokens
            for position in range(num_cached, request.num_tokens):
                slot = int(request.block_table.view[position // block_size]) * block_size + position % block_size
                stored[slot] = (request.cache_salt, *tokens[: position + 1])
            live.append(request)
        blocks.check_integrity(live)
    for request in live:
        assert_holds_own_prefix(request, stored, block_size)
        release(blocks, request)
    blocks.check_integrity([])
    assert blocks.num_free_blocks == num_blocks


def assert_holds_own_prefix(request: Request, stored: dict[int, tuple[object, ...]], block_size: int) -> None:
    tokens = request.token_ids.view.tolist()
    for position in range(request.num_tokens):
        slot = int(request.block_table.view[position // block_size]) * block_size + position % block_size
        assert stored[slot] == (request.cache_salt, *tokens[: position + 1])
