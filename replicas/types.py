"""The contract of a replica: what a gateway may ask of one copy of a model, and what comes back.

Everything here crosses processes, so it is frozen and made of plain values. It knows neither HTTP nor Ray nor torch.

Errors, as a tree (`router/errors.py` is the one mapping to HTTP):

    MillraceError
    ├── InvalidRequest       the client's fault; `param` names the field
    │   └── PromptTooLong    the prompt alone exceeds the context
    ├── ModelNotFound        no such model in the catalogue
    ├── Overloaded           a bounded queue is full; `retry_after_s` says when to come back
    ├── ReplicaUnavailable   draining, dead or stalled: another replica may well answer
    └── EngineError          this one request failed inside the engine; the engine goes on
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from replicas.engine.sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """Messages for the model's own chat template, each a plain dict with at least `role` and `content`."""

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    add_generation_prompt: bool = True
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TextPrompt:
    text: str


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    token_ids: tuple[int, ...]


Prompt = ChatPrompt | TextPrompt | TokenPrompt


@dataclass(frozen=True, slots=True)
class Emitted:
    """What a client already holds of an answer, so that another replica can continue it without a seam.

    `num_chars` may lag behind the text of `token_ids`: a stop string or an incomplete character holds text back.
    """

    token_ids: tuple[int, ...] = ()
    num_chars: int = 0


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One answer to one prompt. `n` answers are `n` of these, told apart by `request_id` and seed."""

    request_id: str
    model: str
    prompt: Prompt
    sampling: SamplingParams
    emitted: Emitted = Emitted()
    cache_salt: str = ""
    """Requests of different salts never share prefix-cache blocks: the tenant, and later the adapter."""
    num_siblings: int = 1
    """`n` of the client's request; a replica refuses answers that could never fit its KV cache together, the prompt
    that they share counted once."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and its log-probability in nats; of a sampled one also the `top` alternatives."""

    token_id: int
    token_bytes: bytes
    """Several tokens may share one character, so a token alone need not be valid UTF-8."""
    logprob: float
    top: tuple[TokenLogprob, ...] = ()

    @property
    def token(self) -> str:
        return self.token_bytes.decode("utf-8", errors="replace")


@dataclass(frozen=True, slots=True)
class Usage:
    num_prompt_tokens: int
    num_cached_tokens: int
    num_completion_tokens: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """Part of an answer. `text` may lag behind `token_ids`; the last chunk has a finish reason and all the text.

    `usage` counts everything so far, resumed tokens included, and stands in the first and the last chunk at least.
    """

    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class ReplicaStats:
    """One reading of a replica. Counters count from the replica's start; `kv_usage` is in [0, 1]."""

    model: str
    num_running: int
    num_waiting: int
    num_blocks: int
    num_free_blocks: int
    """Blocks that can be handed out now, cached ones included."""
    kv_usage: float
    max_model_len: int
    num_preemptions: int
    num_prompt_tokens: int
    num_completion_tokens: int
    prefix_queries: int
    prefix_hits: int
    is_intact: bool
    """The last integrity check of the block manager (run whenever the engine falls idle) held."""
    heartbeat_age_s: float
    kernels: str
    phases_s: Mapping[str, float] = field(default_factory=dict)
    """Seconds each phase of the start took."""
    replica: str = ""
    """Tells the copies of one model apart; a replacement has another one."""


class MillraceError(Exception):
    """The root of all errors that Millrace raises on purpose. `message` is fit for the client."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class InvalidRequest(MillraceError):
    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.message, self.param)


class PromptTooLong(InvalidRequest):
    pass


class ModelNotFound(MillraceError):
    pass


class Overloaded(MillraceError):
    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.message, self.retry_after_s)


class ReplicaUnavailable(MillraceError):
    pass


class EngineError(MillraceError):
    pass
