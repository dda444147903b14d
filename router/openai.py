"""Between the wire and the domain: request bodies to `GenerateRequest`s, finished answers to response bodies.

Knows OpenAI's shapes and nothing of HTTP, models or replicas. Streams are `sse.py`'s.
"""

from __future__ import annotations

import base64
import codecs
import contextlib
import hashlib
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from replicas.engine.sampling_params import SamplingParams
from replicas.types import (
    ChatPrompt,
    Chunk,
    GenerateRequest,
    InvalidRequest,
    Prompt,
    TextPrompt,
    TokenLogprob,
    TokenPrompt,
    Usage,
)
from router.wire import ChatCompletionRequest, ChatMessage, CompletionRequest, SamplingBody

COMPLETION_MAX_TOKENS = 16
"""OpenAI's documented default of the older completions endpoint; a chat without a limit runs to the context's end."""

MAX_CHOICES = 128

LOWEST_LOGPROB = -9999.0
"""JSON has no minus infinity; OpenAI writes this for what is as good as impossible."""

RESERVED_TEMPLATE_NAMES = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "chat_template", "tokenize", "return_dict"}
)


@dataclass(slots=True)
class ChoiceText:
    """One finished choice, put together from its chunks."""

    parts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    def add(self, chunk: Chunk) -> None:
        self.parts.append(chunk.text)
        self.logprobs.extend(chunk.logprobs)
        if chunk.finish_reason is not None:
            self.finish_reason, self.stop_reason = chunk.finish_reason, chunk.stop_reason


def to_generate_requests(
    body: ChatCompletionRequest | CompletionRequest, *, request_id: str, tenant: str, draw_seed: Callable[[], int]
) -> list[GenerateRequest]:
    """One request a choice, prompt by prompt: choice `p * n + i` is answer `i` to prompt `p`.

    With a client's seed, answer `i` draws by (seed, i) alone, so a prompt's answers do not depend on the prompts
    beside it; without one, every choice gets its own of `draw_seed`'s 64 bits. Raises `InvalidRequest`.
    """
    prompts = [_chat_prompt(body)] if isinstance(body, ChatCompletionRequest) else _text_prompts(body)
    n = body.n or 1
    if n * len(prompts) > MAX_CHOICES:
        raise InvalidRequest(f"'n' times the number of prompts should be at most {MAX_CHOICES}.", "n")
    return [
        GenerateRequest(
            request_id=request_id if n * len(prompts) == 1 else f"{request_id}-{p * n + i}",
            model=body.model,
            prompt=prompt,
            sampling=_sampling(body, derived_seed(body.seed, i) if body.seed is not None else draw_seed()),
            cache_salt=tenant,
            num_siblings=n,
        )
        for p, prompt in enumerate(prompts)
        for i in range(n)
    ]


@contextlib.contextmanager
def fields_as_sent(body: ChatCompletionRequest | CompletionRequest) -> Iterator[None]:
    """Around whatever may refuse `body`: behind the wire there is one `max_tokens`, under whichever name it came."""
    try:
        yield
    except InvalidRequest as error:
        if not isinstance(body, ChatCompletionRequest) or body.max_completion_tokens is None:
            raise
        named = re.sub(r"\bmax_tokens\b", "max_completion_tokens", error.message)
        param = "max_completion_tokens" if error.param == "max_tokens" else error.param
        raise type(error)(named, param) from None


def derived_seed(seed: int, index: int) -> int:
    """64 unsigned bits for answer `index`; the first answer's seed is the client's own (mod 2**64), so that it is the
    same whatever `n` is."""
    if index == 0:
        return seed % 2**64
    digest = hashlib.blake2b(struct.pack("<QI", seed % 2**64, index), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def chat_prompt(
    messages: Sequence[ChatMessage], add_generation_prompt: bool | None, template_kwargs: dict[str, Any] | None
) -> ChatPrompt:
    """Raises `InvalidRequest` where `template_kwargs` would replace what the endpoint itself passes to the template."""
    if clashes := RESERVED_TEMPLATE_NAMES & (template_kwargs or {}).keys():
        name = sorted(clashes)[0]
        raise InvalidRequest(
            f"'chat_template_kwargs.{name}' is not the client's to set.", f"chat_template_kwargs.{name}"
        )
    return ChatPrompt(
        messages=tuple(_plain_message(message) for message in messages),
        add_generation_prompt=add_generation_prompt is not False,
        template_kwargs=template_kwargs or {},
    )


def chat_body(
    response_id: str,
    created: int,
    model: str,
    choices: Sequence[ChoiceText],
    usage: dict[str, Any],
    *,
    with_logprobs: bool,
) -> dict[str, Any]:
    return {
        "id": response_id,
        "object": "chat.completion",
        "created": created,
        "model": model,
        "choices": [
            {
                "index": index,
                "message": {"role": "assistant", "content": "".join(choice.parts), "refusal": None},
                "logprobs": chat_logprobs(choice.logprobs) if with_logprobs else None,
                "finish_reason": choice.finish_reason,
                "stop_reason": choice.stop_reason,
            }
            for index, choice in enumerate(choices)
        ],
        "usage": usage,
    }


def completion_body(
    response_id: str,
    created: int,
    model: str,
    choices: Sequence[ChoiceText],
    usage: dict[str, Any],
    *,
    with_logprobs: bool,
    echoes: Sequence[str],
) -> dict[str, Any]:
    """`echoes`: for each choice the prompt's text to stand before it, or nothing."""
    return {
        "id": response_id,
        "object": "text_completion",
        "created": created,
        "model": model,
        "choices": [
            {
                "index": index,
                "text": echo + "".join(choice.parts),
                "logprobs": completion_logprobs(choice.logprobs, TextOffsets()) if with_logprobs else None,
                "finish_reason": choice.finish_reason,
                "stop_reason": choice.stop_reason,
            }
            for index, (choice, echo) in enumerate(zip(choices, echoes, strict=True))
        ],
        "usage": usage,
    }


def usage_body(usage: Usage, cost_usd: float | None) -> dict[str, Any]:
    """`cost_usd` is Millrace's own field: exact, null where the model has no price."""
    return {
        "prompt_tokens": usage.num_prompt_tokens,
        "completion_tokens": usage.num_completion_tokens,
        "total_tokens": usage.num_prompt_tokens + usage.num_completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.num_cached_tokens},
        "cost_usd": cost_usd,
    }


