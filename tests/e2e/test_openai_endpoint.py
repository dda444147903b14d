"""The official client against the whole road: every call, streaming and not, sync and async."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletionMessageParam

from tests.e2e.conftest import Server

pytestmark = pytest.mark.e2e

MODEL = "smollm2-135m"
QUESTION: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Name the capital of France."}]
NO_CACHE = {"cache-control": "no-cache, no-store"}


@pytest.fixture
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="unused", default_headers=NO_CACHE, max_retries=0)


def test_models_lists_every_model_and_the_embedder(client: OpenAI) -> None:
    ids = {m.id for m in client.models.list()}
    assert {MODEL, "tiny", "all-minilm-l6-v2"} <= ids
    assert client.models.retrieve(MODEL).id == MODEL


def test_chat(client: OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL,
        messages=QUESTION,
        temperature=0,
        max_completion_tokens=24,
    )
    answer = raw.parse()
    assert "Paris" in (answer.choices[0].message.content or "")
    assert raw.headers["x-millrace-model"] == MODEL
    assert raw.headers["x-millrace-route-reason"] == "requested"
    assert raw.headers["x-millrace-cache"] == "bypass"
    usage = answer.usage
    assert usage is not None
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details is not None
    cost = (usage.prompt_tokens * 0.02 + usage.completion_tokens * 0.06) / 1e6
    assert 0 < float(raw.headers["x-millrace-cost-usd"]) <= cost * 1.001


def test_chat_stream_is_the_whole_answer_in_pieces(client: OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=40)
    stream = client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        temperature=0,
        max_tokens=40,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert sum(bool(c.choices) for c in chunks) > 3, "tokens arrive one by one, not all at the end"
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_completions_with_echo_n_logprobs_and_stop(client: OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="One, two, three,", temperature=0, max_tokens=12, echo=True)
    assert answer.choices[0].text.startswith("One, two, three,")
    several = client.completions.create(model=MODEL, prompt=["a", "b"], n=2, seed=7, max_tokens=4, logprobs=2)
    assert [c.index for c in several.choices] == [0, 1, 2, 3]
    for choice in several.choices:
        assert choice.logprobs is not None
        assert len(choice.logprobs.tokens or ()) == len(choice.logprobs.token_logprobs or ()) > 0
    stopped = client.completions.create(model=MODEL, prompt="1 2 3 4 5", temperature=0, max_tokens=30, stop=["7"])
    assert "7" not in stopped.choices[0].text
    assert stopped.choices[0].finish_reason == "stop"


def test_chat_logprobs_have_the_alternatives(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        temperature=0,
        max_tokens=5,
        logprobs=True,
        top_logprobs=3,
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    content = logprobs.content
    assert content is not None
    assert len(content) == 5
    for token in content:
        assert len(token.top_logprobs) == 3
        assert token.logprob == pytest.approx(token.top_logprobs[0].logprob), "greedy takes the likeliest"


def test_a_seed_repeats_and_another_differs(client: OpenAI) -> None:
    def sample(seed: int) -> str:
        answer = client.completions.create(
            model=MODEL, prompt="Once upon a time", temperature=1.2, seed=seed, max_tokens=24
        )
        return answer.choices[0].text

    assert sample(1) == sample(1)
    assert len({sample(s) for s in range(4)}) > 1


def test_vllm_parameters(client: OpenAI) -> None:
    extra = {
        "top_k": 5,
        "min_p": 0.05,
        "repetition_penalty": 1.3,
        "ignore_eos": True,
        "min_tokens": 9,
        "stop_token_ids": [0],
    }
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=10, seed=1, extra_body=extra)
    assert answer.usage is not None
    assert answer.usage.completion_tokens in (9, 10)


def test_logit_bias_and_penalties(client: OpenAI, http: httpx.Client) -> None:
    (token,) = http.post("/tokenize", json={"model": MODEL, "prompt": " Paris", "add_special_tokens": False}).json()[
        "tokens"
    ]
    banned = client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        temperature=0,
        max_tokens=20,
        logit_bias={str(token): -100},
        presence_penalty=0.5,
        frequency_penalty=0.5,
        user="somebody",
    )
    assert " Paris" not in (banned.choices[0].message.content or "")


def test_embeddings_are_normalised_in_both_encodings(client: OpenAI) -> None:
    answer = client.embeddings.create(model="all-minilm-l6-v2", input=["hello", "good morning"])
    floats = client.embeddings.create(model="all-minilm-l6-v2", input="hello", encoding_format="float")
    assert len(answer.data) == 2
    assert len(answer.data[0].embedding) == 384
    assert sum(x * x for x in answer.data[0].embedding) == pytest.approx(1, abs=1e-2)
    assert floats.data[0].embedding == pytest.approx(answer.data[0].embedding, abs=1e-2)
    assert answer.usage.prompt_tokens > 0


def test_tokenize_round_trip(http: httpx.Client) -> None:
    text = "Grüße aus 東京 🙂"
    tokens = http.post("/tokenize", json={"model": MODEL, "prompt": text, "add_special_tokens": False}).json()
    assert tokens["count"] == len(tokens["tokens"])
    assert http.post("/detokenize", json={"model": MODEL, "tokens": tokens["tokens"]}).json()["prompt"] == text


def test_auto_takes_the_cheapest_capable(client: OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(model="auto", messages=QUESTION, max_tokens=2)
    assert raw.headers["x-millrace-model"] == MODEL, "tiny is cheaper, but not good enough"
    assert raw.headers["x-millrace-route-reason"] == "cheapest-capable"


async def test_async_client_streams_side_by_side(server: Server) -> None:
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", default_headers=NO_CACHE, max_retries=0) as client:

        async def ask(i: int) -> str:
            stream = await client.completions.create(
                model="tiny", prompt=f"{i} fox", max_tokens=20, seed=i, stream=True
            )
            return "".join([c.choices[0].text async for c in stream])

        first = await asyncio.gather(*[ask(i) for i in range(16)])
        assert first == await asyncio.gather(*[ask(i) for i in range(16)])


@pytest.mark.timeout(240)
async def test_deltas_concatenate_to_the_whole_text_for_500_random_requests(server: Server) -> None:
    """Random bytes of a random model, stop strings split over tokens included."""
    rng = random.Random(0)
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", default_headers=NO_CACHE, max_retries=0) as client:
        gate = asyncio.Semaphore(16)

        async def check(i: int) -> None:
            prompt = "".join(rng.choices("abc 東🙂é\n", k=rng.randint(1, 30)))
            base: dict[str, Any] = {"model": "tiny", "prompt": prompt, "seed": i, "max_tokens": rng.randint(1, 40)}
            base |= {"temperature": rng.choice([0, 0.7, 1.5]), "top_p": rng.choice([1, 0.9])}
            async with gate:
                free = await client.completions.create(**base)
                text = free.choices[0].text
                at = rng.randrange(max(1, len(text) - 2))
                stop = text[at : at + rng.randint(1, 4)]
                # U+FFFD may stand for bytes that a later token completes: no stop string can be found in it.
                if stop and "\ufffd" not in stop and rng.random() < 0.8:
                    base["stop"] = [stop, "zzz"]
                whole = await client.completions.create(**base)
                stream = await client.completions.create(**base, stream=True)
                pieces = [c.choices[0] async for c in stream if c.choices]
            assert "".join(p.text for p in pieces) == whole.choices[0].text
            assert pieces[-1].finish_reason == whole.choices[0].finish_reason
            if "stop" in base:
                assert base["stop"][0] not in whole.choices[0].text
                assert text.startswith(whole.choices[0].text)

        await asyncio.gather(*[check(i) for i in range(500)])


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"model": "nope", "messages": QUESTION}, 404, None),
        ({"model": MODEL, "messages": []}, 400, "messages"),
        ({"model": MODEL, "messages": QUESTION, "temperature": -1}, 400, "temperature"),
        ({"model": MODEL, "messages": QUESTION, "max_tokens": "many"}, 400, "max_tokens"),
        ({"model": MODEL, "messages": QUESTION, "max_tokens": 10**9}, 400, "max_tokens"),
        ({"model": MODEL, "messages": QUESTION, "temprature": 0}, 400, "temprature"),
        ({"model": MODEL, "messages": [{"role": "user", "content": "x " * 3000}]}, 400, "messages"),
        ({"model": MODEL, "messages": QUESTION, "n": 128, "max_tokens": 900}, 400, "n"),
    ],
)
def test_bad_input_names_the_field(http: httpx.Client, body: dict[str, object], status: int, param: str | None) -> None:
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["message"]
    if param is not None:
        assert error["param"] == param, error


def test_the_client_raises_its_own_errors(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="nope", messages=QUESTION)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=9)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe{}", b"[]", b"", b'{"model": "tiny", "messages": "\xed\xa0\x80"}'])
def test_bytes_that_are_no_request(http: httpx.Client, content: bytes) -> None:
    answer = http.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


def test_too_large_unknown_and_wrong_method(http: httpx.Client) -> None:
    too_large, as_json = b"x" * (5 * 2**20), {"content-type": "application/json"}
    assert http.post("/v1/completions", content=too_large, headers=as_json).status_code == 413
    assert http.get("/v1/nothing").json()["error"]["message"]
    wrong = http.get("/v1/chat/completions")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")


def test_as_many_embeddings_as_one_request_may_ask_for(http: httpx.Client) -> None:
    """Their vectors together exceed what one reply between replicas may hold."""
    body = {"model": "all-minilm-l6-v2", "input": ["mill"] * 2047 + ["race"]}
    answer = http.post("/v1/embeddings", json=body)
    assert answer.status_code == 200, answer.text[:300]
    vectors = answer.json()["data"]
    assert [entry["index"] for entry in vectors] == list(range(2048))
    assert vectors[2046]["embedding"] != vectors[2047]["embedding"]
    body["input"] = ["mill"] * 300 + ["race " * 400]
    refused = http.post("/v1/embeddings", json=body)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "input.300"
