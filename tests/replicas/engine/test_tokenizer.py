"""Tokenizers from GGUF and from folders against independent oracles."""

from __future__ import annotations

import functools
import itertools
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import regex  # type: ignore[import-untyped]
from hypothesis import given, settings
from hypothesis import strategies as st

from replicas.engine.token_text import byte_alphabet
from replicas.engine.tokenizer import LONG_TEXT_CHARS, Tokenizer
from replicas.types import ChatPrompt, InvalidRequest, PromptTooLong
from tests.replicas.engine.bundled_vocabulary import (
    bundled_fields,
    bundled_gguf,
    bundled_tokenizer,
    sentencepiece_fields,
    sentencepiece_tokenizer,
)

TEXTS = [
    "",
    " ",
    "Hello world",
    "I'll say it's they've DON'T",
    "  two  spaces   three\t\ttabs \n\n newline\r\n",
    "3.14159 and 2024-01-01, x  12",
    "def f(x):\n    return x**2  # ok",
    "naïve café Ünïcödé",
    "你好，世界！ こんにちは 안녕하세요",
    "👩‍👩‍👧‍👦 🇩🇪 emoji 👍🏽",
    "²³ Ⅷ ½ ① numbers",
    "<|im_start|>user\nhi<|im_end|>",
    "\u00a0nbsp\u2003em\u200bzero",
    "a" * 300,
    "مرحبا بالعالم हिन्दी ไทย",
]


def test_bundled_vocabulary_builds_in_well_under_a_second() -> None:
    fields = bundled_fields()
    start = time.perf_counter()
    tokenizer = Tokenizer.from_gguf(fields)
    assert time.perf_counter() - start < 1.0
    assert tokenizer.eos_token_ids == {0, 2}


def test_import_and_use_need_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; import replicas.engine.tokenizer;"
        "print([m for m in ('torch', 'transformers', 'ray') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


