"""From token ids to text, at once or token by token, so that both ways always give the same text.

For the decoders that language models use (byte-level BPE, sentencepiece with byte fallback) a token is a fixed string
of bytes, and text is those bytes read as UTF-8: streaming is then exact and costs O(1) per token. Any other decoder of
the `tokenizers` library is followed through a small window. Knows nothing of stop strings or requests.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol

from tokenizers import Tokenizer as Backend

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_SPACE_MARK = "\N{LOWER ONE EIGHTH BLOCK}"
_MAX_OPEN_BYTES = 3
"""Of a UTF-8 character that lacks its last one."""
_MIN_CONTEXT_TOKENS = 4


class TextStream(Protocol):
    """The text of one token sequence. Nothing it returned is ever taken back."""

    def push(self, token_id: int) -> str:
        """The text that this token completes; an incomplete character waits for its other tokens."""
        ...

    def flush(self) -> str:
        """What still waits, with U+FFFD for a character that never got complete. The stream ends here."""
        ...


class TokenText:
    """The text side of a vocabulary."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._special_ids = frozenset(i for i, t in backend.get_added_tokens_decoder().items() if t.special)
        self._is_byte_level, self._is_sentencepiece, self._num_stripped = _read_decoder(backend.decoder)
        self._bytes: dict[int, bytes] = {}

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Ids that the vocabulary does not have (a model's head may be padded) have no text.

        Differs from `tokenizers` in one case, where that library's text could not be streamed: it turns each byte of a
        run of byte-fallback tokens into U+FFFD as soon as the run holds one invalid byte; here the valid characters of
        the run stay and each invalid sequence gives one U+FFFD, as in any UTF-8 decoder.
        """
        if not self._has_bytes:
            return str(self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens))
        stream = self.stream(skip_special_tokens)
        return "".join([stream.push(i) for i in token_ids]) + stream.flush()

    def stream(self, skip_special_tokens: bool, prompt_token_ids: Sequence[int] = ()) -> TextStream:
        """The text that tokens add to `prompt_token_ids`: what those begin, a space or a character, goes on."""
        if self._has_bytes:
            skipped = self._special_ids if skip_special_tokens else frozenset[int]()
            stream = _ByteStream(self, skipped, self._num_stripped)
            stream.go_on_from(prompt_token_ids)
            return stream
        return _WindowStream(self._backend, skip_special_tokens, prompt_token_ids)

    def token_bytes(self, token_id: int) -> bytes:
        """One token on its own, special ones included; it may hold only a part of a character."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._find_bytes(token_id)
        return known

    @cached_property
    def longest_token_bytes(self) -> int:
        """Takes a tenth of a second or more the first time."""
        num_tokens = self._backend.get_vocab_size(with_added_tokens=True)
        return max(len(self._find_bytes(token_id)) for token_id in range(num_tokens))

    @property
    def _has_bytes(self) -> bool:
        return self._is_byte_level or self._is_sentencepiece

    def _find_bytes(self, token_id: int) -> bytes:
        if not self._has_bytes:
            return str(self._backend.decode([token_id], skip_special_tokens=False)).encode()
        token = self._backend.id_to_token(token_id) if token_id >= 0 else None
        if token is None:
            return b""
        if self._is_byte_level:
            try:
                return bytes(_BYTE_OF_CHAR[c] for c in token)
            except KeyError:  # an added token, spelled as it reads
                return str(token).encode()
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            try:
                return bytes.fromhex(token[3:5])
            except ValueError:  # a token that only looks like a byte
                pass
        return str(token).replace(_SPACE_MARK, " ").encode()


class _ByteStream:
    def __init__(self, vocabulary: TokenText, skipped: frozenset[int], num_stripped: int) -> None:
        self._vocabulary = vocabulary
        self._skipped = skipped
        self._num_stripped = num_stripped
        """Spaces yet to be removed from the front of the text."""
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def go_on_from(self, prompt_token_ids: Sequence[int]) -> None:
        """As if these had been pushed. Reads both ends of them only: the front until it is stripped, and the last bytes
        until no open character can reach further back."""
        for token_id in prompt_token_ids:
            if not self._num_stripped:
                break
            self.push(token_id)
        tail = b""
        for token_id in reversed(prompt_token_ids):
            if len(tail) >= _MAX_OPEN_BYTES:
                break
            tail = self._bytes_of(token_id) + tail
        self._decoder.reset()
        self._decoder.decode(tail)

    def push(self, token_id: int) -> str:
        return self._strip(self._decoder.decode(self._bytes_of(token_id)))

    def flush(self) -> str:
        return self._strip(self._decoder.decode(b"", final=True))

    def _bytes_of(self, token_id: int) -> bytes:
        return b"" if token_id in self._skipped else self._vocabulary.token_bytes(token_id)

    def _strip(self, text: str) -> str:
        if not self._num_stripped or not text:
            return text
        num_spaces = len(text) - len(text.lstrip(" "))
        start = min(num_spaces, self._num_stripped)
        # The front of the text ends with the first character that is no space.
        self._num_stripped = self._num_stripped - start if num_spaces == len(text) else 0
        return text[start:]


class _WindowStream:
    """Decodes a window that starts one released piece early, and releases the difference (the two offsets of vLLM's and
    TGI's slow path): joins between tokens then read as in the whole text."""

    def __init__(self, backend: Backend, skip_special_tokens: bool, prompt_token_ids: Sequence[int]) -> None:
        self._backend = backend
        self._skip_special_tokens = skip_special_tokens
        self._window = self._visible_end(prompt_token_ids)
        self._num_read = len(self._window)
        """Tokens at the front of the window whose text has been released; they are its context."""

    def push(self, token_id: int) -> str:
        self._window.append(token_id)
        fresh = self._fresh_text()
        if not fresh or fresh.endswith(_REPLACEMENT):
            return ""
        self._window = self._window[self._num_read :]
        self._num_read = len(self._window)
        return fresh

    def flush(self) -> str:
        return self._fresh_text()

    def _visible_end(self, token_ids: Sequence[int]) -> list[int]:
        """The last tokens that show some text, so that what follows is not taken for the front of a text."""
        num_tokens = _MIN_CONTEXT_TOKENS
        while num_tokens < len(token_ids) and not self._decode(list(token_ids[-num_tokens:])):
            num_tokens *= 2
        return list(token_ids[-num_tokens:])

    def _fresh_text(self) -> str:
        context = self._decode(self._window[: self._num_read])
        return self._decode(self._window)[len(context) :]

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._backend.decode(token_ids, skip_special_tokens=self._skip_special_tokens))


