"""One request inside the engine: its tokens, how far they are computed, and when it is finished.

The Scheduler owns every Request; only the BlockManager writes `block_table` and `block_identities`. There are no
phases: a request lacks `num_pending_tokens`, and a step hands it some of them. Knows no clock, no text and no other
request.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray

from replicas.engine.sampling_params import SamplingParams

MAX_INT32 = 2**31 - 1
MASK_UINT64 = 2**64 - 1


class Status(enum.Enum):
    """WAITING has never run, PREEMPTED lost its blocks and starts over with all the tokens it has."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED_STOPPED = "stopped"
    FINISHED_LENGTH = "length"
    FINISHED_ABORTED = "aborted"
    FINISHED_FAILED = "failed"

    @property
    def is_finished(self) -> bool:
        return self not in (Status.WAITING, Status.RUNNING, Status.PREEMPTED)


@dataclass(frozen=True, slots=True)
class Finish:
    """Why an answer ended. `stop_reason` is the stop token's id, None for EOS; `error` only with FINISHED_FAILED."""

    status: Status
    stop_reason: int | None = None
    error: str | None = None

    @property
    def reason(self) -> Literal["stop", "length", "abort"]:
        if self.status is Status.FINISHED_STOPPED:
            return "stop"
        return "length" if self.status is Status.FINISHED_LENGTH else "abort"


class Column:
    """A growing numpy column. Views handed out earlier stay valid and never see later values."""

    __slots__ = ("_buffer", "_length")

    def __init__(self, values: Iterable[int], dtype: DTypeLike) -> None:
        self._buffer = np.array(list(values), dtype=dtype)
        self._length = len(self._buffer)

    def __len__(self) -> int:
        return self._length

    @property
    def view(self) -> NDArray[np.int64]:
        return self._buffer[: self._length]

    def append(self, value: int) -> None:
        if self._length == len(self._buffer):
            self._reserve(self._length + 1)
        self._buffer[self._length] = value
        self._length += 1

    def extend(self, values: Sequence[int]) -> None:
        end = self._length + len(values)
        self._reserve(end)
        self._buffer[self._length : end] = values
        self._length = end

    def clear(self) -> None:
        # A fresh buffer: a batch built from the old one may still be in flight.
        self._buffer = np.empty(0, self._buffer.dtype)
        self._length = 0

    def _reserve(self, length: int) -> None:
        if length <= len(self._buffer):
            return
        grown = np.empty(max(length, 2 * len(self._buffer), 16), self._buffer.dtype)
        grown[: self._length] = self._buffer[: self._length]
        self._buffer = grown


class Request:
    """`sampling` comes with the model's defaults filled in; only `max_tokens` may still be None (all that fits).

    `emitted_token_ids` are output tokens that another replica drew already: they count as output everywhere
    (`max_tokens`, `min_tokens`, penalties, positions), are computed like a prompt and never reported again.
    `max_num_tokens` is the room for prompt and answer.
    """

    __slots__ = (
        "block_identities",
        "block_table",
        "cache_salt",
        "draft_token_ids",
        "is_abort_requested",
        "max_num_tokens",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_prompt_tokens",
        "num_siblings",
        "request_id",
        "sampling",
        "sampling_row",
        "status",
        "stop_token_ids",
        "token_ids",
    )

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        eos_token_ids: frozenset[int] = frozenset(),
        emitted_token_ids: Sequence[int] = (),
        cache_salt: str = "",
        num_siblings: int = 1,
        max_num_tokens: int = MAX_INT32,
    ) -> None:
        self.request_id = request_id
        self.sampling = sampling
        self.cache_salt = cache_salt
        self.num_siblings = num_siblings
        self.num_prompt_tokens = len(prompt_token_ids)
        self.token_ids = Column([*prompt_token_ids, *emitted_token_ids], np.int64)
        self.draft_token_ids: tuple[int, ...] = ()
        self.num_computed_tokens = 0
        self.num_cached_tokens = 0
        if sampling.max_tokens is not None:
            max_num_tokens = min(max_num_tokens, len(prompt_token_ids) + sampling.max_tokens)
        self.max_num_tokens = max_num_tokens
        self.status = Status.WAITING
        self.is_abort_requested = False
        self.block_table = Column((), np.int32)
        self.block_identities: list[int] = []
        # {token id that ends the answer: stop_reason}; EOS wins over an equal stop token.
        self.stop_token_ids: dict[int, int | None] = {token: token for token in sampling.stop_token_ids}
        if not sampling.ignore_eos:
            self.stop_token_ids |= dict.fromkeys(eos_token_ids)
        self.sampling_row = _sampling_row(sampling)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_pending_tokens(self) -> int:
        """Tokens that still lack K and V."""
        return len(self.token_ids) + len(self.draft_token_ids) - self.num_computed_tokens

    @property
    def prompt_token_ids(self) -> NDArray[np.int64]:
        return self.token_ids.view[: self.num_prompt_tokens]

    @property
    def output_token_ids(self) -> NDArray[np.int64]:
        return self.token_ids.view[self.num_prompt_tokens :]

    @property
    def has_penalty(self) -> bool:
        sampling = self.sampling
        return (
            sampling.presence_penalty != 0.0
            or sampling.frequency_penalty != 0.0
            or (sampling.repetition_penalty or 1.0) != 1.0
        )

    @property
    def banned_token_ids(self) -> tuple[int, ...]:
        """Token ids that may not be drawn next: whatever would stop the answer before `min_tokens`."""
        return tuple(self.stop_token_ids) if self.num_output_tokens < self.sampling.min_tokens else ()

    def finish_after_last_token(self) -> Finish | None:
        """Whether the newest output token ends the answer. A stop token is looked at before the length, so that an
        EOS drawn as the last allowed token is "stop"."""
        if self.num_output_tokens == 0:
            return None
        token_id = int(self.token_ids.view[-1])
        if token_id in self.stop_token_ids and self.num_output_tokens >= self.sampling.min_tokens:
            return Finish(Status.FINISHED_STOPPED, self.stop_token_ids[token_id])
        if self.num_tokens >= self.max_num_tokens:
            return Finish(Status.FINISHED_LENGTH)
        return None


def _sampling_row(sampling: SamplingParams) -> tuple[float, float, int, float, float, float, float, int, int]:
    """The columns of `SamplingColumns` that never change for a request, in their order, `position` left out;
    `num_logprobs` stands last."""
    temperature = 1.0 if sampling.temperature is None else sampling.temperature
    top_p = 1.0 if sampling.top_p is None else sampling.top_p
    return (
        temperature,
        top_p,
        min(max(sampling.top_k or 0, 0), MAX_INT32),
        sampling.min_p,
        sampling.presence_penalty,
        sampling.frequency_penalty,
        1.0 if sampling.repetition_penalty is None else sampling.repetition_penalty,
        sampling.seed & MASK_UINT64,
        -1 if sampling.logprobs is None else sampling.logprobs,
    )
