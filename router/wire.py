"""The request bodies of the endpoint as pydantic schemas: OpenAI's fields with OpenAI's ranges, and vLLM's beside them.

Strict: a string is no number, a boolean no integer, an unknown field is refused by name. Fields of OpenAI's that do not
change the answer are accepted and ignored; those that would, and are not there yet, are refused (`Unsupported`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from replicas.engine.sampling_params import MAX_LOGPROBS
from router.errors import invalid_request
from router.fields import (
    MAX_INT32,
    Content,
    EmbeddingInput,
    LogitBias,
    ResponseFormat,
    Stop,
    TextPrompts,
    TokenId,
    Unsupported,
    UnsupportedList,
    refusal,
)

Name = Annotated[str, Field(min_length=1, max_length=512)]
Count = Annotated[int, Field(ge=1, le=MAX_INT32)]


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


B = TypeVar("B", bound=Body)


def parse(schema: type[B], raw: bytes) -> B:
    """Raises `InvalidRequest` with the dotted path of the first mistake; also for bytes that are no JSON object."""
    try:
        return schema.model_validate_json(raw)
    except ValidationError as error:
        raise invalid_request(error) from None


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    """Ignored: nothing is padded here."""


class SamplingBody(Body):
    """What chat and text completions share."""

    model: Name
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: LogitBias = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Stop = ()
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    # vLLM's
    top_k: Annotated[int, Field(ge=-1, le=MAX_INT32)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    stop_token_ids: Annotated[tuple[TokenId, ...], Field(max_length=128)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_INT32)] | None = None
    skip_special_tokens: bool | None = None

    user: str | None = None
    """Ignored, like the other fields that only tell OpenAI who asks or what to keep."""

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise refusal("this is only allowed together with 'stream': true", "stream_options")
        return self


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: str | None = None

    # what an assistant message carries when a client sends it back; empty, or not part of the next prompt
    refusal: str | None = None
    annotations: tuple[dict[str, Any], ...] | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    audio: Unsupported = None
    function_call: Unsupported = None
    tool_calls: UnsupportedList = None


class ChatCompletionRequest(SamplingBody):
    messages: Annotated[tuple[ChatMessage, ...], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    """Wins over `max_tokens`, its older name."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    echo: Literal[False] | None = None

    store: bool | None = None
    metadata: dict[str, str] | None = None
    service_tier: str | None = None
    parallel_tool_calls: bool | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    verbosity: str | None = None
    reasoning_effort: str | None = None
    tool_choice: Literal["none", "auto"] | None = None
    function_call: Literal["none", "auto"] | None = None
    modalities: Annotated[tuple[Literal["text"], ...], Field(min_length=1)] | None = None
    response_format: ResponseFormat = None

    tools: UnsupportedList = None
    functions: UnsupportedList = None
    audio: Unsupported = None
    prediction: Unsupported = None
    moderation: Unsupported = None
    web_search_options: Unsupported = None

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise refusal("this is only allowed together with 'logprobs': true", "top_logprobs")
        return self


class CompletionRequest(SamplingBody):
    prompt: TextPrompts
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=128)] | None = None
    suffix: Unsupported = None

    @model_validator(mode="after")
    def _no_extra_candidates(self) -> Self:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise refusal("a number other than 'n' is not supported yet; leave it out", "best_of")
        if self.echo and self.logprobs is not None:
            raise refusal("log-probabilities of the prompt are not supported yet: leave out 'logprobs'", "echo")
        return self


class EmbeddingRequest(Body):
    model: Name
    input: EmbeddingInput
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Count | None = None
    user: str | None = None


class TokenizeRequest(Body):
    """Exactly one of `prompt` and `messages`."""

    model: Name | None = None
    prompt: str | None = None
    messages: Annotated[tuple[ChatMessage, ...], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise refusal("exactly one of 'prompt' and 'messages' is needed", "prompt")
        return self


class DetokenizeRequest(Body):
    model: Name | None = None
    tokens: tuple[TokenId, ...]
