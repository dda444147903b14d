"""What one step asks of the ranks and what comes back: numpy columns, no torch, no scheduler state.

A batch is ragged: request i owns rows `query_start_loc[i]:query_start_loc[i+1]` of the token columns. No column says
"prefill" or "decode"; only attention looks at query lengths.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


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
