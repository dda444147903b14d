"""Decode steps through recorded graphs: what is recorded when, and the same logits as without. A graph is played here
by running its function again on the same memory, which is what a replay does."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from replicas.engine.kernels import Forward, StepModel, select_kernels, triton_attention
from replicas.engine.kernels.cuda_graphs import Capture, GraphForward
from replicas.engine.kernels.gpu import GpuKernels
from replicas.engine.kernels.reference import ReferenceKernels
from tests.replicas.engine.paged_driver import PagedDriver
from tests.replicas.engine.test_model_runner import random_model

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="compiled kernels do not run on CPU tensors")
CUDA = torch.device("cuda")


class PlayedGraphs:
    """A `Capture`. Remembers how many graphs were recorded and replayed."""

    def __init__(self) -> None:
        self.num_recorded = 0
        self.num_replayed = 0

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self.num_recorded += 1
        result = run().clone()

        def replay() -> None:
            self.num_replayed += 1
            result.copy_(run())

        return replay, result


class GraphKernels(GpuKernels):
    def __init__(self, capture: Capture) -> None:
        super().__init__(torch.device("cpu"), 16)
        self._capture = capture

    def compile(self, model: StepModel, kv_cache: Tensor) -> Forward:
        return GraphForward(model, kv_cache, self._capture)


class Pair:
    """One model on the reference kernels and on recorded Triton, stepped side by side."""

    def __init__(self, capture: Capture) -> None:
        self.drivers = [
            PagedDriver(random_model("float32", kernels), block_size=16, num_blocks=40)
            for kernels in (ReferenceKernels(), GraphKernels(capture))
        ]
        # a recorded step clears no page that it begins: these kernels must not read what a former owner left there
        self.drivers[1].cache.fill_(torch.nan)

    def step(self, pending: dict[str, list[int]], sampled: list[str] | None = None) -> None:
        logits = []
        for driver in self.drivers:
            driver.sampler.logits.clear()
            driver.step(pending, sampled)
            logits.append(driver.sampler.logits[0])
        torch.testing.assert_close(logits[1], logits[0], atol=1e-4, rtol=1e-4)

    def release(self, name: str) -> None:
        for driver in self.drivers:
            driver.release(name)


def some_prompts(count: int) -> dict[str, list[int]]:
    rng = random.Random(count)
    return {str(i): rng.choices(range(40), k=rng.choice([1, 5, 17, 40])) for i in range(count)}


def test_batches_that_grow_and_shrink_replay_a_few_graphs() -> None:
    capture = PlayedGraphs()
    pair = Pair(capture)
    prompts = some_prompts(6)
    pair.step(prompts)
    assert capture.num_recorded == 0, "a prompt is computed operation by operation"
    for num_running in (6, 5, 3, 2, 1):
        for name in [name for name in prompts if int(name) >= num_running]:
            del prompts[name]
            pair.release(name)
        pair.step({name: [3] for name in prompts})
        pair.step({name: [7] for name in prompts})
    assert capture.num_recorded == 4  # of 8, 4, 2 and 1
    assert capture.num_replayed == 10
    pair.step({"0": [4], "new": [1, 2, 3]})
    assert capture.num_replayed == 10, "a mixed step goes without graphs"


def test_only_some_of_the_rows_draw() -> None:
    pair = Pair(PlayedGraphs())
    pair.step(some_prompts(3))
    pair.step({"0": [1], "1": [2], "2": [3]}, sampled=["0", "2"])
    pair.step({"0": [1], "1": [2], "2": [3]}, sampled=[])


def test_longer_requests_have_graphs_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_attention, "SPLIT_TOKENS", 32)
    capture = PlayedGraphs()
    pair = Pair(capture)
    pair.step({"a": list(range(30))})
    for token in range(5):  # from 31 to 35 tokens
        pair.step({"a": [token]})
    assert capture.num_recorded == 2


def test_where_nothing_can_be_recorded_decode_goes_on_without(caplog: pytest.LogCaptureFixture) -> None:
    def fail(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing")

    pair = Pair(fail)
    pair.step(some_prompts(3))
    for _ in range(2):
        pair.step({"0": [1], "1": [2], "2": [3]})
    pair.step({"0": [1]})
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "decode runs without graphs" in caplog.text


def test_a_cuda_device_gets_triton_and_the_reference_where_that_cannot_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert select_kernels(CUDA, torch.bfloat16, 32, 1).name == "triton"
    assert select_kernels(torch.device("cuda:1"), torch.bfloat16, 32, 1).name == "triton"
    assert chosen == [torch.device("cuda:1")]
    assert select_kernels(CUDA, torch.bfloat16, 32, 1, "reference").name == "reference"
    assert select_kernels(CUDA, torch.bfloat16, 8, 1).name == "reference"
    assert "at least 16 tokens, not 8" in caplog.text
    with pytest.raises(ValueError, match="at least 16 tokens, not 48"):
        select_kernels(CUDA, torch.bfloat16, 48, 1, "triton")
    with pytest.raises(ValueError, match="'cpu' are not available on cuda; choose from reference, triton"):
        select_kernels(CUDA, torch.bfloat16, 32, 1, "cpu")