def chat_logprobs(logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    return {
        "content": [
            {
                **_chat_token(entry),
                "top_logprobs": [_chat_token(alternative) for alternative in entry.top],
            }
            for entry in logprobs
        ],
        "refusal": None,
    }


class TextOffsets:
    """Where in the text of one choice each of its tokens begins, in characters.

    Tokens may share a character: then each of them begins at it."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._num_chars = 0

    def next(self, token: TokenLogprob) -> int:
        unfinished, _ = self._decoder.getstate()
        # how many characters there are with the token's first byte, which belongs to the last of them
        offset = self._num_chars + max(0, len((unfinished + token.token_bytes[:1]).decode(errors="replace")) - 1)
        self._num_chars += len(self._decoder.decode(token.token_bytes))
        return offset


def completion_logprobs(logprobs: Sequence[TokenLogprob], offsets: TextOffsets) -> dict[str, Any]:
    """The sampled token is always among the top. `offsets` has seen the tokens before these."""
    return {
        "tokens": [_token_name(entry) for entry in logprobs],
        "token_logprobs": [_finite(entry.logprob) for entry in logprobs],
        "top_logprobs": [
            {_token_name(scored): _finite(scored.logprob) for scored in (entry, *entry.top)} for entry in logprobs
        ],
        "text_offset": [offsets.next(entry) for entry in logprobs],
    }


def embedding_body(
    model: str, vectors: Sequence[Sequence[float]], num_tokens: int, *, as_base64: bool
) -> dict[str, Any]:
    """base64 of little-endian float32, which the official client asks for when its user asks for nothing."""
    return {
        "object": "list",
        "model": model,
        "data": [
            {"object": "embedding", "index": index, "embedding": _base64(vector) if as_base64 else list(vector)}
            for index, vector in enumerate(vectors)
        ],
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }


def _chat_prompt(body: ChatCompletionRequest) -> Prompt:
    return chat_prompt(body.messages, body.add_generation_prompt, body.chat_template_kwargs)


def _text_prompts(body: CompletionRequest) -> list[Prompt]:
    return [TextPrompt(prompt) if isinstance(prompt, str) else TokenPrompt(prompt) for prompt in body.prompt]


def _plain_message(message: ChatMessage) -> dict[str, Any]:
    # templates know no "developer": it is the newer name of the system role
    role = "system" if message.role == "developer" else message.role
    plain = {"role": role, "content": message.content}
    return plain if message.name is None else {**plain, "name": message.name}


def _sampling(body: SamplingBody, seed: int) -> SamplingParams:
    max_tokens = _max_tokens(body)
    if body.min_tokens and max_tokens is not None and body.min_tokens > max_tokens:
        raise InvalidRequest(f"'min_tokens' should be at most 'max_tokens' ({max_tokens}).", "min_tokens")
    # a nucleus of no mass is its one most likely token
    top_p, top_k = (1.0, 1) if body.top_p == 0 else (body.top_p, body.top_k)
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=body.temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=body.min_p or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=body.repetition_penalty,
        logit_bias=body.logit_bias or {},
        logprobs=_num_logprobs(body),
        seed=seed,
        stop=body.stop,
        include_stop_str_in_output=bool(body.include_stop_str_in_output),
        stop_token_ids=body.stop_token_ids or (),
        ignore_eos=bool(body.ignore_eos),
        min_tokens=body.min_tokens or 0,
        skip_special_tokens=body.skip_special_tokens is not False,
    )


def _max_tokens(body: SamplingBody) -> int | None:
    if isinstance(body, ChatCompletionRequest):
        return body.max_completion_tokens or body.max_tokens
    return body.max_tokens or COMPLETION_MAX_TOKENS


def _num_logprobs(body: SamplingBody) -> int | None:
    if isinstance(body, ChatCompletionRequest):
        return (body.top_logprobs or 0) if body.logprobs else None
    assert isinstance(body, CompletionRequest), f"no sampling body: {type(body)}"
    return body.logprobs


def _chat_token(scored: TokenLogprob) -> dict[str, Any]:
    return {"token": scored.token, "logprob": _finite(scored.logprob), "bytes": list(scored.token_bytes)}


def _token_name(scored: TokenLogprob) -> str:
    """Its text; of a part of a character, which has none, its bytes, so that no two tokens share a name."""
    try:
        return scored.token_bytes.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in scored.token_bytes)


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)


def _base64(vector: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
