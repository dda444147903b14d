"""The released text never depends on how a token sequence was split, and never says what a stop string cuts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders

from replicas.engine.detokenizer import Detokenizer, StopMatch
from replicas.engine.gguf_tokenizer import read_gguf
from replicas.engine.sampling_params import SamplingParams
from replicas.engine.token_text import TokenText
from replicas.engine.tokenizer import Tokenizer
from replicas.types import Emitted
from tests.replicas.engine.bundled_vocabulary import bundled_tokenizer, sentencepiece_fields, sentencepiece_tokenizer

TOKENIZERS = {"byte-level": bundled_tokenizer, "sentencepiece": sentencepiece_tokenizer}
TEXTS = [
    "hello world",
    "  hello, hello!",
    "naïve 你好 hello",
    "👩‍👩‍👧‍👦 family 🇩🇪",
    "a\n\nb",
    "你好你好",
    "\ufffd real",
    "é" * 5,
]
STOPS = [
    "hello",
    "ell",
    "lo w",
    "o",
    "你好",
    "你",
    "👩",
    "\n\n",
    "aab",
    "aaab",
    "ab",
    "world",
    "zzz",
    "\ufffd",
    " ",
    "hellohello",
]


@st.composite
def token_sequences(draw: st.DrawFn, tokenizer: Tokenizer) -> list[int]:
    """Pieces of real text mixed with arbitrary tokens: broken characters, special tokens, ids that do not exist."""
    pieces = draw(
        st.lists(
            st.one_of(
                st.sampled_from(TEXTS).map(lambda text: tokenizer.encode(text, add_special_tokens=False)),
                st.text(alphabet="ab hello你👩", max_size=6).map(
                    lambda t: tokenizer.encode(t, add_special_tokens=False)
                ),
                st.lists(st.integers(0, tokenizer._backend.get_vocab_size() + 3), max_size=4),
                st.lists(st.sampled_from(byte_tokens(tokenizer)), max_size=4),
            ),
            max_size=5,
        )
    )
    return [token for piece in pieces for token in piece]


def byte_tokens(tokenizer: Tokenizer) -> list[int]:
    """Tokens whose bytes are no whole character."""
    return [
        i
        for i in range(min(3000, tokenizer._backend.get_vocab_size()))
        if "\ufffd" in tokenizer.token_bytes(i).decode(errors="replace")
    ]


def release(
    tokenizer: Tokenizer, sampling: SamplingParams, chunks: Sequence[Sequence[int]]
) -> tuple[str, str | None, int]:
    """(all released text, stop string, tokens of the answer), taking text after every chunk."""
    detokenizer = Detokenizer(tokenizer, sampling, Emitted())
    text, num_tokens = "", 0
    for chunk in chunks:
        match = detokenizer.append(chunk)
        num_tokens += match.num_tokens if match else len(chunk)
        text += detokenizer.take(finished=match is not None)
        if match:
            break
    text += detokenizer.take(finished=True)
    return text, detokenizer.match.stop if detokenizer.match else None, num_tokens


def answer_of_oracle(tokenizer: Tokenizer, sampling: SamplingParams, ids: Sequence[int]) -> tuple[str, str | None, int]:
    """Decode every prefix whole; the answer ends with the first prefix that surely holds a stop string."""
    skip = sampling.skip_special_tokens
    for num_tokens in range(1, len(ids) + 1):
        stream = tokenizer.stream(skip)
        text = "".join(stream.push(i) for i in ids[:num_tokens])
        found = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in sampling.stop if stop in text]
        if found:
            end, start, stop = min(found)
            return text[: end if sampling.include_stop_str_in_output else start], stop, num_tokens
    return tokenizer.decode(ids, skip), None, len(ids)


def split(ids: list[int], cuts: list[int]) -> list[list[int]]:
    borders = sorted({0, len(ids), *(cut % (len(ids) + 1) for cut in cuts)})
    return [ids[a:b] for a, b in itertools.pairwise(borders)]


samplings = st.builds(
    SamplingParams,
    stop=st.lists(st.sampled_from(STOPS), max_size=3).map(tuple),
    include_stop_str_in_output=st.booleans(),
    skip_special_tokens=st.booleans(),
)


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data(), sampling=samplings, cuts=st.lists(st.integers(0, 99), max_size=6))
def test_any_split_gives_the_text_of_the_oracle(
    kind: str, data: st.DataObject, sampling: SamplingParams, cuts: list[int]
) -> None:
    tokenizer = TOKENIZERS[kind]()
    ids = data.draw(token_sequences(tokenizer))
    expected = answer_of_oracle(tokenizer, sampling, ids)
    assert release(tokenizer, sampling, split(ids, cuts)) == expected
    assert release(tokenizer, sampling, [[i] for i in ids]) == expected


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data(), sampling=samplings, cut=st.integers(0, 99), is_coalesced=st.booleans())
def test_another_replica_goes_on_without_a_seam(
    kind: str, data: st.DataObject, sampling: SamplingParams, cut: int, is_coalesced: bool
) -> None:
    tokenizer = TOKENIZERS[kind]()
    ids = data.draw(token_sequences(tokenizer))
    emitted_ids, rest = (ids[: cut % (len(ids) + 1)], ids[cut % (len(ids) + 1) :])
    first = Detokenizer(tokenizer, sampling, Emitted())
    if first.append(emitted_ids) is not None:
        return
    # A client may hold less than could have been released.
    released = "" if is_coalesced else first.take(finished=False)

    second = Detokenizer(tokenizer, sampling, Emitted(tuple(emitted_ids), len(released)))
    for token in rest:
        if second.append([token]) is not None:
            break
        released += second.take(finished=False)
    released += second.take(finished=True)
    assert released == answer_of_oracle(tokenizer, sampling, ids)[0]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data(), skip=st.booleans())
def test_byte_level_text_is_the_librarys(data: st.DataObject, skip: bool) -> None:
    tokenizer = bundled_tokenizer()
    ids = data.draw(token_sequences(tokenizer))
    backend = tokenizer._backend
    assert tokenizer.decode(ids, skip) == backend.decode(ids, skip_special_tokens=skip)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data(), skip=st.booleans())
def test_sentencepiece_text_is_the_librarys_where_bytes_are_valid(data: st.DataObject, skip: bool) -> None:
    tokenizer = sentencepiece_tokenizer()
    ids = data.draw(token_sequences(tokenizer))
    expected = tokenizer._backend.decode(ids, skip_special_tokens=skip)
    if "\ufffd" not in tokenizer.decode(ids, skip):
        assert tokenizer.decode(ids, skip) == expected
    assert len(tokenizer.decode(ids, skip)) <= len(expected)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data(), skip=st.booleans())
def test_other_decoders_stream_through_a_window(data: st.DataObject, skip: bool) -> None:
    backend = read_gguf(sentencepiece_fields()).backend
    backend.decoder = decoders.Metaspace()
    text = TokenText(backend)
    ids = data.draw(st.lists(st.integers(0, backend.get_vocab_size() - 1), max_size=20))
    stream = text.stream(skip)
    assert "".join(stream.push(i) for i in ids) + stream.flush() == text.decode(ids, skip)


@pytest.mark.parametrize("kind", [*TOKENIZERS, "other"])
@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data(), skip=st.booleans())
def test_a_stream_goes_on_where_a_prompt_ends(kind: str, data: st.DataObject, skip: bool) -> None:
    tokenizer = TOKENIZERS[kind]() if kind in TOKENIZERS else metaspace_tokenizer()
    whole = st.lists(st.sampled_from(["hello", " world", " ", "  ", "ab, ", "<s>", "</s>"]), max_size=3).map("".join)
    # The window of an unknown decoder cannot tell the half of a character from a real U+FFFD.
    pieces = whole.map(tokenizer.encode) if kind == "other" else token_sequences(tokenizer)
    prompt, output = data.draw(pieces), data.draw(pieces)
    stream = tokenizer.stream(skip, prompt)
    text = "".join(stream.push(i) for i in output) + stream.flush()
    # Not `decode(prompt)`: a character that the prompt leaves open is completed, or given up, by the output.
    shown = tokenizer.stream(skip)
    assert "".join(shown.push(i) for i in prompt) + text == tokenizer.decode([*prompt, *output], skip)


def metaspace_tokenizer() -> Tokenizer:
    backend = read_gguf(sentencepiece_fields()).backend
    backend.decoder = decoders.Metaspace()
    return Tokenizer(backend, eos_token_ids=frozenset({2}), prefix=(1,))


def test_an_incomplete_character_waits() -> None:
    tokenizer = bundled_tokenizer()
    ids = tokenizer.encode("👩‍👧", add_special_tokens=False)
    assert len(ids) > 3
    detokenizer = Detokenizer(tokenizer, SamplingParams(), Emitted())
    shown = []
    for token in ids:
        detokenizer.append([token])
        shown.append(detokenizer.take(finished=False))
    assert "".join(shown) == "👩‍👧"
    assert "\ufffd" not in "".join(shown)
    assert shown[0] == ""


def test_a_cut_character_is_shown_as_broken_at_the_end() -> None:
    tokenizer = bundled_tokenizer()
    first, *_ = tokenizer.encode("👩", add_special_tokens=False)
    detokenizer = Detokenizer(tokenizer, SamplingParams(), Emitted())
    detokenizer.append([first])
    assert detokenizer.take(finished=False) == ""
    assert detokenizer.take(finished=True) == tokenizer.decode([first]) == "\ufffd"
    assert detokenizer.take(finished=True) == ""


def test_the_stop_that_is_complete_first_wins() -> None:
    tokenizer = bundled_tokenizer()
    ids = [tokenizer.encode(c, add_special_tokens=False)[0] for c in "xaabcd"]
    for stops, expected in [
        (("abcd", "b"), ("xaa", "b")),
        (("c", "abc"), ("xa", "abc")),
        (("bd", "cd"), ("xaab", "cd")),
    ]:
        sampling = SamplingParams(stop=stops)
        assert (
            release(tokenizer, sampling, [ids])[:2] == release(tokenizer, sampling, [[i] for i in ids])[:2] == expected
        )


def test_a_stop_counts_the_tokens_up_to_its_end() -> None:
    tokenizer = bundled_tokenizer()
    ids = tokenizer.encode("one two three four", add_special_tokens=False)
    detokenizer = Detokenizer(tokenizer, SamplingParams(stop=("wo thr",)), Emitted())
    assert detokenizer.append(ids[:1]) is None
    assert detokenizer.append(ids[1:]) == StopMatch("wo thr", 2)
    assert detokenizer.append(ids) == StopMatch("wo thr", 0)
    assert detokenizer.take(finished=True) == "one t"


def test_a_stop_within_min_tokens_is_text() -> None:
    tokenizer = bundled_tokenizer()
    ids = tokenizer.encode("one two one two three", add_special_tokens=False)
    sampling = SamplingParams(stop=("two",), min_tokens=3)
    assert release(tokenizer, sampling, [[i] for i in ids]) == ("one two one ", "two", 4)


def test_a_replayed_answer_that_is_over_stays_over() -> None:
    tokenizer = bundled_tokenizer()
    ids = tokenizer.encode("one two three", add_special_tokens=False)
    detokenizer = Detokenizer(tokenizer, SamplingParams(stop=("two",)), Emitted(tuple(ids), 2))
    assert detokenizer.match == StopMatch("two", 0)
    assert detokenizer.take(finished=True) == "e "
