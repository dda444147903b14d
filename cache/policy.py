"""What may be answered from the cache, and under which key: pure arithmetic over a request. No clock, no I/O, no model.

Who asks and what is asked stay apart (`cache/types.py`): everything but the last user turn goes into an exact
`partition`, so similarity can never carry an answer over to another tenant, system prompt, history or setting.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cache.types import CacheQuery
from replicas.engine.sampling_params import SamplingParams
from replicas.types import ChatPrompt, GenerateRequest, TextPrompt, TokenPrompt

PARTITION_EPOCH = "millrace-cache-1"
"""Part of every partition. Change it when keys or the meaning of an entry change: old entries are then never found."""

_MAX_AGE_S = 2**31
"""RFC 9111 §1.2.2: a larger delta-seconds counts as this."""


@dataclass(frozen=True, slots=True)
class Bypass:
    """The request is neither looked up nor stored; `reason` is a short token for logs and metrics."""

    reason: str


@dataclass(frozen=True, slots=True)
class CacheControl:
    """The request directives of RFC 9111 §5.2.1 that a cache of answers can honour."""

    no_cache: bool = False
    """Make the answer afresh; it may still be stored."""
    no_store: bool = False
    """A stored answer may be used, but this one is not kept."""
    max_age_s: float | None = None

    @classmethod
    def parse(cls, header: str | None) -> CacheControl:
        """Read a `cache-control` request header. Never raises: unknown directives are ignored, and an unreadable
        `max-age` is taken for the strictest (RFC 9111 §4.2.1 has such a response count as stale)."""
        no_cache = no_store = False
        max_age_s: float | None = None
        for name, argument in _directives(header or ""):
            if name == "no-cache":
                no_cache = True
            elif name == "no-store":
                no_store = True
            elif name == "max-age":
                age_s = _delta_seconds(argument)
                max_age_s = age_s if max_age_s is None else min(max_age_s, age_s)
        if max_age_s == 0:
            return cls(no_cache=True, no_store=no_store)
        return cls(no_cache=no_cache, no_store=no_store, max_age_s=max_age_s)


def plan(
    request: GenerateRequest, *, tenant: str, model_class: str, control: CacheControl, allow_sampled: bool
) -> CacheQuery | Bypass:
    """The query for `request`, or why it has none.

    `model_class` is the model id that was asked for, or "auto". `allow_sampled` is the operator's opt-in for
    answers drawn at a temperature above 0; those are cached per seed.
    """
    reason = _why_not(request, control, allow_sampled)
    if reason is not None:
        return Bypass(reason)
    context, question, text = _split_prompt(request.prompt)
    try:
        partition = digest(
            [PARTITION_EPOCH, tenant, model_class, request.cache_salt, _shape_of_answer(request.sampling), context]
        )
        exact_key = digest([partition, question])
    except TypeError:  # a message holds something that is not plain JSON data
        return Bypass("prompt")
    return CacheQuery(
        exact_key=exact_key,
        partition=partition,
        text=text,
        max_age_s=control.max_age_s,
        may_read=not control.no_cache,
        may_store=not control.no_store,
    )


def digest(value: Any) -> str:
    """SHA-256, in hex, of plain data (None, bool, int, float, str, bytes, sequences, mappings with such keys).

    Different values have different encodings: each is written as a type tag and, where its length varies, a length
    prefix, so no content can imitate a field boundary. Mappings are unordered; 1 and 1.0 differ.
    Raises TypeError for anything else.
    """
    parts: list[bytes] = []
    _encode(value, parts)
    return hashlib.sha256(b"".join(parts)).hexdigest()


def _why_not(request: GenerateRequest, control: CacheControl, allow_sampled: bool) -> str | None:
    if control.no_cache and control.no_store:
        return "no-store"
    if request.emitted.token_ids or request.emitted.num_chars:
        return "resumed"
    if request.num_siblings != 1:
        return "n"
    if request.sampling.logprobs is not None:
        return "logprobs"
    if isinstance(request.prompt, ChatPrompt) and request.prompt.tools:
        return "tools"
    if request.sampling.temperature != 0 and not allow_sampled:
        return "sampled"
    return None


_ONLY_WHEN_SAMPLED = frozenset({"seed", "top_p", "top_k", "min_p"})
_FLOATS = frozenset(
    {"temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"},
)


def _shape_of_answer(sampling: SamplingParams) -> dict[str, Any]:
    """Every sampling parameter that can change the text. Fields are enumerated, so a new one is never forgotten.

    Greedy decoding takes the argmax, which no filter removes and no seed moves: those fields are left out there.
    """
    is_greedy = sampling.temperature == 0
    shape: dict[str, Any] = {}
    for field in dataclasses.fields(sampling):
        if is_greedy and field.name in _ONLY_WHEN_SAMPLED:
            continue
        value = getattr(sampling, field.name)
        if field.name in _FLOATS and value is not None:
            value = float(value) + 0.0  # 0, 0.0 and -0.0 are one setting
        elif field.name == "logit_bias":
            value = {int(token_id): float(bias) for token_id, bias in value.items()}
        shape[field.name] = value
    return shape


def _split_prompt(prompt: ChatPrompt | TextPrompt | TokenPrompt) -> tuple[list[Any], Any, str | None]:
    """(what must agree exactly, the question, its text where similarity may compare it)."""
    if isinstance(prompt, TextPrompt):
        return ["text"], prompt.text, None
    if isinstance(prompt, TokenPrompt):
        return ["tokens"], list(prompt.token_ids), None
    options = [prompt.add_generation_prompt, prompt.template_kwargs, prompt.tools]
    text = _last_user_text(prompt)
    if text is None:
        return ["chat", *options], list(prompt.messages), None
    *history, last = prompt.messages
    content = last["content"]
    # Templates may render a list of parts otherwise than a string, so the two kinds never meet.
    frame = {name: value for name, value in last.items() if name != "content"}
    return ["chat-turn", *options, history, frame, isinstance(content, str)], content, text


def _last_user_text(prompt: ChatPrompt) -> str | None:
    """The text of the last message if it is a user's, plain and not blank."""
    if not prompt.messages or prompt.messages[-1].get("role") != "user" or not prompt.add_generation_prompt:
        return None
    content = prompt.messages[-1].get("content")
    if isinstance(content, str):
        text = content
    elif isinstance(content, Sequence) and all(_is_text_part(part) for part in content):
        text = "\n".join(part["text"] for part in content)
    else:
        return None
    return text if text.strip() else None


