"""Depthwise-separable convolution of tokens against its plain twin."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastvit import backends
from fastvit.ops import depthwise_separable_conv
from fastvit.reference import functional
from fastvit.reference.functional import BatchNorm
from tests.ops.composed import Arguments, check_inference, check_training, converted, random_norm

needs_cpp = pytest.mark.skipif(bool(backends.cpp_reasons()), reason="; ".join(backends.cpp_reasons()))
DTYPES = (torch.float32, torch.bfloat16)
DTYPES_AT_INFERENCE = (*DTYPES, torch.float16)


def make(grid: tuple[int, int], prefix: int, stride: int, batch: int = 2, **changes: Any) -> Arguments:
    channels, width = 20, 24
    return {
        "x": torch.randn(batch, prefix + grid[0] * grid[1], channels),
        "dw_weight": torch.randn(channels, 1, 3, 3) / 3,
        "norm": random_norm(channels),
        "pw_weight": torch.randn(width, channels) / channels**0.5,
        "pw_bias": torch.randn(width),
        "grid": grid,
        "stride": stride,
        "prefix_tokens": prefix,
    } | changes


CASES = [
    make((7, 5), 0, 1),
    make((7, 5), 1, 2),
    make((15, 15), 2, 2, dw_bias=torch.randn(20), pw_bias=None),
    make((1, 1), 1, 1),
    make((6, 6), 0, 1, norm=None, padding=0),
    make((4, 4), 1, 2, batch=0),
]


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES_AT_INFERENCE, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_inference(case, dtype):
    check_inference(
        depthwise_separable_conv, functional.depthwise_separable_conv, converted(case, dtype), backend="cpp"
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [make((7, 5), 1, 2), make((6, 4), 0, 1, norm=random_norm(20, True))])
def test_training(case, dtype):
    check_training(depthwise_separable_conv, functional.depthwise_separable_conv, converted(case, dtype))


def test_the_twin_is_the_chain_of_layers():
    """On the map, as CvT's code has it: the class token skips convolution and norm."""
    conv = nn.Conv2d(6, 6, 3, 2, 1, groups=6, bias=False).double()
    norm, linear = nn.BatchNorm2d(6).double(), nn.Linear(6, 8).double()
    x = torch.randn(2, 1 + 35, 6, dtype=torch.float64)
    tokens = norm(conv(x[:, 1:].transpose(1, 2).reshape(2, 6, 5, 7))).flatten(2).transpose(1, 2)
    expected = linear(torch.cat((x[:, :1], tokens), dim=1))
    norm.reset_running_stats()
    got = functional.depthwise_separable_conv(
        x, conv.weight, BatchNorm.of(norm), linear.weight, linear.bias, grid=(5, 7), stride=2, prefix_tokens=1
    )
    torch.testing.assert_close(got, expected)


def test_gradcheck_of_the_twin():
    case = converted(make((3, 4), 1, 2, batch=1, norm=None), torch.float64)
    tensors = [case.pop(name).requires_grad_() for name in ("x", "dw_weight", "pw_weight", "pw_bias")]

    def run(x, dw_weight, pw_weight, pw_bias):
        return functional.depthwise_separable_conv(
            **case | {"x": x, "dw_weight": dw_weight, "pw_weight": pw_weight, "pw_bias": pw_bias}
        )

    assert torch.autograd.gradcheck(run, tensors)


@needs_cpp
def test_a_norm_to_be_called_takes_the_plain_path():
    layer = nn.BatchNorm2d(20)
    case = make((4, 4), 0, 1, norm=BatchNorm(None, None, None, None, True, layer=layer))
    with pytest.raises(RuntimeError, match="a norm is a BatchNorm2d, which has to be called"):
        depthwise_separable_conv(**case, backend="cpp")
    with torch.no_grad():
        got = depthwise_separable_conv(**case)
        tokens = functional.token_depthwise_conv(case["x"], case["dw_weight"], grid=(4, 4))
        tokens = F.batch_norm(tokens.flatten(0, 1), None, None, training=True).view_as(tokens)
    torch.testing.assert_close(got, F.linear(tokens, case["pw_weight"], case["pw_bias"]))
    assert layer.num_batches_tracked == 1


def test_other_dtypes_take_the_plain_path():
    case = make((4, 4), 0, 1)
    exact = converted(case, torch.float64)
    assert torch.equal(depthwise_separable_conv(**exact), functional.depthwise_separable_conv(**exact))
    mixed = converted(case, torch.bfloat16, torch.float32)
    assert depthwise_separable_conv(**mixed, backend="reference").dtype == torch.bfloat16


@pytest.mark.parametrize("prefix", [0, 1])
def test_autocast(prefix):
    case = make((5, 6), prefix, 2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got, plain = depthwise_separable_conv(**case), functional.depthwise_separable_conv(**case)
    assert got.dtype == plain.dtype
    torch.testing.assert_close(got, plain, atol=0.1, rtol=0.05)
