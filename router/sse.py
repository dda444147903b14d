"""Answers as server-sent events, OpenAI's chunk by chunk. Everything that does not change within a stream is encoded
once; a chunk costs one small JSON encoding of its text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import orjson

from replicas.types import Chunk
from router.openai import TextOffsets, chat_logprobs, completion_logprobs

DONE = b"data: [DONE]\n\n"


class EventWriter(Protocol):
    def event(self, index: int, chunk: Chunk) -> bytes:
        """Of one chunk of choice `index`; empty where the chunk has nothing for the client yet."""
        ...

    def usage_event(self, usage: dict[str, Any]) -> bytes:
        """The last event before `DONE`, for clients that asked for `include_usage`."""
        ...


def error_event(body: dict[str, Any]) -> bytes:
    """The last event of a stream that failed: OpenAI's error object; no `DONE` follows."""
    return _event(body)


class ChatEvents:
    def __init__(self, response_id: str, created: int, model: str, *, with_logprobs: bool, with_usage: bool) -> None:
        self._frame = _Frame(response_id, "chat.completion.chunk", created, model, with_usage)
        self._with_logprobs = with_logprobs
        self._begun: set[int] = set()

    def event(self, index: int, chunk: Chunk) -> bytes:
        delta: dict[str, str] = {}
        if index not in self._begun:
            self._begun.add(index)
            delta = {"role": "assistant", "content": chunk.text}
        elif chunk.text:
            delta = {"content": chunk.text}
        shows_logprobs = self._with_logprobs and bool(chunk.logprobs)
        if not delta and chunk.finish_reason is None and not shows_logprobs:
            return b""
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": chat_logprobs(chunk.logprobs) if shows_logprobs else None,
            "finish_reason": chunk.finish_reason,
        }
        if chunk.finish_reason is not None:
            choice["stop_reason"] = chunk.stop_reason
        return self._frame.choice(choice)

    def usage_event(self, usage: dict[str, Any]) -> bytes:
        return self._frame.usage(usage)


class CompletionEvents:
    """`echoes`: for each choice the prompt's text, sent before its first chunk, or nothing."""

    def __init__(
        self,
        response_id: str,
        created: int,
        model: str,
        *,
        with_logprobs: bool,
        with_usage: bool,
        echoes: Sequence[str],
    ) -> None:
        self._frame = _Frame(response_id, "text_completion", created, model, with_usage)
        self._with_logprobs = with_logprobs
        self._echoes = list(echoes)
        self._offsets = [TextOffsets() for _ in self._echoes]

    def event(self, index: int, chunk: Chunk) -> bytes:
        text, self._echoes[index] = self._echoes[index] + chunk.text, ""
        shows_logprobs = self._with_logprobs and bool(chunk.logprobs)
        if not text and chunk.finish_reason is None and not shows_logprobs:
            return b""
        logprobs = completion_logprobs(chunk.logprobs, self._offsets[index]) if shows_logprobs else None
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": chunk.finish_reason}
        if chunk.finish_reason is not None:
            choice["stop_reason"] = chunk.stop_reason
        return self._frame.choice(choice)

    def usage_event(self, usage: dict[str, Any]) -> bytes:
        return self._frame.usage(usage)


class _Frame:
    """`{"id", "object", "created", "model", "choices": [...], "usage"}` around what changes."""

    def __init__(self, response_id: str, kind: str, created: int, model: str, with_usage: bool) -> None:
        fields = {"id": response_id, "object": kind, "created": created, "model": model}
        self._head = b"data: " + orjson.dumps(fields)[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if with_usage else b"]}\n\n"

    def choice(self, choice: dict[str, Any]) -> bytes:
        return b"".join((self._head, orjson.dumps(choice), self._tail))

    def usage(self, usage: dict[str, Any]) -> bytes:
        return b"".join((self._head, b'],"usage":', orjson.dumps(usage), b"}\n\n"))


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(body) + b"\n\n"
