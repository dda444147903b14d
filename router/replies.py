"""The response bodies of the endpoint as schemas, for /openapi.json and for tests that hold replies against it.

The replies themselves are put together in `openai.py`, without a detour through these classes.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

FinishReason = Literal["stop", "length"]
Count = Annotated[int, Field(ge=0)]


class Reply(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class ErrorDetail(Reply):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReplyBody(Reply):
    error: ErrorDetail


class PromptTokensDetails(Reply):
    cached_tokens: Count


class UsageReply(Reply):
    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count
    prompt_tokens_details: PromptTokensDetails
    cost_usd: Annotated[float, Field(ge=0)] | None = Field(description="Exact; null where the model has no price.")


class TokenAlternative(Reply):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprobs(TokenAlternative):
    top_logprobs: list[TokenAlternative]


class ChatLogprobs(Reply):
    content: list[TokenLogprobs]
    refusal: None


class AssistantMessage(Reply):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(Reply):
    index: Count
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | int | None


class ChatCompletion(Reply):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageReply


class ChatDelta(Reply):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(Reply):
    index: Count
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None = None


class ChatCompletionChunk(Reply):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: UsageReply | None = None


class CompletionLogprobs(Reply):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(Reply):
    index: Count
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | int | None


class Completion(Reply):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageReply


class CompletionChunkChoice(Reply):
    index: Count
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None = None


class CompletionChunk(Reply):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChunkChoice]
    usage: UsageReply | None = None


class ModelReply(Reply):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int | None


class ModelList(Reply):
    object: Literal["list"]
    data: list[ModelReply]


class EmbeddingReply(Reply):
    object: Literal["embedding"]
    index: Count
    embedding: list[float] | str


class EmbeddingUsage(Reply):
    prompt_tokens: Count
    total_tokens: Count


class EmbeddingList(Reply):
    object: Literal["list"]
    model: str
    data: list[EmbeddingReply]
    usage: EmbeddingUsage


class TokenizeReply(Reply):
    count: Count
    max_model_len: int
    tokens: list[int]


class DetokenizeReply(Reply):
    prompt: str


class HealthReply(Reply):
    status: Literal["alive"]


class ModelReadiness(Reply):
    id: str
    replicas: Count
    kernels: list[str]


class ReadinessReply(Reply):
    status: Literal["ready", "starting"]
    models: list[ModelReadiness]
