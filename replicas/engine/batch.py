"""What one step asks of the ranks and what comes back: numpy columns, no torch, no scheduler state.

A batch is ragged: request i owns rows `query_start_loc[i]:query_start_loc[i+1]` of the token columns. No column says
"prefill" or "decode"; only attention looks at query lengths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from replicas.engine.request import Request


@dataclass(frozen=True, slots=True)
class Penalised:
    """Token history of one sampled row that has a penalty. Presence and frequency count the output alone,
    repetition counts prompt and output (vLLM's and OpenAI's semantics)."""

    row: int
    prompt_token_ids: NDArray[np.int64]
    output_token_ids: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class SamplingColumns:
    """Sampling parameters of the rows that draw a token in this step; every column has shape (num_samples,)."""

    temperature: NDArray[np.float32]
    top_p: NDArray[np.float32]
    top_k: NDArray[np.int32]
    """0: off."""
    min_p: NDArray[np.float32]
    presence_penalty: NDArray[np.float32]
    frequency_penalty: NDArray[np.float32]
    repetition_penalty: NDArray[np.float32]
    seed: NDArray[np.uint64]
    position: NDArray[np.int64]
    """Index in the sequence of the token to be drawn: with the seed it keys the random numbers."""
    num_logprobs: NDArray[np.int32]
    """-1: none wanted; k >= 0: the sampled token's and the k likeliest."""
    penalised: tuple[Penalised, ...] = ()
    logit_bias: tuple[tuple[int, Mapping[int, float]], ...] = ()
    """(row, {token id: bias})"""
    banned: tuple[tuple[int, tuple[int, ...]], ...] = ()
    """(row, token ids that may not be drawn): the stop tokens while `min_tokens` is not reached."""


@dataclass(frozen=True, slots=True)
class Batch:
    request_ids: tuple[str, ...]
    token_ids: NDArray[np.int64]
    """(num_tokens,)"""
    positions: NDArray[np.int64]
    """(num_tokens,)"""
    slot_mapping: NDArray[np.int64]
    """(num_tokens,): block id x block size + offset, where the row's K and V are stored."""
    query_start_loc: NDArray[np.int32]
    """(num_requests + 1,)"""
    seq_lens: NDArray[np.int32]
    """(num_requests,): tokens in the cache after this step."""
    block_tables: NDArray[np.int32]
    """(num_requests, max_blocks), padded with 0."""
    sampled_requests: NDArray[np.int32]
    """(num_samples,): indices of the requests whose pending tokens end in this step, so that they draw one."""
    sampling: SamplingColumns


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Of one sampled row: the sampled token's log-probability, and the likeliest tokens in falling order."""

    sampled: float
    top_token_ids: NDArray[np.int64]
    top_logprobs: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class StepOutput:
    token_ids: NDArray[np.int64]
    """(num_samples,); undefined in rows named by `errors`."""
    logprobs: Mapping[int, Logprobs] = field(default_factory=dict)
    """By sampled row."""
    errors: Mapping[int, str] = field(default_factory=dict)
    """Sampled rows that failed on their own, with the reason; the other rows are valid."""


@dataclass(frozen=True, slots=True)
class Scheduled:
    """A request and how many of its pending tokens one step computes."""

    request: Request
    num_new_tokens: int


def build_batch(scheduled: Sequence[Scheduled], block_size: int) -> Batch:
    """The columns of one step. A request draws a token in it when no token it has stays pending.

    Blocks for all the new tokens must be in the requests' tables. Costs little per request and nothing per token
    beyond numpy's own work: on a small machine the step's Python time is taken from its compute.
    """
    assert scheduled, "a batch needs at least one request"
    requests = [item.request for item in scheduled]
    num_requests = len(requests)
    starts = np.fromiter((request.num_computed_tokens for request in requests), np.int64, num_requests)
    query_lens = np.fromiter((item.num_new_tokens for item in scheduled), np.int64, num_requests)
    seq_lens = starts + query_lens
    query_start_loc = np.zeros(num_requests + 1, np.int32)
    np.cumsum(query_lens, out=query_start_loc[1:])
    rows = np.repeat(np.arange(num_requests), query_lens)
    # Row r of request i stands at starts[i] + (r - query_start_loc[i]).
    positions = np.arange(query_start_loc[-1]) + (starts - query_start_loc[:-1])[rows]
    block_tables = _block_tables(requests)
    blocks = block_tables[rows, positions // block_size].astype(np.int64)
    slices = [
        request.token_ids.view[request.num_computed_tokens : request.num_computed_tokens + item.num_new_tokens]
        for request, item in zip(requests, scheduled, strict=True)
    ]
    lengths = np.fromiter((request.num_tokens for request in requests), np.int64, num_requests)
    sampled = np.flatnonzero(seq_lens == lengths).astype(np.int32)
    return Batch(
        request_ids=tuple(request.request_id for request in requests),
        token_ids=np.concatenate(slices),
        positions=positions,
        slot_mapping=blocks * block_size + positions % block_size,
        query_start_loc=query_start_loc,
        seq_lens=seq_lens.astype(np.int32),
        block_tables=block_tables,
        sampled_requests=sampled,
        sampling=_sampling_columns([requests[index] for index in sampled.tolist()]),
    )


def _block_tables(requests: Sequence[Request]) -> NDArray[np.int32]:
    tables = np.zeros((len(requests), max(len(request.block_table) for request in requests)), np.int32)
    for row, request in zip(tables, requests, strict=True):
        row[: len(request.block_table)] = request.block_table.view
    return tables


def _sampling_columns(requests: Sequence[Request]) -> SamplingColumns:
    columns = list(zip(*(request.sampling_row for request in requests), strict=True)) or [()] * 9
    penalised, logit_bias, banned = [], [], []
    for row, request in enumerate(requests):
        if request.has_penalty:
            penalised.append(Penalised(row, request.prompt_token_ids, request.output_token_ids))
        if request.sampling.logit_bias:
            logit_bias.append((row, request.sampling.logit_bias))
        if request.sampling.min_tokens and (token_ids := request.banned_token_ids):
            banned.append((row, token_ids))
    return SamplingColumns(
        temperature=np.array(columns[0], np.float32),
        top_p=np.array(columns[1], np.float32),
        top_k=np.array(columns[2], np.int32),
        min_p=np.array(columns[3], np.float32),
        presence_penalty=np.array(columns[4], np.float32),
        frequency_penalty=np.array(columns[5], np.float32),
        repetition_penalty=np.array(columns[6], np.float32),
        seed=np.array(columns[7], np.uint64),
        position=np.array([request.num_tokens for request in requests], np.int64),
        num_logprobs=np.array(columns[8], np.int32),
        penalised=tuple(penalised),
        logit_bias=tuple(logit_bias),
        banned=tuple(banned),
    )
