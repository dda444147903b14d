"""Log-probabilities of text completions, where a token need not be text of its own."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from replicas.types import Chunk, TokenLogprob
from router.openai import TextOffsets, completion_logprobs
from router.sse import CompletionEvents

MILL = "a𝄞水é!"


def scored(*tokens: bytes) -> tuple[TokenLogprob, ...]:
    return tuple(TokenLogprob(id, token, -1.0 - id) for id, token in enumerate(tokens))


def test_tokens_of_one_character_begin_where_it_begins() -> None:
    whole = MILL.encode()
    tokens = scored(whole[:2], whole[2:4], whole[4:9], whole[9:])  # "a" and a quarter of a clef, half of it, ...
    logprobs = completion_logprobs(tokens, TextOffsets())
    assert logprobs["text_offset"] == [0, 1, 1, 3]
    assert logprobs["tokens"] == [
        r"bytes:\x61\xf0",
        r"bytes:\x9d\x84",
        r"bytes:\x9e\xe6\xb0\xb4\xc3",
        r"bytes:\xa9\x21",
    ]


def test_alternatives_that_are_no_text_keep_their_log_probabilities() -> None:
    (sampled,) = scored(b"\xf0\x9f")
    top = tuple(TokenLogprob(id, token, -float(id)) for id, token in enumerate([b"\xf0", b"\x9f", b"\xff", b"ok"], 2))
    (alternatives,) = completion_logprobs([TokenLogprob(1, sampled.token_bytes, -1.0, top)], TextOffsets())[
        "top_logprobs"
    ]
    assert alternatives == {
        r"bytes:\xf0\x9f": -1.0,
        r"bytes:\xf0": -2.0,
        r"bytes:\x9f": -3.0,
        r"bytes:\xff": -4.0,
        "ok": -5.0,
    }


@given(st.lists(st.binary(max_size=5) | st.text(max_size=3).map(str.encode), max_size=12), st.data())
def test_offsets_are_places_in_the_text_however_it_is_streamed(tokens: list[bytes], data: st.DataObject) -> None:
    entries = scored(*tokens)
    offsets = completion_logprobs(entries, TextOffsets())["text_offset"]
    begins = [sum(map(len, tokens[:i])) for i in range(len(tokens))]
    whole = b"".join(tokens)
    for token, begin, offset in zip(tokens, begins, offsets, strict=True):
        if token:
            assert offset == len(whole[: begin + 1].decode(errors="replace")) - 1
    cut = data.draw(st.integers(0, len(tokens)))
    shared = TextOffsets()
    pieces = [completion_logprobs(piece, shared)["text_offset"] for piece in (entries[:cut], entries[cut:])]
    assert pieces[0] + pieces[1] == offsets


def test_a_stream_counts_on_from_chunk_to_chunk() -> None:
    events = CompletionEvents("id", 0, "m", with_logprobs=True, with_usage=False, echoes=["", ""])
    e_acute = "é".encode()
    shown = [
        events.event(1, Chunk((1,), "a", scored(b"a"))),
        events.event(0, Chunk((1,), "bc", scored(b"bc"))),
        events.event(1, Chunk((2,), "", scored(e_acute[:1]))),
        events.event(1, Chunk((3,), "é", scored(e_acute[1:]))),
        events.event(1, Chunk((4,), "!", scored(b"!"))),
    ]
    places = [event.partition(b'"text_offset":[')[2].partition(b"]")[0] for event in shown]
    assert places == [b"0", b"0", b"1", b"1", b"2"]
