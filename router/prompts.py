"""What can be said about a prompt without its model's tokenizer: the text to judge it by, and rough token counts."""

from __future__ import annotations

from replicas.types import ChatPrompt, Prompt, TextPrompt, TokenPrompt

CHARS_PER_TOKEN = 4.0
"""A usual figure for English in vocabularies of 32 k to 128 k; only predictions use it, never a bill."""

MAX_CHARS_PER_TOKEN = 16
"""Ordinary text is never denser than this, so a prompt that does not fit by it does not fit."""

TOKENS_PER_MESSAGE = 4
"""Role and delimiters, in the usual templates."""


def field_of(prompt: Prompt) -> str:
    """Where it stands in the client's request."""
    return "messages" if isinstance(prompt, ChatPrompt) else "prompt"


def judged_text(prompt: Prompt) -> str:
    """The last user turn of a chat, the text of a completion; token ids have none."""
    match prompt:
        case ChatPrompt(messages=messages):
            turns = [str(message["content"]) for message in messages if message["role"] == "user"]
            return turns[-1] if turns else ""
        case TextPrompt(text=text):
            return text
        case TokenPrompt():
            return ""


def likely_num_tokens(prompt: Prompt) -> int:
    return _num_tokens(prompt, CHARS_PER_TOKEN)


def least_num_tokens(prompt: Prompt) -> int:
    return _num_tokens(prompt, MAX_CHARS_PER_TOKEN)


def _num_tokens(prompt: Prompt, chars_per_token: float) -> int:
    match prompt:
        case ChatPrompt(messages=messages):
            num_chars = sum(len(str(message["content"])) for message in messages)
            return len(messages) * TOKENS_PER_MESSAGE + int(num_chars / chars_per_token)
        case TextPrompt(text=text):
            return int(len(text) / chars_per_token)
        case TokenPrompt(token_ids=token_ids):
            return len(token_ids)
