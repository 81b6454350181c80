"""Convolution, BatchNorm and activation of a stem: parity, layouts, what is turned down."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastvit import ops
from fastvit.reference import functional
from fastvit.reference.functional import BatchNorm
from tests.helpers import assert_as_accurate


def _stem(dtype: torch.dtype, bias: bool = False, affine: bool = True) -> tuple[Tensor, nn.Conv2d, nn.BatchNorm2d]:
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 8, 7, 2, 3, bias=bias), nn.BatchNorm2d(8, affine=affine).eval()
    for tensor in (*norm.parameters(), norm.running_mean, norm.running_var):
        tensor.data.uniform_(0.5, 2.0)
    return (
        torch.randn(2, 3, 22, 30).to(dtype),
        conv.to(dtype).requires_grad_(False),
        norm.to(dtype).requires_grad_(False),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize(("bias", "affine"), [(False, True), (True, True), (True, False)])
def test_as_accurate_as_the_plain_form(dtype: torch.dtype, activation: str | None, bias: bool, affine: bool) -> None:
    x, conv, norm = _stem(dtype, bias, affine)
    options = {"stride": 2, "padding": 3, "activation": activation}
    got = ops.conv_batch_norm(x, conv.weight, conv.bias, BatchNorm.of(norm), **options, backend="channels_last")
    plain = functional.conv_batch_norm(x, conv.weight, conv.bias, BatchNorm.of(norm), **options)
    conv, norm = conv.double(), norm.double()
    exact = functional.conv_batch_norm(x.double(), conv.weight, conv.bias, BatchNorm.of(norm), **options)
    assert_as_accurate(got, plain, exact)
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_training_takes_the_reference_and_moves_the_statistics() -> None:
    x, conv, norm = _stem(torch.float32)
    norm.train()
    before = norm.running_mean.clone()
    with pytest.raises(RuntimeError, match="the norm uses batch statistics"):
        ops.conv_batch_norm(x, conv.weight, None, BatchNorm.of(norm), backend="channels_last")
    out = ops.conv_batch_norm(x, conv.weight, None, BatchNorm.of(norm), stride=2, padding=3)
    assert not torch.equal(norm.running_mean, before)
    torch.testing.assert_close(out.mean((0, 2, 3)), norm.bias)


def test_gradients_reach_everything() -> None:
    x, conv, norm = _stem(torch.float32)
    leaves = [tensor.requires_grad_() for tensor in (x, conv.weight, norm.weight, norm.bias)]
    ops.conv_batch_norm(x, conv.weight, None, BatchNorm.of(norm)).sum().backward()
    assert all(leaf.grad is not None for leaf in leaves)
