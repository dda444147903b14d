"""From logits to tokens: one vectorised pipeline for all rows of a step, each row a pure function of its own
(logits, parameters, seed, position). What else is in the batch, preemption and the replica make no difference.

It knows neither requests nor text. Order of the steps (vLLM's): float32 copy, logit bias, bans, penalties, temperature,
min-p, top-k, top-p, draw. Log-probabilities are of the raw model distribution, before any of these.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray

from replicas.engine.batch import Logprobs, SamplingColumns, StepOutput
from replicas.engine.kernels import GumbelDraws, Kernels, TopOfRows
from replicas.engine.logit_edits import apply_edits
from replicas.engine.philox import WORDS_PER_BLOCK, philox4x32, split_words
from replicas.engine.sampling_params import MAX_LOGPROBS

NOT_FINITE = "the model's logits are not finite, or every token is banned: no token can be drawn"

_NUM_CANDIDATES = 256 + 1
_MAX_CANDIDATES = 1024 + 1
"""The largest top-k that they decide, and one more: what ties with the last candidate may be missing. Rows with a
larger top-k sort their whole vocabulary."""


class Sampler:
    """Owns nothing but constants of the device; `sample` may be called from any thread, one call at a time."""

    def __init__(self, vocab_size: int, device: torch.device, kernels: Kernels) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._kernels = kernels

    @torch.inference_mode()
    def sample(self, logits: torch.Tensor, columns: SamplingColumns) -> StepOutput:
        """`logits` (num_samples, vocab_size) of any float dtype, left unchanged. A row that cannot be sampled stands in
        `errors`; the others are valid."""
        assert logits.ndim == 2, f"logits have shape {tuple(logits.shape)}, expected (num_samples, vocab_size)"
        assert logits.shape == (len(columns.seed), self._vocab_size), f"{tuple(logits.shape)} does not fit the columns"
        scores, errors = apply_edits(logits.contiguous(), columns)
        best, token_ids = self._kernels.max_of_rows(scores)
        finite = np.isfinite(best)
        for row in np.flatnonzero(~finite).tolist():
            errors.setdefault(row, NOT_FINITE)

        drawn = finite & (columns.temperature > 0) & (columns.top_k != 1)
        drawn[list(errors)] = False
        rows = np.flatnonzero(drawn)
        if len(rows):
            token_ids[rows] = self._draw(scores, best, _Draws.of(columns, rows, self._vocab_size))
        return StepOutput(token_ids, self._logprobs(logits, token_ids, columns, errors), errors)

    def _draw(self, scores: torch.Tensor, best: NDArray[np.float32], draws: _Draws) -> NDArray[np.int64]:
        """One token id per row of `draws`. `best` is the largest score of each of the step's rows."""
        token_ids = np.full(len(draws.rows), -1, np.int64)
        filtered = np.flatnonzero(draws.is_filtered)
        if len(filtered):
            token_ids[filtered] = self._draw_filtered(scores, best, draws.some(filtered))
        is_open = token_ids < 0
        if is_open.any():
            rest = draws.some(np.flatnonzero(is_open))
            token_ids[is_open] = self._kernels.draw_of_rows(scores, rest.gumbel(best))
        return token_ids

    def _draw_filtered(self, scores: torch.Tensor, best: NDArray[np.float32], draws: _Draws) -> NDArray[np.int64]:
        """Draw by the likeliest few hundred tokens where they decide, else by the whole sorted row. -1: the filters of
        the row keep too much to be worth a sort, it has only a min-p threshold."""
        widest = int(draws.top_k.max())
        width = min(self._vocab_size, _NUM_CANDIDATES if widest < _NUM_CANDIDATES else _MAX_CANDIDATES)
        top = self._kernels.top_of_rows(scores, draws.gumbel(best), width)
        candidates = _Candidates.of(top, is_whole=width == self._vocab_size)
        num_kept = candidates.num_kept(draws, top.mass)
        token_ids = np.full(len(draws.rows), -1, np.int64)
        known = np.flatnonzero(num_kept > 0)
        if len(known):
            token_ids[known] = candidates.draw(draws, known, num_kept)

        for i in np.flatnonzero((num_kept == 0) & draws.needs_order).tolist():
            one = draws.some(np.array([i]))
            scaled = (scores[one.rows[0]].cpu().numpy() - best[one.rows]) / one.temperature
            whole = _Candidates.of_whole_row(scaled, one, top.mass[i : i + 1])
            token_ids[i] = whole.draw(one, np.array([0]), whole.num_certain)[0]
        return token_ids

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
    seed: NDArray[np.uint64]
    position: NDArray[np.int64]

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
            columns.seed[rows],
            columns.position[rows],
        )

    def gumbel(self, best: NDArray[np.float32]) -> GumbelDraws:
        columns = self.temperature, self.threshold, self.seed, self.position
        return GumbelDraws(self.rows, best[self.rows], *columns)

    def some(self, indices: NDArray[np.int64]) -> _Draws:
        return _Draws(*(getattr(self, field.name)[indices] for field in fields(self)))

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
    def of(cls, top: TopOfRows, is_whole: bool) -> _Candidates:
        values, ids = top.scores, top.token_ids
        has_ties = np.flatnonzero((values[:, 1:] == values[:, :-1]).any(axis=1))
        if len(has_ties):
            order = np.lexsort((ids[has_ties], -values[has_ties]))
            values[has_ties] = np.take_along_axis(values[has_ties], order, axis=1)
            ids[has_ties] = np.take_along_axis(ids[has_ties], order, axis=1)
        width = values.shape[1]
        num_certain = np.full(len(values), width) if is_whole else (values > values[:, -1:]).sum(axis=1)
        return cls(values, ids, num_certain)

    @classmethod
    def of_whole_row(cls, values: NDArray[np.float32], draw: _Draws, total: NDArray[np.float64]) -> _Candidates:
        """Exactly the tokens of one row of scores (vocab,) that pass its filters, `draw` and `total` its own. Only the
        values are sorted, several times faster than ids with them; the last kept value tells which tokens stay."""
        ordered = -np.sort(-values)
        whole = cls(ordered[None, :], np.empty((1, 0), np.int64), np.array([len(values)]))
        num_kept = int(whole.num_kept(draw, total)[0])
        last = ordered[num_kept - 1]
        better = np.flatnonzero(values > last)
        equal = np.flatnonzero(values == last)[: num_kept - len(better)]
        kept = np.concatenate([better, equal])
        return cls(values[None, kept], kept[None, :], np.array([num_kept]))

    def num_kept(self, draws: _Draws, totals: NDArray[np.float64]) -> NDArray[np.int64]:
        """How many of the candidates pass min-p, top-k and top-p; 0 where the candidates do not decide it.

        top-p keeps the smallest set whose mass reaches p of what min-p and top-k left, the crossing token included.
        """
        possible = (self.scores >= draws.threshold[:, None]) & (self.scores > -np.inf)
        limit = possible.sum(axis=1)
        top_k = draws.top_k
        limit = np.where(top_k > 0, np.minimum(limit, top_k), limit)
        is_inside = limit <= self.num_certain

        cumulative = np.exp(self.scores, dtype=np.float64).cumsum(axis=1)
        top_p = draws.top_p
        inside_total = np.take_along_axis(cumulative, limit[:, None] - 1, axis=1)[:, 0]
        target = top_p * np.where(top_k > 0, inside_total, totals)
        num_kept = np.minimum(1 + (cumulative < target[:, None]).sum(axis=1), limit)
        num_kept = np.where(top_p < 1, num_kept, limit)
        is_decided = is_inside | ((top_p < 1) & (top_k == 0) & (num_kept <= self.num_certain))
        return np.where(is_decided, num_kept, 0)

    def draw(self, draws: _Draws, known: NDArray[np.int64], num_kept: NDArray[np.int64]) -> NDArray[np.int64]:
        """Gumbel-max over the first `num_kept` candidates; a token's random number is found by its id, not its rank.
        Token ids of the draws `known`."""
        width = int(num_kept[known].max())
        ids = self.token_ids[known, :width]
        position_low, position_high = split_words(draws.position[known])
        seed_low, seed_high = split_words(draws.seed[known])
        counter = (ids // WORDS_PER_BLOCK, np.zeros((1, 1), np.int64), position_low[:, None], position_high[:, None])
        words = philox4x32(counter, (seed_low[:, None], seed_high[:, None]))
        word = np.choose(ids % WORDS_PER_BLOCK, words)
        gumbel = -np.log(-np.log((word + 0.5) * 2.0**-32))
        keys = np.where(np.arange(width) < num_kept[known][:, None], self.scores[known, :width] + gumbel, -np.inf)
        winners = keys.argmax(axis=1)
        drawn: NDArray[np.int64] = ids[np.arange(len(known)), winners]
        return drawn