def byte_alphabet() -> dict[int, str]:
    """GPT-2's printable spelling of the 256 bytes: printable Latin-1 stands for itself, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {b: chr(b) for b in printable} | {b: chr(0x100 + i) for i, b in enumerate(others)}


_BYTE_OF_CHAR = {char: byte for byte, char in byte_alphabet().items()}


def _read_decoder(decoder: Any) -> tuple[bool, bool, int]:
    """(is byte-level, is sentencepiece with byte fallback, spaces stripped from the front of a text)."""
    if decoder is None:
        return False, False, 0
    state = json.loads(decoder.__getstate__())
    if state["type"] == "ByteLevel":
        return True, False, 0
    steps = state.get("decoders", [])
    kinds = [step["type"] for step in steps]
    if kinds not in (["Replace", "ByteFallback", "Fuse"], ["Replace", "ByteFallback", "Fuse", "Strip"]):
        return False, False, 0
    replace = {"type": "Replace", "pattern": {"String": _SPACE_MARK}, "content": " "}
    num_stripped = int(steps[3]["start"]) if len(steps) == 4 else 0
    strip = {"type": "Strip", "content": " ", "start": num_stripped, "stop": 0}
    is_known = steps[0] == replace and steps[3:] in ([], [strip])
    return False, is_known, num_stripped if is_known else 0
