"""build_batch against an oracle that goes through requests and tokens one by one."""

import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from replicas.engine.batch import SamplingColumns, Scheduled, build_batch
from replicas.engine.request import Request
from replicas.engine.sampling_params import SamplingParams


def random_request(rng: random.Random, name: str, block_size: int) -> Scheduled:
    sampling = SamplingParams(
        temperature=rng.choice([None, 0.0, 0.5]),
        top_p=rng.choice([None, 0.9]),
        top_k=rng.choice([None, -1, 0, 5]),
        min_p=rng.choice([0.0, 0.25]),
        presence_penalty=rng.choice([0.0, 1.0]),
        repetition_penalty=rng.choice([None, 1.0, 1.5]),
        logit_bias=rng.choice([{}, {3: 2.0}]),
        logprobs=rng.choice([None, 0, 4]),
        seed=rng.getrandbits(64),
        stop_token_ids=(7,),
        min_tokens=rng.choice([0, 3]),
    )
    prompt = [rng.randrange(50) for _ in range(rng.randrange(1, 12))]
    emitted = [rng.randrange(50) for _ in range(rng.randrange(5))]
    request = Request(name, prompt, sampling, eos_token_ids=frozenset({9}), emitted_token_ids=emitted)
    request.num_computed_tokens = rng.randrange(request.num_tokens)
    num_blocks = -(-request.num_tokens // block_size) + rng.randrange(2)
    request.block_table.extend(rng.sample(range(100), num_blocks))
    return Scheduled(request, rng.randrange(1, request.num_pending_tokens + 1))


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), num_requests=st.integers(1, 8), block_size=st.integers(1, 5))
def test_columns_equal_the_oracle(seed: int, num_requests: int, block_size: int) -> None:
    rng = random.Random(seed)
    scheduled = [random_request(rng, f"r{index}", block_size) for index in range(num_requests)]
    batch = build_batch(scheduled, block_size)

    row = sample = 0
    for index, item in enumerate(scheduled):
        request, tokens = item.request, item.request.token_ids.view.tolist()
        table = request.block_table.view.tolist()
        assert batch.query_start_loc[index] == row
        for position in range(request.num_computed_tokens, request.num_computed_tokens + item.num_new_tokens):
            assert batch.token_ids[row] == tokens[position]
            assert batch.positions[row] == position
            assert batch.slot_mapping[row] == table[position // block_size] * block_size + position % block_size
            row += 1
        assert batch.seq_lens[index] == request.num_computed_tokens + item.num_new_tokens
        assert batch.block_tables[index].tolist() == table + [0] * (batch.block_tables.shape[1] - len(table))
        if request.num_computed_tokens + item.num_new_tokens == len(tokens):
            assert batch.sampled_requests[sample] == index
            assert_sampling_row(batch.sampling, sample, request)
            sample += 1
    assert batch.query_start_loc[-1] == row == len(batch.token_ids)
    assert sample == len(batch.sampled_requests) == len(batch.sampling.seed)
    assert batch.request_ids == tuple(item.request.request_id for item in scheduled)
    dtypes = (batch.token_ids.dtype, batch.slot_mapping.dtype, batch.query_start_loc.dtype, batch.block_tables.dtype)
    assert dtypes == tuple(map(np.dtype, ("int64", "int64", "int32", "int32")))


def assert_sampling_row(columns: SamplingColumns, row: int, request: Request) -> None:
    sampling = request.sampling
    assert columns.temperature[row] == np.float32(1.0 if sampling.temperature is None else sampling.temperature)
    assert columns.top_p[row] == np.float32(sampling.top_p or 1.0)
    assert columns.top_k[row] == max(sampling.top_k or 0, 0)
    assert columns.min_p[row] == np.float32(sampling.min_p)
    assert columns.repetition_penalty[row] == np.float32(sampling.repetition_penalty or 1.0)
    assert columns.seed[row] == sampling.seed
    assert columns.seed.dtype == np.uint64
    assert columns.position[row] == request.num_tokens
    assert columns.num_logprobs[row] == (-1 if sampling.logprobs is None else sampling.logprobs)
    histories = {item.row: item for item in columns.penalised}
    assert (row in histories) == (sampling.presence_penalty != 0 or (sampling.repetition_penalty or 1) != 1)
    if row in histories:
        assert histories[row].prompt_token_ids.tolist() == request.prompt_token_ids.tolist()
        assert histories[row].output_token_ids.tolist() == request.output_token_ids.tolist()
    assert dict(columns.logit_bias).get(row, {}) == sampling.logit_bias
    is_early = request.num_output_tokens < sampling.min_tokens
    assert set(dict(columns.banned).get(row, ())) == ({7, 9} if is_early else set())


def test_a_batch_may_draw_nothing() -> None:
    request = Request("r", [1, 2, 3], SamplingParams())
    request.block_table.append(5)
    batch = build_batch([Scheduled(request, 2)], 4)
    assert len(batch.sampled_requests) == 0
    assert batch.sampling.temperature.shape == (0,)
    assert batch.sampling.seed.dtype == np.uint64


def test_a_batch_does_not_change_when_its_requests_go_on() -> None:
    request = Request("r", [1, 2, 3], SamplingParams(presence_penalty=1.0), emitted_token_ids=[4])
    request.block_table.append(5)
    batch = build_batch([Scheduled(request, 4)], 4)
    request.token_ids.append(8)
    request.block_table.clear()
    request.block_table.append(1)
    assert batch.token_ids.tolist() == [1, 2, 3, 4]
    assert batch.sampling.penalised[0].output_token_ids.tolist() == [4]
    assert batch.block_tables.tolist() == [[5]]
