"""What requests do to their logits before anything is drawn: bias, bans, penalties. Touches only the tokens named;
the rest of the row costs one float32 copy, and not even that where nobody asks for an edit.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from replicas.engine.batch import Penalised, SamplingColumns

_LARGEST = float(torch.finfo(torch.float32).max)


def apply_edits(logits: torch.Tensor, columns: SamplingColumns) -> tuple[torch.Tensor, dict[int, str]]:
    """Edited float32 scores (num_samples, vocab_size), and the rows whose edits make no sense, with the reason.

    `logits` stay as they are; the scores may share their memory when there is nothing to edit.
    """
    errors: dict[int, str] = {}
    if not (columns.logit_bias or columns.banned or columns.penalised):
        return logits.to(torch.float32), errors
    scores = logits.to(torch.float32, copy=True)
    vocab_size = scores.shape[1]
    _add_bias(scores, columns, errors)
    for row, token_ids in columns.banned:
        # An id the model does not have cannot be drawn anyway.
        known = [i for i in token_ids if 0 <= i < vocab_size]
        scores[row, known] = -torch.inf
    for entry in columns.penalised:
        if entry.row not in errors:
            _penalise(scores, entry, columns, errors)
    return scores, errors


def _add_bias(scores: torch.Tensor, columns: SamplingColumns, errors: dict[int, str]) -> None:
    rows: list[int] = []
    token_ids: list[int] = []
    values: list[float] = []
    for row, bias in columns.logit_bias:
        reason = _bias_error(bias, scores.shape[1])
        if reason is not None:
            errors[row] = reason
            continue
        rows.extend([row] * len(bias))
        token_ids.extend(bias)
        values.extend(bias.values())
    if rows:
        where = (_on(scores, np.array(rows)), _on(scores, np.array(token_ids)))
        scores.index_put_(where, _on(scores, np.array(values, np.float32)), accumulate=True)


def _bias_error(bias: Mapping[int, float], vocab_size: int) -> str | None:
    for token_id, value in bias.items():
        if not 0 <= token_id < vocab_size:
            return f"logit_bias names token {token_id}, but the model's vocabulary ends at {vocab_size - 1}"
        if not np.isfinite(value):
            return f"logit_bias of token {token_id} is {value}, expected a finite number"
    return None


def _penalise(scores: torch.Tensor, entry: Penalised, columns: SamplingColumns, errors: dict[int, str]) -> None:
    """Repetition first, over prompt and output, then frequency and presence, over the output alone."""
    row = entry.row
    output_ids, counts = np.unique(entry.output_token_ids, return_counts=True)
    repetition = float(columns.repetition_penalty[row])
    token_ids = output_ids if repetition == 1.0 else np.union1d(entry.prompt_token_ids, output_ids)
    if not len(token_ids):
        return
    if token_ids[0] < 0 or token_ids[-1] >= scores.shape[1]:
        errors[row] = f"the token history leaves the vocabulary of {scores.shape[1]} tokens"
        return
    where = _on(scores, token_ids)
    seen = scores[row, where]
    if repetition != 1.0:
        seen = torch.where(seen > 0, seen / repetition, seen * repetition)
        # a penalty next to 0 divides by next to nothing: the token is as likely as can be, not an error
        seen = seen.clamp(-_LARGEST, _LARGEST)
    cost = np.zeros(len(token_ids), np.float32)
    cost[np.searchsorted(token_ids, output_ids)] = columns.presence_penalty[row] + columns.frequency_penalty[
        row
    ] * counts.astype(np.float32)
    scores[row, where] = seen - _on(scores, cost)


def _on(scores: torch.Tensor, values: NDArray[np.generic]) -> torch.Tensor:
    return torch.from_numpy(values).to(scores.device)
