"""The running app held against its own OpenAPI document, with generated requests, and streams against their schemas."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import CHECKS
from schemathesis.generation import GenerationMode

from router.replies import ChatCompletionChunk, CompletionChunk
from tests.router.gateway_harness import chat, harness, sse_data

schema = schemathesis.openapi.from_asgi("/openapi.json", harness().app)

# Some rules join two fields (`top_logprobs` needs `logprobs`, `min_tokens` is at most `max_tokens`). No schema says
# them, so a request that keeps the schema may still get a documented 400.
JOINED_FIELDS = CHECKS.get_by_names(["positive_data_acceptance"])


@pytest.mark.slow
@schema.parametrize()
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_the_app_keeps_its_document(case: Any) -> None:
    # a random name is a model that does not exist: only a name that does leads further than 404
    if case.meta.generation.mode is GenerationMode.POSITIVE and isinstance(case.body, dict) and "model" in case.body:
        case.body["model"] = "minilm" if case.path.endswith("/embeddings") else "small"
    case.call_and_validate(excluded_checks=JOINED_FIELDS)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("with_usage", [False, True])
async def test_every_event_keeps_the_documented_schema(path: str, n: int, with_usage: bool) -> None:
    is_chat = path.endswith("chat/completions")
    body = chat(logprobs=True, top_logprobs=2) if is_chat else {"model": "small", "prompt": "a", "logprobs": 2}
    body |= {"stream": True, "n": n, "stream_options": {"include_usage": with_usage}}
    async with harness().http() as client:
        events = sse_data((await client.post(path, json=body)).text)
    assert events.pop() == "[DONE]"
    chunks = [(ChatCompletionChunk if is_chat else CompletionChunk).model_validate(event) for event in events]
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert (chunks[-1].usage is not None) == with_usage
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices]
    assert len([reason for reason in reasons if reason is not None]) == n
