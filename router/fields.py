"""Field types of the wire schemas that pydantic has no word for: each checks, explains and describes itself.

The JSON schema beside each check is what /openapi.json shows, so it must say the same as the check.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

MAX_INT32 = 2**31 - 1
MAX_STOPS = 16

TokenId = Annotated[int, Field(ge=0, le=MAX_INT32)]

_TOKEN_ID_SCHEMA = {"type": "integer", "minimum": 0, "maximum": MAX_INT32}
_TEXT_SCHEMA = {"type": "string", "minLength": 1}


def refusal(message: str, param: str | None = None) -> PydanticCustomError:
    """`param` only where a whole body is checked; the field's own checks are placed by pydantic."""
    return PydanticCustomError("refused", "{text}", {"text": message, "param": param})


def _refuse_unless_empty(value: Any) -> None:
    """Fields of OpenAI's that ask for something Millrace does not do: ignoring them would be a wrong answer."""
    if value is not None:
        raise refusal("this is not supported yet; leave it out")


Unsupported = Annotated[None, BeforeValidator(_refuse_unless_empty), WithJsonSchema({"type": "null"})]


def _refuse_unless_empty_array(value: Any) -> None:
    if value is not None and value != []:
        raise refusal("this is not supported yet; leave it out")


UnsupportedList = Annotated[
    None,
    BeforeValidator(_refuse_unless_empty_array),
    WithJsonSchema({"anyOf": [{"type": "array", "maxItems": 0}, {"type": "null"}]}),
]


def _only_text(value: Any) -> None:
    if value not in (None, {"type": "text"}):
        raise refusal("only {'type': 'text'} is supported yet")


ResponseFormat = Annotated[
    None,
    BeforeValidator(_only_text),
    WithJsonSchema(
        {
            "anyOf": [
                {
                    "type": "object",
                    "properties": {"type": {"const": "text"}},
                    "required": ["type"],
                    "additionalProperties": False,
                },
                {"type": "null"},
            ]
        }
    ),
]


def _stop(value: Any) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise refusal(f"this should be a non-empty string or an array of up to {MAX_STOPS} of them")
    return tuple(stops)


Stop = Annotated[
    tuple[str, ...],
    BeforeValidator(_stop),
    WithJsonSchema(
        {"anyOf": [_TEXT_SCHEMA, {"type": "array", "items": _TEXT_SCHEMA, "maxItems": MAX_STOPS}, {"type": "null"}]}
    ),
]


def _logit_bias(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    # ASCII digits only: int() would also take "١", "+1" and "1_0"
    if not all(key.isascii() and key.isdigit() and len(key) <= 10 and int(key) <= MAX_INT32 for key in value):
        raise refusal("the keys should be token ids: strings of decimal digits")
    return {int(key): bias for key, bias in value.items()}


LogitBias = Annotated[
    dict[int, Annotated[float, Field(ge=-100, le=100)]] | None,
    BeforeValidator(_logit_bias),
    WithJsonSchema(
        {
            "anyOf": [
                {
                    "type": "object",
                    "propertyNames": {"pattern": "^[0-9]{1,9}$"},
                    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
                },
                {"type": "null"},
            ]
        }
    ),
]


def _text_prompt(value: Any) -> tuple[str | tuple[int, ...], ...]:
    """One prompt or several, as text or token ids: always several afterwards."""
    if isinstance(value, str) or (isinstance(value, list) and value and _is_token_id(value[0])):
        value = [value]
    if not isinstance(value, list) or not value:
        raise refusal("this should be a string, an array of strings, an array of token ids or an array of such arrays")
    if len(value) > MAX_PROMPTS:
        raise refusal(f"there should be at most {MAX_PROMPTS} prompts in one request")
    if all(isinstance(prompt, str) for prompt in value):
        if not all(value):
            raise refusal("a prompt should not be empty")
        return tuple(value)
    if not all(isinstance(prompt, list) and prompt and all(map(_is_token_id, prompt)) for prompt in value):
        raise refusal("token ids should be non-empty arrays of integers from 0 up, and not be mixed with strings")
    return tuple(map(tuple, value))


MAX_PROMPTS = 128


def _is_token_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_INT32


_TOKENS_SCHEMA = {"type": "array", "items": _TOKEN_ID_SCHEMA, "minItems": 1}

TextPrompts = Annotated[
    tuple[str | tuple[int, ...], ...],
    BeforeValidator(_text_prompt),
    WithJsonSchema(
        {
            "anyOf": [
                _TEXT_SCHEMA,
                {"type": "array", "items": _TEXT_SCHEMA, "minItems": 1, "maxItems": MAX_PROMPTS},
                _TOKENS_SCHEMA,
                {"type": "array", "items": _TOKENS_SCHEMA, "minItems": 1, "maxItems": MAX_PROMPTS},
            ]
        }
    ),
]


def _embedding_input(value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if isinstance(texts, list) and texts and isinstance(texts[0], int | list):
        raise refusal("token ids cannot be embedded here: the embedder has its own tokenizer; send text")
    if not isinstance(texts, list) or not 0 < len(texts) <= MAX_EMBEDDED:
        raise refusal(f"this should be a string or an array of 1 to {MAX_EMBEDDED} strings")
    if not all(isinstance(text, str) and text for text in texts):
        raise refusal("this should hold nothing but non-empty strings")
    return tuple(texts)


MAX_EMBEDDED = 2048

EmbeddingInput = Annotated[
    tuple[str, ...],
    BeforeValidator(_embedding_input),
    WithJsonSchema(
        {"anyOf": [_TEXT_SCHEMA, {"type": "array", "items": _TEXT_SCHEMA, "minItems": 1, "maxItems": MAX_EMBEDDED}]}
    ),
]


def _content(value: Any) -> str:
    """A string, or text parts, which are joined by line breaks as the usual chat templates expect one string."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise refusal("this should be a string or a non-empty array of text parts")
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise refusal(f"content parts of type {kind[:40]!r} are not supported yet; send text")
        if kind != "text" or not isinstance(part.get("text"), str) or part.keys() - {"type", "text"}:
            raise refusal("each content part should be {'type': 'text', 'text': '...'}")
    return "\n".join(part["text"] for part in value)


Content = Annotated[
    str,
    BeforeValidator(_content),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {
                    "type": "array",
                    "minItems": 1,
                    "items": {
                        "type": "object",
                        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                        "required": ["type", "text"],
                        "additionalProperties": False,
                    },
                },
            ]
        }
    ),
]
