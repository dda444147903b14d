"""One JSON object a log line, so that every line can be found by its request id. Never a prompt, an answer or a key."""

from __future__ import annotations

import logging

import orjson

log = logging.getLogger("millrace.gateway")


def line(event: str, **fields: object) -> str:
    return orjson.dumps({"event": event, **fields}).decode()
