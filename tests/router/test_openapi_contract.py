"""The running app held against its own OpenAPI document, with generated requests, and streams against their schemas."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import schemathesis
from gateway_harness import chat, harness, sse_data
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import CHECKS

from router.replies import ChatCompletionChunk, CompletionChunk

APP = harness().app
logging.getLogger("httpx").setLevel(logging.WARNING)
schema = schemathesis.openapi.from_asgi("/openapi.json", APP)
print(CHECKS.get_all_names())