class ByteLevelOracle:
    """Byte-level BPE as in GPT-2's paper code, with llama.cpp's two splits of `smollm`."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self.ids = {token: i for i, token in enumerate(fields["tokenizer.ggml.tokens"])}
        self.ranks = {tuple(m.split(" ")): i for i, m in enumerate(fields["tokenizer.ggml.merges"])}
        control = [t for t, kind in self.ids.items() if fields["tokenizer.ggml.token_type"][kind] == 3]
        self.special = regex.compile("(" + "|".join(regex.escape(t) for t in control) + ")")
        self.words = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

    def encode(self, text: str) -> list[int]:
        ids = []
        for part in self.special.split(text):
            if self.special.fullmatch(part):
                ids.append(self.ids[part])
                continue
            for piece in regex.split(r"(\p{N})", part):
                for word in self.words.findall(piece):
                    ids.extend(self.ids[token] for token in self.merge(word))
        return ids

    def knows(self, text: str) -> bool:
        alphabet = byte_alphabet()
        return all(alphabet[byte] in self.ids for byte in text.encode())

    def merge(self, word: str) -> list[str]:
        # The bundled vocabulary lacks a few control bytes: BPE goes on as if they were not in the text (tokenizers and
        # transformers; llama.cpp drops them after merging).
        parts = [char for byte in word.encode() if (char := byte_alphabet()[byte]) in self.ids]
        while len(parts) > 1:
            rank, at = min((self.ranks.get((a, b), 1 << 30), i) for i, (a, b) in enumerate(itertools.pairwise(parts)))
            if rank == 1 << 30:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        return parts


@functools.cache
def oracle() -> ByteLevelOracle:
    return ByteLevelOracle(bundled_fields())


@pytest.mark.parametrize("text", TEXTS)
def test_bundled_encoding_agrees_with_the_oracle(text: str) -> None:
    ids = bundled_tokenizer().encode(text)
    assert ids == oracle().encode(text)
    assert bundled_tokenizer().decode(ids, skip_special_tokens=False) == text


pieces = st.sampled_from([" ", "  ", "\n", "12", "it's", "é", "你", "👩", "ab", ".", "<|im_end|>"])
any_text = st.one_of(st.text(max_size=30), st.lists(pieces, max_size=12).map("".join))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(any_text)
def test_random_text_agrees_with_the_oracle(text: str) -> None:
    ids = bundled_tokenizer().encode(text)
    assert ids == oracle().encode(text)
    if oracle().knows(text):
        assert bundled_tokenizer().decode(ids, skip_special_tokens=False) == text


def sentencepiece_oracle(text: str) -> list[int]:
    """Merge the best-scored adjacent pair until none is a token, then spell unknown characters in bytes."""
    fields = sentencepiece_fields()
    ids = {token: i for i, token in enumerate(fields["tokenizer.ggml.tokens"])}
    result = [1]
    for part in regex.split(r"(<s>|</s>|<\|tool\|>)", text):
        if part in ("<s>", "</s>", "<|tool|>"):
            result.append(ids[part])
            continue
        parts = list(("\u2581" + part).replace(" ", "\u2581")) if part else []
        while True:
            pairs = [(i, a + b) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ids]
            if not pairs:
                break
            at, token = max(pairs, key=lambda pair: (fields["tokenizer.ggml.scores"][ids[pair[1]]], -pair[0]))
            parts[at : at + 2] = [token]
        for token in parts:
            result.extend([ids[token]] if token in ids else [ids[f"<0x{byte:02X}>"] for byte in token.encode()])
    return result


words = st.sampled_from(["hello", " ", "world", "he", "ll", "你", "好", "é", "👩", "Z", "<|tool|>", "</s>", "or", "w"])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(words, max_size=10).map("".join))
def test_sentencepiece_agrees_with_the_oracle(text: str) -> None:
    tokenizer = sentencepiece_tokenizer()
    ids = tokenizer.encode(text)
    assert ids == sentencepiece_oracle(text)
    assert tokenizer.encode(text, add_special_tokens=False) == ids[1:]
    if "<" not in text:
        assert tokenizer.decode(ids) == text


def test_single_tokens_as_text() -> None:
    tokenizer = bundled_tokenizer()
    assert tokenizer.token_bytes(2) == b"<|im_end|>"
    assert tokenizer.token_bytes(tokenizer.encode(" world")[0]) == b" world"
    assert tokenizer.token_bytes(49_152 + 5) == b""
    assert sentencepiece_tokenizer().token_bytes(3 + 0xE4) == b"\xe4"


@pytest.mark.parametrize("pre", ["default", "llama-bpe", "qwen2", "gpt-2", "tekken", "gpt-4o", "falcon", "deepseek-v3"])
def test_other_splits_lose_no_text(pre: str) -> None:
    tokenizer = Tokenizer.from_gguf({**bundled_fields(), "tokenizer.ggml.pre": pre})
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


def test_llama_3_takes_whole_words_that_merges_do_not_reach() -> None:
    fields = bundled_fields()
    tokens = [*fields["tokenizer.ggml.tokens"], "Qxzqw"]
    fields = {**fields, "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [1] * len(tokens)}
    encodings = {pre: Tokenizer.from_gguf({**fields, "tokenizer.ggml.pre": pre}) for pre in ("llama-bpe", "qwen2")}
    assert encodings["llama-bpe"].encode("Qxzqw", add_special_tokens=False) == [len(tokens) - 1]
    assert len(encodings["qwen2"].encode("Qxzqw")) > 1


def test_bos_and_eos_follow_the_fields() -> None:
    fields = {**bundled_fields(), "tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    tokenizer = Tokenizer.from_gguf(fields)
    plain = bundled_tokenizer().encode("hi")
    assert tokenizer.encode("hi") == [1, *plain, 2]
    assert tokenizer.encode("hi", add_special_tokens=False) == plain
    # The end of the sequence, whatever other tokens end an answer.
    tokenizer = Tokenizer.from_gguf({**fields, "tokenizer.ggml.eot_token_id": 0, "tokenizer.ggml.eos_token_id": 7})
    assert tokenizer.encode("hi") == [1, *plain, 7]


@pytest.mark.parametrize("pre", ["llama-bpe", "tekken", "pixtral", "qwen2", "smollm"])
def test_where_the_file_does_not_say_bos_is_llama_cpps_default(pre: str) -> None:
    fields = {**bundled_fields(), "tokenizer.ggml.pre": pre}
    del fields["tokenizer.ggml.add_bos_token"]
    has_bos = Tokenizer.from_gguf(fields).encode("hi")[0] == 1
    assert has_bos == (pre not in ("qwen2", "smollm"))


@pytest.mark.parametrize("name", ["<|endoftext|>", "<|end_of_text|>", "<EOT>", "_<EOT>", "<|eot_id|>"])
def test_control_tokens_that_end_an_answer_are_known_by_name(name: str) -> None:
    fields = bundled_fields()
    tokens = [*fields["tokenizer.ggml.tokens"], name, "<|tool_call|>"]
    types = [1] * len(tokens)
    types[-2:] = [3, 3]
    fields = {**fields, "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    assert Tokenizer.from_gguf(fields).eos_token_ids == {2, len(tokens) - 2}


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("tokenizer.ggml.model", "bert", "tokenizer.ggml.model is 'bert'"),
        ("tokenizer.ggml.model", None, "no field tokenizer.ggml.model"),
        ("tokenizer.ggml.pre", "martian", "tokenizer.ggml.pre is 'martian'"),
        ("tokenizer.ggml.merges", None, "no field tokenizer.ggml.merges"),
        ("tokenizer.ggml.token_type", [1], "1 entries for 49152 tokens"),
    ],
)
def test_an_unusable_field_is_named(field: str, value: object, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Tokenizer.from_gguf({**bundled_fields(), field: value})


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("ggml.model", [1], "is \\[1\\]; supported"),
        ("ggml.tokens", 5, "is 5, expected a list"),
        ("ggml.tokens", [1, 2], "\\[0\\] is 1"),
        ("ggml.tokens", [], "or an empty one"),
        ("ggml.token_type", ["3"] * 305, "\\[0\\] is '3'"),
        ("ggml.scores", [0.5], "has 1 entries for 305 tokens"),
        ("ggml.scores", "x", "is 'x', expected a list"),
        ("ggml.merges", 7, "is 7, expected a list"),
        ("ggml.merges", ["abc"], "has the entry 'abc', expected two tokens"),
        ("ggml.merges", ["he nothing"], "tokens do not fit: .*nothing"),
        ("ggml.eos_token_id", [1], "is \\[1\\], expected the number"),
        ("ggml.eos_token_id", "x", "is 'x', expected the number"),
        ("ggml.unknown_token_id", 0.5, "is 0.5, expected the number"),
        ("ggml.add_bos_token", "yes", "is 'yes', expected true or false"),
        ("ggml.add_space_prefix", 2, "is 2, expected true or false"),
        ("chat_template", 5, "is 5, expected a text"),
    ],
)
def test_a_damaged_field_is_named(name: str, value: object, complaint: str) -> None:
    with pytest.raises(ValueError, match=rf"tokenizer\.{name}.*{complaint}"):
        Tokenizer.from_gguf({**sentencepiece_fields(), f"tokenizer.{name}": value})


@pytest.mark.parametrize("merges", [7, ["abc"], [""], [5], ["he nothing"]])
def test_damaged_merges_of_bytes_are_named(merges: object) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.ggml\.merges"):
        Tokenizer.from_gguf({**bundled_fields(), "tokenizer.ggml.merges": merges})


def test_a_long_text_is_encoded_like_its_parts() -> None:
    tokenizer, line = bundled_tokenizer(), "one more line of text, 42 of them\n"
    ids = tokenizer.encode(line * 1000)
    assert len(line) * 1000 > LONG_TEXT_CHARS
    assert ids == tokenizer.encode(line) * 1000
    assert tokenizer.encode(line * 1000, max_num_tokens=len(ids)) == ids


def test_encoding_a_long_text_lets_other_threads_run() -> None:
    """With the interpreter's lock held, the gap is the whole time of encoding."""
    text = "Some words, and 12 numbers: naïve text. " * 15_000
    thread = threading.Thread(target=bundled_tokenizer().encode, args=(text,))
    longest_gap_s, last = 0.0, time.perf_counter()
    started = last
    thread.start()
    while thread.is_alive():
        time.sleep(0.001)
        now = time.perf_counter()
        longest_gap_s, last = max(longest_gap_s, now - last), now
    assert longest_gap_s < (last - started) / 2


