"""One answer on its way out: drawn tokens become chunks with text, log-probabilities, usage and an end.

Stop strings are decided here, where text is; the engine may have drawn further tokens by then, which are dropped.
Knows no queue, no thread and no other request.
"""

from __future__ import annotations

from collections.abc import Sequence

from replicas.engine.batch import Logprobs
from replicas.engine.request import Finish, Request, Status
from replicas.engine.scheduler import RequestOutput
from replicas.engine.tokenizer import Detokenizer, Tokenizer
from replicas.types import Chunk, Emitted, EngineError, TokenLogprob, Usage


class Answer:
    """Of `request`, whose tokens beyond the prompt are those of `emitted`.

    A completion continues the prompt's text, so the space that a sentencepiece model draws first belongs to it. The
    answer to a chat is a text of its own: there the same space is the vocabulary's mark of a beginning and is left out,
    as where transformers decodes an answer by itself."""

    def __init__(self, tokenizer: Tokenizer, request: Request, emitted: Emitted, continues_prompt: bool) -> None:
        self._tokenizer = tokenizer
        self._sampling = request.sampling
        self._num_prompt_tokens = request.num_prompt_tokens
        self._num_cached_tokens = 0
        self._num_completion_tokens = len(emitted.token_ids)
        self._num_chunks = 0
        # A client may hold the last token already and lack only the end, for its replica died in between.
        self._end = request.finish_after_last_token()
        shown = self._shown(emitted.token_ids, self._end)
        self._detokenizer = Detokenizer(
            tokenizer,
            request.sampling,
            Emitted(tuple(shown), emitted.num_chars),
            request.prompt_token_ids.tolist() if continues_prompt else (),
        )
        self.is_finished = self._end is not None or self._detokenizer.match is not None
        self.has_ended = False
        """The engine itself has reported the end; an answer finished by a stop string must still be aborted there."""

    def last_chunk(self) -> Chunk:
        """The end of an answer that was finished before it came here (`is_finished` at birth)."""
        match = self._detokenizer.match
        return self._chunk((), (), self._end, None if match is None else match.stop)

    def chunk(self, outputs: Sequence[RequestOutput]) -> Chunk:
        """One chunk of all that some steps drew. Raises EngineError if the request failed in the engine."""
        token_ids = [token_id for output in outputs for token_id in output.token_ids]
        logprobs = [logprobs for output in outputs for logprobs in output.logprobs]
        finish = outputs[-1].finish
        self._num_cached_tokens = outputs[-1].num_cached_tokens
        self.has_ended = finish is not None
        if finish is not None and finish.status is Status.FINISHED_FAILED:
            raise EngineError(finish.error or "the engine failed in this request")
        match = self._detokenizer.append(self._shown(token_ids, finish))
        if match is not None:
            del token_ids[match.num_tokens :], logprobs[match.num_tokens :]
        self.is_finished = finish is not None or match is not None
        self._num_completion_tokens += len(token_ids)
        return self._chunk(token_ids, logprobs, finish, None if match is None else match.stop)

    def _shown(self, token_ids: Sequence[int], finish: Finish | None) -> Sequence[int]:
        """The tokens that appear in the text: a token that ended the answer does so no more than a stop string."""
        is_stopped = finish is not None and finish.status is Status.FINISHED_STOPPED
        return token_ids[:-1] if is_stopped and not self._sampling.include_stop_str_in_output else token_ids

    def _chunk(
        self, token_ids: Sequence[int], logprobs: Sequence[Logprobs], finish: Finish | None, stop: str | None
    ) -> Chunk:
        is_first, self._num_chunks = self._num_chunks == 0, self._num_chunks + 1
        usage = Usage(self._num_prompt_tokens, self._num_cached_tokens, self._num_completion_tokens)
        text = self._detokenizer.take(self.is_finished)
        shown_logprobs = tuple(
            self._token_logprob(token_id, row) for token_id, row in zip(token_ids, logprobs, strict=False)
        )
        if not self.is_finished:
            return Chunk(tuple(token_ids), text, shown_logprobs, usage=usage if is_first else None)
        if stop is not None:
            return Chunk(tuple(token_ids), text, shown_logprobs, "stop", stop, usage)
        assert finish is not None, "an answer without a stop string ends by the engine"
        return Chunk(tuple(token_ids), text, shown_logprobs, finish.reason, finish.stop_reason, usage)

    def _token_logprob(self, token_id: int, row: Logprobs) -> TokenLogprob:
        top = zip(row.top_token_ids.tolist(), row.top_logprobs.tolist(), strict=True)
        bytes_of = self._tokenizer.token_bytes
        alternatives = tuple(TokenLogprob(other, bytes_of(other), logprob) for other, logprob in top)
        return TokenLogprob(token_id, bytes_of(token_id), row.sampled, alternatives)
