"""The text of a growing answer: what may be shown now, and whether a stop string has ended it.

Nothing released is ever taken back: an incomplete character and a suffix that may be the beginning of a stop string
wait. Knows nothing of end-of-text tokens; whoever appends decides which tokens belong to the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from replicas.engine.sampling_params import SamplingParams
from replicas.engine.token_text import TextStream
from replicas.types import Emitted


class _Streams(Protocol):
    def stream(self, skip_special_tokens: bool = True, prompt_token_ids: Sequence[int] = ()) -> TextStream: ...


@dataclass(frozen=True, slots=True)
class StopMatch:
    """`num_tokens` of the tokens just appended belong to the answer, the one that completed `stop` being the last."""

    stop: str
    num_tokens: int


class Detokenizer:
    """For every split of a token sequence into emitted and appended ones, the released text is the same.

    The text goes on from that of `continued_token_ids`, a prompt, or stands on its own where there are none. Of several
    stop strings the one that is complete first wins, then the longer one. As in vLLM, one that is complete within the
    first `min_tokens` tokens is ordinary text.
    """

    def __init__(
        self,
        tokenizer: _Streams,
        sampling: SamplingParams,
        emitted: Emitted,
        continued_token_ids: Sequence[int] = (),
    ) -> None:
        self._stream = tokenizer.stream(sampling.skip_special_tokens, continued_token_ids)
        self._stops = tuple(stop for stop in sampling.stop if stop)
        self._include_stop = sampling.include_stop_str_in_output
        self._min_tokens = sampling.min_tokens
        self._num_tokens = 0
        # All text so far is: released + ready + held + what the stream still keeps.
        self._ready = ""
        self._held = ""
        self._is_flushed = False
        self.match: StopMatch | None = None
        replayed = self.append(emitted.token_ids)
        if replayed is not None:
            self.match = StopMatch(replayed.stop, 0)
        self._num_known = emitted.num_chars
        """Characters at the front of the ready text that the client already holds: they are not released again."""

    def append(self, token_ids: Sequence[int]) -> StopMatch | None:
        """Take in more tokens; the match if a stop string is complete. Later tokens are then ignored."""
        if self.match is not None:
            return StopMatch(self.match.stop, 0)
        for num_read, token_id in enumerate(token_ids, start=1):
            self._num_tokens += 1
            stop = self._read(self._stream.push(token_id))
            if stop is not None:
                self.match = StopMatch(stop, num_read)
                break
        return self.match

    def take(self, finished: bool) -> str:
        """The text that became certain since the last call; all that is left when `finished`."""
        if finished and not self._is_flushed:
            self._is_flushed = True
            if self.match is None:
                self._ready += self._held + self._stream.flush()
                self._held = ""
        text = self._ready[self._num_known :]
        self._num_known = max(0, self._num_known - len(self._ready))
        self._ready = ""
        return text

    def _read(self, text: str) -> str | None:
        """Sort new text into ready and held. No stop string can begin before the held text."""
        if not text:
            return None
        if not self._stops:
            self._ready += text
            return None
        open_text = self._held + text
        if self._num_tokens > self._min_tokens:
            found = _first_complete(open_text, self._stops)
            if found is not None:
                start, end = found
                self._ready += open_text[: end if self._include_stop else start]
                self._held = ""
                return open_text[start:end]
        num_held = _longest_beginning(open_text, self._stops)
        self._ready += open_text[: len(open_text) - num_held]
        self._held = open_text[len(open_text) - num_held :]
        return None


def _first_complete(text: str, stops: Sequence[str]) -> tuple[int, int] | None:
    """(start, end) of the stop string that ends first in `text`, the longest of those that end there."""
    found = [(start + len(stop), start) for stop in stops if (start := text.find(stop)) >= 0]
    if not found:
        return None
    end, start = min(found)
    return start, end


def _longest_beginning(text: str, stops: Sequence[str]) -> int:
    """Length of the longest suffix of `text` that is a proper beginning of a stop string."""
    longest = 0
    for stop in stops:
        start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
        while start >= 0 and not stop.startswith(text[start:]):
            start = text.find(stop[0], start + 1)
        if start >= 0:
            longest = max(longest, len(text) - start)
    return longest
