"""From logits to tokens: one vectorised pipeline for all rows of a step, each row a pure function of its own
(logits, parameters, seed, position). What else is in the batch, preemption and the replica make no difference.

It knows neither requests nor text. Order of the steps (vLLM's): float32 copy, logit bias, bans, penalties, temperature,
min-p, top-k, top-p, draw. Log-probabilities are of the raw model distribution, before any of these.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from replicas.engine.batch import Logprobs, SamplingColumns, StepOutput
from replicas.engine.logit_edits import apply_edits
from replicas.engine.philox import WORDS_PER_BLOCK, philox4x32, split_words
from replicas.engine.sampling_params import MAX_LOGPROBS

NOT_FINITE = "the model's logits are not finite, or every token is banned: no token can be drawn"

_NUM_CANDIDATES = 256 + 1
_MAX_CANDIDATES = 1024 + 1
"""The largest top-k that they decide, and one more: what ties with the last candidate may be missing. Rows with a
larger top-k sort their whole vocabulary."""
_CHUNK_ELEMENTS = {"cpu": 1 << 16, "cuda": 1 << 25}
"""Elements of (rows, vocab) that one pass over the whole vocabulary touches: about the CPU's cache, the GPU's spare."""


class Sampler:
    """Owns nothing but constants of the device; `sample` may be called from any thread, one call at a time."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._blocks = np.arange(-(-vocab_size // WORDS_PER_BLOCK), dtype=np.int64)[None, :]
        self._rows_per_chunk = max(1, _CHUNK_ELEMENTS.get(device.type, 1 << 16) // vocab_size)

    @torch.inference_mode()
    def sample(self, logits: torch.Tensor, columns: SamplingColumns) -> StepOutput:
        """`logits` (num_samples, vocab_size) of any float dtype, left unchanged. A row that cannot be sampled stands in
        `errors`; the others are valid."""
        assert logits.ndim == 2, f"logits have shape {tuple(logits.shape)}, expected (num_samples, vocab_size)"
        assert logits.shape == (len(columns.seed), self._vocab_size), f"{tuple(logits.shape)} does not fit the columns"
        scores, errors = apply_edits(logits, columns)
        best, greedy_ids = scores.max(dim=-1)
        token_ids: NDArray[np.int64] = greedy_ids.cpu().numpy().copy()
        finite = np.isfinite(best.cpu().numpy())
        for row in np.flatnonzero(~finite).tolist():
            errors.setdefault(row, NOT_FINITE)

        drawn = finite & (columns.temperature > 0) & (columns.top_k != 1)
        drawn[list(errors)] = False
        rows = np.flatnonzero(drawn)
        if len(rows):
            token_ids[rows] = self._draw(scores, best, _Draws.of(columns, rows, self._vocab_size))
        return StepOutput(token_ids, self._logprobs(logits, token_ids, columns, errors), errors)

    def _draw(self, scores: torch.Tensor, best: torch.Tensor, draws: _Draws) -> NDArray[np.int64]:
        """One token id per row of `draws`."""
        temperature = torch.from_numpy(draws.temperature).to(self._device)[:, None]
        # The largest score becomes 0, so that no temperature overflows and min-p is a plain threshold.
        scaled = _rows_of(scores, draws.rows) - _rows_of(best, draws.rows)[:, None]  # (num_draws, vocab)
        scaled /= temperature

        token_ids = np.full(len(draws.rows), -1, np.int64)
        filtered = np.flatnonzero(draws.is_filtered)
        if len(filtered):
            token_ids[filtered] = self._draw_filtered(scaled, draws, filtered)
        open_rows = np.flatnonzero(token_ids < 0)
        for start in range(0, len(open_rows), self._rows_per_chunk):
            chunk = open_rows[start : start + self._rows_per_chunk]
            token_ids[chunk] = self._draw_from_all(scaled, draws, chunk)
        return token_ids

    def _draw_filtered(self, scaled: torch.Tensor, draws: _Draws, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Draw by the likeliest few hundred tokens where they decide, else by the whole sorted row. -1: the filters of
        the row keep too much to be worth a sort, it has only a min-p threshold."""
        widest = int(draws.top_k[rows].max())
        width = min(self._vocab_size, _NUM_CANDIDATES if widest < _NUM_CANDIDATES else _MAX_CANDIDATES)
        totals = self._totals(scaled, draws, rows)
        candidates = _Candidates.of(*_rows_of(scaled, rows).topk(width, dim=-1), is_whole=width == self._vocab_size)
        num_kept = candidates.num_kept(draws, rows, totals)
        token_ids = np.full(len(rows), -1, np.int64)
        known = np.flatnonzero(num_kept > 0)
        if len(known):
            token_ids[known] = candidates.draw(draws, rows, known, num_kept)

        for i in np.flatnonzero((num_kept == 0) & draws.needs_order[rows]).tolist():
            whole = _Candidates.of_whole_row(scaled[int(rows[i])], draws, rows[i : i + 1], totals[i : i + 1])
            token_ids[i] = whole.draw(draws, rows[i : i + 1], np.array([0]), whole.num_certain)[0]
        return token_ids

    def _totals(self, scaled: torch.Tensor, draws: _Draws, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Unnormalised mass of every token that min-p keeps, for rows where only top-p limits the choice; else 0.

        Summed in float64: the order of the sum, which may depend on the batch, then decides nothing."""
        totals = np.zeros(len(rows), np.float64)
        wanted = np.flatnonzero((draws.top_p[rows] < 1) & (draws.top_k[rows] == 0))
        for start in range(0, len(wanted), self._rows_per_chunk):
            chunk = wanted[start : start + self._rows_per_chunk]
            some = _rows_of(scaled, rows[chunk])
            mass = some.exp()
            if draws.has_threshold[rows[chunk]].any():
                threshold = torch.from_numpy(draws.threshold[rows[chunk]]).to(self._device)[:, None]
                mass *= some >= threshold
            totals[chunk] = mass.sum(dim=-1, dtype=torch.float64).cpu().numpy()
        return totals

    def _draw_from_all(self, scaled: torch.Tensor, draws: _Draws, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Gumbel-max over the whole vocabulary, without any sort."""
        some = _rows_of(scaled, rows)
        words = self._words(draws, rows)[:, : self._vocab_size]
        keys = words.add_(0.5).mul_(2.0**-32).log_().neg_().log_().neg_().add_(some)
        if draws.has_threshold[rows].any():
            threshold = torch.from_numpy(draws.threshold[rows]).to(self._device)[:, None]
            keys.masked_fill_(some < threshold, -torch.inf)
        token_ids: NDArray[np.int64] = keys.argmax(dim=-1).cpu().numpy()
        return token_ids

    def _words(self, draws: _Draws, rows: NDArray[np.int64]) -> torch.Tensor:
        """The random word of every token id, as float64: (num_rows, vocab_size rounded up to whole blocks)."""
        counter = (
            self._blocks,
            np.zeros((1, 1), np.int64),
            draws.position_low[rows, None],
            draws.position_high[rows, None],
        )
        key = (draws.seed_low[rows, None], draws.seed_high[rows, None])
        if self._device.type == "cpu":  # numpy's integer loops are twice as fast as torch's there
            words = [torch.from_numpy(word) for word in philox4x32(counter, key)]
        else:
            c0, c1, c2, c3 = (torch.from_numpy(word).to(self._device) for word in counter)
            k0, k1 = (torch.from_numpy(word).to(self._device) for word in key)
            words = list(philox4x32((c0, c1, c2, c3), (k0, k1)))
        by_token = torch.empty((*words[0].shape, WORDS_PER_BLOCK), dtype=torch.float64, device=self._device)
        for i, word in enumerate(words):
            by_token[..., i] = word
        return by_token.reshape(len(rows), -1)

    def _logprobs(
        self, logits: torch.Tensor, token_ids: NDArray[np.int64], columns: SamplingColumns, errors: dict[int, str]
    ) -> dict[int, Logprobs]:
        rows = np.array([r for r in np.flatnonzero(columns.num_logprobs >= 0).tolist() if r not in errors], np.int64)
        if not len(rows):
            return {}
        raw = logits[torch.from_numpy(rows).to(self._device)].to(torch.float32)
        # Always the same width, so that the order of equal log-probabilities does not depend on the batch.
        num_top = min(self._vocab_size, max(MAX_LOGPROBS, int(columns.num_logprobs.max())))
        top, top_ids = raw.topk(num_top, dim=-1)
        shifted = raw - top[:, :1]
        normaliser = top[:, :1].double() + shifted.exp_().sum(dim=-1, keepdim=True, dtype=torch.float64).log()
        sampled = raw.gather(1, torch.from_numpy(token_ids[rows]).to(self._device)[:, None])
        sampled_logprobs = (sampled - normaliser)[:, 0].cpu().numpy()
        top_logprobs = (top - normaliser).to(torch.float32).cpu().numpy()
        top_token_ids = top_ids.cpu().numpy()
        result = {}
        for i, row in enumerate(rows.tolist()):
            order = np.lexsort((top_token_ids[i], -top_logprobs[i]))[: int(columns.num_logprobs[row])]
            result[row] = Logprobs(float(sampled_logprobs[i]), top_token_ids[i][order], top_logprobs[i][order])
        return result


@dataclass(frozen=True, slots=True)
class _Draws:
    """The parameters of the rows that draw, normalised; every column has shape (num_draws,)."""

    rows: NDArray[np.int64]
    """Row of the step's logits."""
    temperature: NDArray[np.float32]
    threshold: NDArray[np.float32]
    """min-p as a lower bound of scores whose largest is 0; -inf: off."""
    top_k: NDArray[np.int64]
    top_p: NDArray[np.float64]
    seed_low: NDArray[np.int64]
    seed_high: NDArray[np.int64]
    position_low: NDArray[np.int64]
    position_high: NDArray[np.int64]

    @classmethod
    def of(cls, columns: SamplingColumns, rows: NDArray[np.int64], vocab_size: int) -> _Draws:
        top_k = columns.top_k[rows].astype(np.int64)
        with np.errstate(divide="ignore"):
            threshold = np.minimum(np.log(columns.min_p[rows].astype(np.float32)), np.float32(0))
        return cls(
            rows,
            columns.temperature[rows].astype(np.float32),
            threshold,
            np.where((top_k <= 0) | (top_k >= vocab_size), 0, top_k),
            columns.top_p[rows].astype(np.float64),
            *split_words(columns.seed[rows]),
            *split_words(columns.position[rows]),
        )

    @property
    def needs_order(self) -> NDArray[np.bool_]:
        """A filter that ranks tokens."""
        return (self.top_k > 0) | (self.top_p < 1)

    @property
    def is_filtered(self) -> NDArray[np.bool_]:
        return self.needs_order | self.has_threshold

    @property
    def has_threshold(self) -> NDArray[np.bool_]:
        return self.threshold > -np.inf


@dataclass(frozen=True, slots=True)
class _Candidates:
    """The likeliest tokens of some rows in the one order that all filters share: falling score, then rising id.

    `scores` and `token_ids` have shape (num_rows, width). Unless they are the whole vocabulary, tokens that tie with
    the last candidate may be missing, so only the `num_certain` strictly better ones have a certain rank.
    """

    scores: NDArray[np.float32]
    token_ids: NDArray[np.int64]
    num_certain: NDArray[np.int64]

    @classmethod
    def of(cls, scores: torch.Tensor, token_ids: torch.Tensor, is_whole: bool) -> _Candidates:
        values: NDArray[np.float32] = scores.cpu().numpy()
        ids: NDArray[np.int64] = token_ids.cpu().numpy()
        has_ties = np.flatnonzero((values[:, 1:] == values[:, :-1]).any(axis=1))
        if len(has_ties):
            values, ids = values.copy(), ids.copy()
            order = np.lexsort((ids[has_ties], -values[has_ties]))
            values[has_ties] = np.take_along_axis(values[has_ties], order, axis=1)
            ids[has_ties] = np.take_along_axis(ids[has_ties], order, axis=1)
        width = values.shape[1]
        num_certain = np.full(len(values), width) if is_whole else (values > values[:, -1:]).sum(axis=1)
        return cls(values, ids, num_certain)

    @classmethod
    def of_whole_row(
        cls, row: torch.Tensor, draws: _Draws, rows: NDArray[np.int64], totals: NDArray[np.float64]
    ) -> _Candidates:
        """Exactly the tokens of one row (vocab,) that pass its filters. Only the values are sorted, which is several
        times faster than sorting ids with them; the last kept value then tells which tokens stay."""
        values: NDArray[np.float32] = row.cpu().numpy()
        ordered = -np.sort(-values)
        whole = cls(ordered[None, :], np.empty((1, 0), np.int64), np.array([len(values)]))
        num_kept = int(whole.num_kept(draws, rows, totals)[0])
        last = ordered[num_kept - 1]
        better = np.flatnonzero(values > last)
        equal = np.flatnonzero(values == last)[: num_kept - len(better)]
        kept = np.concatenate([better, equal])
        return cls(values[None, kept], kept[None, :], np.array([num_kept]))

    def num_kept(self, draws: _Draws, rows: NDArray[np.int64], totals: NDArray[np.float64]) -> NDArray[np.int64]:
        """How many of the candidates pass min-p, top-k and top-p; 0 where the candidates do not decide it.

        top-p keeps the smallest set whose mass reaches p of what min-p and top-k left, the crossing token included.
        """
        possible = (self.scores >= draws.threshold[rows, None]) & (self.scores > -np.inf)
        limit = possible.sum(axis=1)
        top_k = draws.top_k[rows]
        limit = np.where(top_k > 0, np.minimum(limit, top_k), limit)
        is_inside = limit <= self.num_certain

        cumulative = np.exp(self.scores, dtype=np.float64).cumsum(axis=1)
        top_p = draws.top_p[rows]
        inside_total = np.take_along_axis(cumulative, limit[:, None] - 1, axis=1)[:, 0]
        target = top_p * np.where(top_k > 0, inside_total, totals)
        num_kept = np.minimum(1 + (cumulative < target[:, None]).sum(axis=1), limit)
        num_kept = np.where(top_p < 1, num_kept, limit)
        is_decided = is_inside | ((top_p < 1) & (top_k == 0) & (num_kept <= self.num_certain))
        return np.where(is_decided, num_kept, 0)

    def draw(
        self, draws: _Draws, rows: NDArray[np.int64], known: NDArray[np.int64], num_kept: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Gumbel-max over the first `num_kept` candidates; a token's random number is found by its id, not its rank.
        Token ids of the rows `known`."""
        width = int(num_kept[known].max())
        ids = self.token_ids[known, :width]
        which = rows[known]
        zero = np.zeros((1, 1), np.int64)
        words = philox4x32(
            (
                ids // WORDS_PER_BLOCK,
                zero,
                draws.position_low[which][:, None],
                draws.position_high[which][:, None],
            ),
            (draws.seed_low[which][:, None], draws.seed_high[which][:, None]),
        )
        word = np.choose(ids % WORDS_PER_BLOCK, words)
        gumbel = -np.log(-np.log((word + 0.5) * 2.0**-32))
        keys = np.where(np.arange(width) < num_kept[known][:, None], self.scores[known, :width] + gumbel, -np.inf)
        winners = keys.argmax(axis=1)
        drawn: NDArray[np.int64] = ids[np.arange(len(known)), winners]
        return drawn


def _rows_of(table: torch.Tensor, rows: NDArray[np.int64]) -> torch.Tensor:
    """Some rows of a table, without a copy where they are all of its rows. `rows` are distinct and rising."""
    return table if len(rows) == len(table) else table[torch.from_numpy(rows).to(table.device)]
