"""A model's tokenizer: text and messages to token ids and back, from a Hugging Face folder or from GGUF metadata.

A thin owner around the `tokenizers` library; knows the model's special tokens and its chat template, but neither
requests nor sampling. `transformers` is imported only for folders that have no `tokenizer.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from replicas.engine.chat_template import ChatTemplate
from replicas.engine.detokenizer import Detokenizer, StopMatch
from replicas.engine.gguf_tokenizer import read_gguf
from replicas.engine.token_text import TextStream, TokenText
from replicas.types import ChatPrompt, InvalidRequest, PromptTooLong

__all__ = ["Detokenizer", "StopMatch", "Tokenizer"]

LONG_TEXT_CHARS = 8192
"""A longer text is worth a thread: these take about 6 ms of encoding (a million: a second)."""
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """Immutable after birth; every method may be called from any thread."""

    def __init__(
        self,
        backend: Backend,
        *,
        eos_token_ids: frozenset[int],
        prefix: Sequence[int] = (),
        suffix: Sequence[int] = (),
        chat_template: ChatTemplate | None = None,
    ) -> None:
        """`prefix` and `suffix`: special tokens around a text, beside those that the backend adds itself."""
        self._backend = backend
        self._text = TokenText(backend)
        self._prefix = tuple(prefix)
        self._suffix = tuple(suffix)
        self._chat_template = chat_template
        self.eos_token_ids = eos_token_ids
        """Every token that ends an answer."""

    @staticmethod
    def from_folder(path: Path) -> Tokenizer:
        """From `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja` (or `.json`) of a folder.

        Raises ValueError, naming the file that is missing or unreadable."""
        if not path.is_dir():
            raise ValueError(f"{path} is not a folder; a tokenizer in Hugging Face format is one with tokenizer.json")
        config = _read_json(path / "tokenizer_config.json")
        special_tokens = _special_tokens(_read_json(path / "special_tokens_map.json") | config)
        backend = _load_backend(path)
        backend.no_truncation()
        backend.no_padding()

        def id_of(name: str) -> int | None:
            token = special_tokens.get(name)
            return None if token is None else backend.token_to_id(token)

        bos_token_id, eos_token_id = id_of("bos_token"), id_of("eos_token")
        eos_token_ids = {eos_token_id} if eos_token_id is not None else set()
        sources = _template_sources(path, config)
        # transformers prepends BOS where the flag says so, even if tokenizer.json has no rule for it.
        lacks_bos = config.get("add_bos_token") is True and bos_token_id not in backend.encode("").ids
        return Tokenizer(
            backend,
            eos_token_ids=frozenset(eos_token_ids | _generation_eos(path)),
            prefix=(bos_token_id,) if lacks_bos and bos_token_id is not None else (),
            chat_template=ChatTemplate(sources, special_tokens) if sources else None,
        )

    @staticmethod
    def from_gguf(fields: Mapping[str, Any]) -> Tokenizer:
        """From the `tokenizer.*` metadata of a GGUF file, by their full names, as plain values and lists.

        Raises ValueError where a field is missing, damaged or names a tokenizer that is not supported."""
        parts = read_gguf(fields)
        sources = {"default": parts.chat_template} if parts.chat_template else {}
        return Tokenizer(
            parts.backend,
            eos_token_ids=parts.eos_token_ids,
            prefix=parts.prefix,
            suffix=parts.suffix,
            chat_template=ChatTemplate(sources, parts.special_tokens) if sources else None,
        )

    def encode(self, text: str, add_special_tokens: bool = True, max_num_tokens: int | None = None) -> list[int]:
        """Token ids. Special tokens spelled out in `text` become those tokens, as in transformers.

        Raises InvalidRequest on `prompt` where the text is no valid Unicode, and PromptTooLong, without encoding it,
        where `max_num_tokens` could never hold it; a text of fewer bytes may still have more tokens than that."""
        return self._encode(text, add_special_tokens, max_num_tokens, "prompt")

    def encode_chat(self, prompt: ChatPrompt, max_num_tokens: int | None = None) -> list[int]:
        """Token ids of the rendered template, which writes its own BOS. Raises what `ChatTemplate.render` and `encode`
        raise, the latter on `messages`."""
        if self._chat_template is None:
            raise InvalidRequest("this model has no chat template; use /v1/completions with a prompt", "messages")
        return self._encode(self._chat_template.render(prompt), False, max_num_tokens, "messages")

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self._text.decode(token_ids, skip_special_tokens)

    def stream(self, skip_special_tokens: bool = True, prompt_token_ids: Sequence[int] = ()) -> TextStream:
        """The same text as `decode`, token by token; after a prompt, what `decode` shows of both beyond the prompt's
        own text."""
        return self._text.stream(skip_special_tokens, prompt_token_ids)

    def token_bytes(self, token_id: int) -> bytes:
        """One token on its own, special ones included; it may hold only a part of a character."""
        return self._text.token_bytes(token_id)

    def _encode(self, text: str, add_special_tokens: bool, max_num_tokens: int | None, param: str) -> list[int]:
        try:
            num_bytes = len(text.encode())
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"{param} has a lone surrogate at character {error.start}", param) from error
        if len(text) <= LONG_TEXT_CHARS:
            encoding = self._backend.encode(text, add_special_tokens=add_special_tokens)
        else:
            if max_num_tokens is not None:
                self._refuse_if_too_long(num_bytes, max_num_tokens, param)
            # Unlike `encode`, it releases the interpreter's lock, so that the steps and the loop go on.
            (encoding,) = self._backend.encode_batch([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return [*self._prefix, *ids, *self._suffix] if add_special_tokens else ids

    def _refuse_if_too_long(self, num_bytes: int, max_num_tokens: int, param: str) -> None:
        longest = self._text.longest_token_bytes
        if num_bytes > max_num_tokens * longest:
            raise PromptTooLong(
                f"{param} has {num_bytes} bytes, and {max_num_tokens} tokens of at most {longest} bytes each are the "
                "limit of this model; shorten it",
                param,
            )


def _load_backend(path: Path) -> Any:
    file = path / "tokenizer.json"
    if file.is_file():
        try:
            return Backend.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{file} cannot be read as a tokenizer: {error}") from error
    if not any((path / name).is_file() for name in ("tokenizer.model", "vocab.json", "spiece.model", "vocab.txt")):
        raise ValueError(f"{path} has no tokenizer.json")
    from transformers import AutoTokenizer  # seconds of import, needed for old checkpoints only

    try:
        converted = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # anything its converters raise
        raise ValueError(f"{path} has no tokenizer.json, and its tokenizer cannot be converted: {error}") from error
    backend = getattr(converted, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"{path} has no tokenizer.json, and its tokenizer is pure Python; convert it to tokenizer.json"
        )
    return backend


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, expected an object")
    return content


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Named special tokens, each given as text or as an added-token object."""
    tokens = {}
    for name in _NAMED_TOKENS:
        token = config.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            tokens[name] = text
    return tokens