def _is_text_part(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _encode(value: Any, parts: list[bytes]) -> None:
    if value is None:
        parts.append(b"n")
    elif isinstance(value, bool):
        parts.append(b"t" if value else b"f")
    elif isinstance(value, int):
        parts.append(b"i%d;" % value)
    elif isinstance(value, float):
        parts.append(b"d" + struct.pack(">d", value))
    elif isinstance(value, str):
        raw = value.encode("utf-8", "surrogatepass")
        parts.append(b"s%d:" % len(raw) + raw)
    elif isinstance(value, bytes):
        parts.append(b"b%d:" % len(value) + value)
    elif isinstance(value, Mapping):
        _encode_mapping(value, parts)
    elif isinstance(value, Sequence):
        parts.append(b"l%d:" % len(value))
        for item in value:
            _encode(item, parts)
    else:
        raise TypeError(f"cannot digest a {type(value).__name__}: only plain data has a canonical form")


def _encode_mapping(value: Mapping[Any, Any], parts: list[bytes]) -> None:
    items: list[tuple[bytes, bytes]] = []
    for name, item in value.items():
        name_parts: list[bytes] = []
        item_parts: list[bytes] = []
        _encode(name, name_parts)
        _encode(item, item_parts)
        items.append((b"".join(name_parts), b"".join(item_parts)))
    parts.append(b"m%d:" % len(items))
    for encoded in sorted(items):
        parts.extend(encoded)


# A directive is a token, optionally `=` and a token or a quoted string (RFC 9110 §5.6); commas inside quotes are text.
_DIRECTIVE = re.compile(r'\s*([!#$%&\'*+.^_`|~\w-]+)(?:=("(?:[^"\\]|\\.)*"|[^,]*))?[^,]*(?:,|$)|[^,]*(?:,|$)')


def _directives(header: str) -> list[tuple[str, str | None]]:
    return [(match[1].lower(), match[2]) for match in _DIRECTIVE.finditer(header) if match[1] is not None]


def _delta_seconds(argument: str | None) -> float:
    """Seconds, 0 where `argument` is not a delta-seconds (RFC 9111 §1.2.2; the quoted form is accepted)."""
    digits = (argument or "").strip().strip('"')
    if not (digits.isascii() and digits.isdigit()):
        return 0.0
    return float(_MAX_AGE_S if len(digits) > 10 else min(int(digits), _MAX_AGE_S))
