"""Merged linears load by row offset; granularity and shapes are checked."""

from __future__ import annotations

import pytest
import torch

from replicas.engine.kernels.reference import ReferenceKernels
from replicas.engine.layers.embedding import Embedding
from replicas.engine.layers.linear import Linear
from replicas.engine.quant.unquantized import UnquantizedLinear

KERNELS = ReferenceKernels()


class Blocks32(UnquantizedLinear):
    granularity = 32


@pytest.mark.parametrize("has_bias", [False, True])
def test_parts_stand_one_after_the_other(has_bias: bool) -> None:
    linear = Linear(6, [4, 2, 2], UnquantizedLinear(KERNELS), torch.float32, has_bias)
    weights = [torch.randn(rows, 6) for rows in (4, 2, 2)]
    biases = [torch.randn(rows) for rows in (4, 2, 2)]
    for part in (2, 0, 1):
        linear.load_weight(weights[part], part)
        if has_bias:
            linear.load_bias(biases[part], part)
    linear.finalize()
    x = torch.randn(3, 6)
    expected = [x @ w.T + (b if has_bias else 0) for w, b in zip(weights, biases, strict=True)]
    torch.testing.assert_close(linear(x), torch.cat(expected, -1))


def test_loading_converts_to_the_layers_dtype() -> None:
    linear = Linear(4, [4], UnquantizedLinear(KERNELS), torch.bfloat16)
    weight = torch.randn(4, 4)
    linear.load_weight(weight)
    linear.finalize()
    assert torch.equal(linear(torch.eye(4).bfloat16()), weight.bfloat16().T)


def test_a_wrong_shape_is_refused_with_both_shapes() -> None:
    linear = Linear(6, [4, 2], UnquantizedLinear(KERNELS), torch.float32)
    with pytest.raises(ValueError, match=r"\(4, 6\).*\(2, 6\)"):
        linear.load_weight(torch.zeros(4, 6), part=1)


def test_a_format_that_does_not_divide_the_shape_is_refused() -> None:
    Linear(64, [32, 96], Blocks32(KERNELS), torch.float32)
    with pytest.raises(ValueError, match="blocks of 32: 48 is not a multiple"):
        Linear(64, [32, 48], Blocks32(KERNELS), torch.float32)
    with pytest.raises(ValueError, match="40 is not a multiple"):
        Linear(40, [32], Blocks32(KERNELS), torch.float32)


def test_a_tied_head_shares_the_embeddings_storage() -> None:
    embedding = Embedding(8, 4, KERNELS, torch.float32)
    embedding.load_weight(torch.randn(8, 4))
    head = Linear(4, [8], UnquantizedLinear(KERNELS), torch.float32)
    head.load_weight(embedding.weight)
    assert head.get_parameter("weight").data_ptr() == embedding.weight.data_ptr()