def _template_sources(path: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name. A file of their own wins over the configuration, as in transformers."""
    file = path / "chat_template.jinja"
    if file.is_file():
        sources = {"default": file.read_text(encoding="utf-8")}
        for extra in sorted((path / "additional_chat_templates").glob("*.jinja")):
            sources[extra.stem] = extra.read_text(encoding="utf-8")
        return sources
    given = _read_json(path / "chat_template.json").get("chat_template") or config.get("chat_template")
    if isinstance(given, str):
        return {"default": given}
    if isinstance(given, list) and all(_is_named_template(entry) for entry in given):
        return {entry["name"]: entry["template"] for entry in given}
    if given:
        raise ValueError(f"{path}: chat_template is neither a text nor a list of objects with name and template")
    return {}


def _is_named_template(entry: object) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("name"), str) and isinstance(entry.get("template"), str)


def _generation_eos(path: Path) -> set[int]:
    """What the model itself says ends an answer."""
    for name in ("generation_config.json", "config.json"):
        value = _read_json(path / name).get("eos_token_id")
        ids = value if isinstance(value, list) else [value]
        if value is not None:
            if not all(isinstance(token_id, int) for token_id in ids):
                raise ValueError(f"{path / name}: eos_token_id is {value!r}, expected a token id or a list of them")
            return set(ids)
    return set()
