"""The Triton kernels against their oracles: in Triton's interpreter, or compiled where there is a GPU."""

from __future__ import annotations

import random

import pytest
import torch

from tests.replicas.engine import triton_cases

torch.set_num_threads(1)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("check", triton_cases.CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_random_shapes_equal_the_oracle(check: triton_cases.Check, seed: int) -> None:
    torch.manual_seed(seed)
    check(random.Random(seed), DEVICE, False)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 125))
@pytest.mark.parametrize("check", triton_cases.CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_more_random_shapes_equal_the_oracle(check: triton_cases.Check, seed: int) -> None:
    torch.manual_seed(seed)
    check(random.Random(seed), DEVICE, False)