def test_what_can_never_fit_is_refused_without_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer.from_gguf(bundled_fields())
    longest = max(len(tokenizer.token_bytes(i)) for i in range(49_152))
    chat = ChatPrompt(({"role": "user", "content": "x" * (200 * longest)},))
    monkeypatch.setattr(tokenizer, "_backend", None)  # whoever encodes fails
    with pytest.raises(PromptTooLong, match=rf"prompt has {200 * longest + 1} bytes, and 200 tokens") as text_error:
        tokenizer.encode("x" * (200 * longest + 1), max_num_tokens=200)
    assert text_error.value.param == "prompt"
    with pytest.raises(PromptTooLong, match="messages has") as chat_error:
        tokenizer.encode_chat(chat, max_num_tokens=200)
    assert chat_error.value.param == "messages"


def test_a_lone_surrogate_is_the_clients_fault() -> None:
    with pytest.raises(InvalidRequest, match="lone surrogate at character 1") as caught:
        bundled_tokenizer().encode("a\ud800")
    assert caught.value.param == "prompt"


def write_folder(folder: Path, config: dict[str, Any], generation: dict[str, Any] | None = None) -> Path:
    bundled_tokenizer()._backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def test_a_folder_gives_the_same_tokenizer(tmp_path: Path) -> None:
    template = bundled_fields()["tokenizer.chat_template"]
    config = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}, "chat_template": template}
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, config, {"eos_token_id": [0, 2]}))
    prompt = ChatPrompt(({"role": "user", "content": "hi 👩"},))
    assert tokenizer.encode_chat(prompt) == bundled_tokenizer().encode_chat(prompt)
    assert all(tokenizer.encode(text) == bundled_tokenizer().encode(text) for text in TEXTS)
    assert tokenizer.eos_token_ids == {0, 2}


