"""What every checkpoint format can be asked for. `hf_folder.py` and `gguf_model.py` answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from replicas.engine.models.transformer import TransformerConfig

MAX_SIZE = 2**31 - 1


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What the model's authors recommend; None where they say nothing."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None


class Checkpoint(Protocol):
    """Every method raises ValueError with one sentence that names the file and what is wrong with it."""

    path: Path

    def architecture(self) -> str: ...

    def transformer_config(self) -> TransformerConfig: ...

    def eos_token_ids(self) -> frozenset[int]: ...

    def sampling_defaults(self) -> SamplingDefaults: ...

    def tensor_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of every tensor, by the name under which `tensors` gives it; reads headers only."""
        ...

    def tensors(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face's Llama name, tensor on the CPU); a packed format is expanded to `dtype`."""
        ...


class Fields:
    """Typed reading of a checkpoint's loose metadata; every complaint names the file and the key."""

    def __init__(self, values: Mapping[str, Any], path: Path) -> None:
        self.values = values
        self.path = path

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._number(key, default)
        if value != int(value):
            raise ValueError(f"{self.path}: {key!r} should be an integer, not {value}")
        return int(value)

    def size(self, key: str, default: int | None = None) -> int:
        """A positive integer that torch can count to."""
        value = self.integer(key, default)
        if not 1 <= value <= MAX_SIZE:
            raise ValueError(f"{self.path}: {key!r} should be positive and at most {MAX_SIZE}, not {value}")
        return value

    def real(self, key: str, default: float | None = None, above: float | None = None) -> float:
        value = float(self._number(key, default))
        if above is not None and value <= above:
            raise ValueError(f"{self.path}: {key!r} should be above {above:g}, not {value:g}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        if value is not None and not isinstance(value, int):
            raise ValueError(f"{self.path}: {key!r} should be true or false, not {value!r}")
        return default if value is None else bool(value)

    def mapping(self, key: str) -> dict[str, Any]:
        """An object; empty if it is missing."""
        value = self.values.get(key)
        if not (value is None or isinstance(value, dict)):
            raise ValueError(f"{self.path}: {key!r} should be an object, not {value!r}")
        return value or {}

    def text(self, key: str, default: str) -> str:
        value = self.values.get(key)
        return default if value is None else str(value)

    def optional_real(self, key: str) -> float | None:
        return self.real(key) if key in self else None

    def optional_integer(self, key: str) -> int | None:
        return self.integer(key) if key in self else None

    def token_ids(self, key: str) -> frozenset[int]:
        """One id or a list of them."""
        value = self.values.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(token_id, int) for token_id in ids):
            raise ValueError(f"{self.path}: {key!r} should be a token id or a list of them, not {value!r}")
        return frozenset(ids)

    def _number(self, key: str, default: float | None) -> float:
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise ValueError(f"{self.path}: {key!r} is missing")
        # Neither NaN nor an infinity is within the bounds, nor an integer that no float holds.
        if isinstance(value, bool) or not isinstance(value, int | float) or not -1e300 < value < 1e300:
            raise ValueError(f"{self.path}: {key!r} should be a number, not {value!r}")
        return value
