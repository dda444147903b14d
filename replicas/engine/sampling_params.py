"""How one request wants its tokens drawn. Plain values that whoever takes them from a client has checked (the gateway's
wire schemas do); no torch, no wire names of HTTP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

MAX_LOGPROBS = 20


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """vLLM's names and meanings; `None` means the model's own default, which `AsyncEngine` fills in.

    `temperature` 0 is greedy. `top_k` 0 or -1 and `top_p` 1 switch the filter off. `logprobs` is the number of
    alternatives to report beside the sampled token (0: the sampled token only, None: nothing).
    `seed` keys the counter-based random numbers: the same seed and position give the same draw on any replica.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    seed: int = 0
    stop: tuple[str, ...] = ()
    include_stop_str_in_output: bool = False
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    skip_special_tokens: bool = True