def test_a_folders_templates_come_from_any_of_their_files(tmp_path: Path) -> None:
    prompt = ChatPrompt(({"role": "user", "content": "hi"},), tools=({"name": "t"},))
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "{{ tools[0].name }}"}]
    folder = write_folder(tmp_path, {"chat_template": named, "add_bos_token": True, "bos_token": "<|im_start|>"})
    assert Tokenizer.from_folder(folder).decode(Tokenizer.from_folder(folder).encode_chat(prompt)) == "t"
    assert Tokenizer.from_folder(folder).encode("hi")[0] == 1
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert Tokenizer.from_folder(folder).decode(Tokenizer.from_folder(folder).encode_chat(prompt)) == "json"
    (folder / "chat_template.jinja").write_text("jinja")
    assert Tokenizer.from_folder(folder).decode(Tokenizer.from_folder(folder).encode_chat(prompt)) == "jinja"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        Tokenizer.from_folder(tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.from_folder(tmp_path)
    write_folder(tmp_path, {})
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not valid JSON"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(InvalidRequest, match="no chat template"):
        Tokenizer.from_folder(tmp_path).encode_chat(ChatPrompt(({"role": "user", "content": "hi"},)))


@pytest.mark.parametrize("template", [5, [1], [{"name": "default"}], {"default": "x"}])
def test_a_damaged_template_of_a_folder_is_named(template: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="chat_template is neither a text nor a list"):
        Tokenizer.from_folder(write_folder(tmp_path, {"chat_template": template}))


@pytest.mark.parametrize("value", ["x", [[1]], {"id": 1}])
def test_a_damaged_end_of_a_folder_is_named(value: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id is"):
        Tokenizer.from_folder(write_folder(tmp_path, {}, {"eos_token_id": value}))


@pytest.mark.slow
def test_an_old_folder_is_converted_by_transformers(tmp_path: Path) -> None:
    fields = bundled_fields()
    vocab = {token: i for i, token in enumerate(fields["tokenizer.ggml.tokens"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(fields["tokenizer.ggml.merges"]))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("Hello world") == bundled_tokenizer().encode("Hello world")


@pytest.mark.slow
def test_bundled_encoding_agrees_with_transformers() -> None:
    """transformers does not split `smollm` digits off the space before them, so no text here has such a place."""
    from transformers import AutoTokenizer

    file = bundled_gguf()
    theirs = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name, local_files_only=True)
    stems = [text for text in TEXTS if text and not regex.search(r"\s\p{N}", text)]
    texts = [joiner.join(pair) for pair in itertools.product(stems, repeat=2) for joiner in ("", "\n")]
    assert len(texts) > 100
    ours = bundled_tokenizer()
    for text in texts:
        assert ours.encode(text) == theirs.encode(text)
        ids = ours.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
