"""The running app held against its own OpenAPI document, with generated requests, and streams against their schemas."""

from __future__ import annotations

import logging

import schemathesis
from gateway_harness import harness
from schemathesis.checks import CHECKS

APP = harness().app
logging.getLogger("httpx").setLevel(logging.WARNING)
schema = schemathesis.openapi.from_asgi("/openapi.json", APP)
print(CHECKS.get_all_names())
