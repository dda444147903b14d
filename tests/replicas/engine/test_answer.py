"""The text of an answer beside its prompt: a completion goes on where the prompt ends, a chat's answer stands alone."""

from __future__ import annotations

import pytest

from replicas.engine.answer import Answer
from replicas.engine.request import Finish, Request, Status
from replicas.engine.sampling_params import SamplingParams
from replicas.engine.scheduler import RequestOutput
from replicas.types import Emitted
from tests.replicas.engine.bundled_vocabulary import sentencepiece_tokenizer

TOKENIZER = sentencepiece_tokenizer()
PROMPT = TOKENIZER.encode("hello")
OUTPUT = TOKENIZER.encode("hello world")[2:]


def text_of_answer(prompt: list[int], continues_prompt: bool) -> str:
    request = Request("r", prompt, SamplingParams())
    return Answer(TOKENIZER, request, Emitted(), continues_prompt).chunk([output_of(OUTPUT)]).text


def output_of(token_ids: list[int]) -> RequestOutput:
    return RequestOutput("r", tuple(token_ids), 0, finish=Finish(Status.FINISHED_LENGTH))


def test_a_completion_keeps_the_space_after_its_prompt() -> None:
    assert TOKENIZER.decode(PROMPT) + text_of_answer(PROMPT, True) == TOKENIZER.decode(PROMPT + OUTPUT) == "hello world"


def test_a_completion_of_nothing_visible_begins_like_a_text() -> None:
    assert text_of_answer([1], continues_prompt=True) == "world"


def test_the_answer_to_a_chat_begins_without_a_space() -> None:
    assert text_of_answer(PROMPT, continues_prompt=False) == "world"


@pytest.mark.parametrize("continues_prompt", [True, False])
def test_a_resumed_answer_goes_on_without_a_seam(continues_prompt: bool) -> None:
    whole = text_of_answer(PROMPT, continues_prompt)
    for num_chars in range(len(whole)):
        request = Request("r", PROMPT, SamplingParams(), emitted_token_ids=OUTPUT[:1])
        resumed = Answer(TOKENIZER, request, Emitted(tuple(OUTPUT[:1]), num_chars), continues_prompt)
        assert resumed.chunk([output_of(OUTPUT[1:])]).text == whole[num_chars:]
