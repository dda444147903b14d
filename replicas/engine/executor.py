"""From one batch to every rank. The engine sees this protocol only; one rank in this process is its first user."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from replicas.engine.batch import Batch, StepOutput


class Executor(Protocol):
    @property
    def kernels_name(self) -> str:
        """Of the kernel set in use; known after `start`."""
        ...

    @property
    def phases_s(self) -> Mapping[str, float]:
        """Seconds that each phase of `start` took."""
        ...

    def start(self) -> int:
        """Load the weights on every rank and reserve the KV cache; returns the number of blocks that fit.

        Raises ValueError with one clear sentence where the model cannot be loaded or not one sequence fits."""
        ...

    def execute(self, batch: Batch) -> StepOutput:
        """Run one step. Raises only if the whole step failed; a row's own failure stands in `StepOutput.errors`."""
        ...

    def shutdown(self) -> None: ...
