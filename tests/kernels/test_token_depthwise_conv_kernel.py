"""The Triton kernels of token depthwise convolution in the interpreter, against the reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from fastvit.kernels import token_depthwise_conv_tiles
from fastvit.kernels._tokens import with_small_row_strides

from fastvit.ops import token_depthwise_conv
from fastvit.ops.token_depthwise_conv import TRITON
from fastvit.reference import functional
from tests.ops.test_token_depthwise_conv import LEFF, Case, check, make_arguments
from tests.ops.test_token_depthwise_conv_cuda import (
    NORMS,
    check_bias_of_batch_statistics,
    check_step,
    with_statistics,
)

pytestmark = pytest.mark.interpreter


def run(**arguments: Any):
    return token_depthwise_conv(**arguments, backend="triton")


FORWARD = [
    *(
        Case((9, 7), 33, kernel=kernel, stride=stride, prefix=prefix)
        for kernel, stride, prefix in ((3, 1, 0), (3, 2, 1), (5, 1, 2), (7, 2, 0))
    ),
    Case((5, 4), 40, prefix=1, residual=True, **LEFF),
    Case((5, 4), pre_activation="relu", activation="quick_gelu"),
    Case((5, 4), pre_activation="gelu_tanh", activation="gelu_tanh"),
    Case((5, 4), pre_activation="silu", activation="relu", norm=True, affine=False, bias=False),
    Case((1, 1), 17, prefix=1, residual=True),
    Case((2, 1), 5, kernel=7),
    Case((5, 6), 20, kernel=4, padding=1),
    Case((5, 5), 20, padding=3, stride=2, norm=True),
    Case((4, 4), batch=0),
]

TRAINING = [
    Case((7, 5), 40, 3, prefix=1, residual=True, **LEFF),
    Case((8, 6), 20, stride=2, norm=True, bias=False),
    Case((7, 5), 20, kernel=5, stride=2, prefix=2, pre_norm=True, activation="silu"),
    Case((7, 5), 20, prefix=1, residual=True),
    Case((3, 5), 20, kernel=7, pre_activation="quick_gelu", activation="relu"),
    Case((3, 5), 20, pre_activation="gelu_tanh", activation="gelu_tanh"),
    Case((5, 6), 20, kernel=4, padding=5, activation="gelu"),
    Case((1, 1), 17, 4, prefix=1, residual=True, **NORMS),
]


@pytest.mark.parametrize("case", FORWARD, ids=str)
def test_forward(case):
    check(run, make_arguments(case, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_forward_in_16_bits(dtype):
    check(run, make_arguments(FORWARD[4], dtype))


@pytest.mark.parametrize("case", TRAINING, ids=str)
def test_training(case):
    check_step(run, with_statistics(make_arguments(case, torch.float32), True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_training_in_16_bits(dtype):
    check_step(run, with_statistics(make_arguments(TRAINING[0], dtype), True))


def test_training_with_running_statistics():
    check_step(run, with_statistics(make_arguments(TRAINING[0], torch.float32), False))


def test_a_bias_in_front_of_batch_statistics():
    check_bias_of_batch_statistics(run)


def test_gradients_of_an_empty_batch_are_zeros():
    arguments = make_arguments(Case((4, 4), prefix=1, batch=0, residual=True, **LEFF), torch.float32)
    arguments = with_statistics(arguments, False)
    x, weight = arguments["x"].requires_grad_(), arguments["weight"].requires_grad_()
    dx, dweight = torch.autograd.grad(run(**arguments).sum(), (x, weight))
    assert dx.shape == x.shape
    assert torch.equal(dweight, torch.zeros_like(weight))


def test_reductions_of_several_tiles_and_programs(monkeypatch):
    monkeypatch.setattr(token_depthwise_conv_tiles, "FLOAT", token_depthwise_conv_tiles.Config(16, 16, 1, programs=12))
    check_step(run, with_statistics(make_arguments(Case((7, 5), 20, 3, **LEFF), torch.float32), True))


def test_opcheck():
    """Schemas and fakes, and that outputs share no memory."""
    x, weight, vector = torch.randn(2, 13, 8), torch.randn(8, 1, 3, 3), torch.rand(8) + 0.5
    norm, geometry = (vector, vector, vector, vector, 1e-5), (4, 3, 1, 1, 1, True)
    batch = (vector, vector, None, None, 1e-5)
    forward = (x, weight, vector, *norm, 1, *norm, 2, *geometry)
    training = (x, weight, vector, *norm, False, 1, *batch, True, 2, *geometry)
    backward = (x, x, x, weight, vector, *norm, True, 1, *norm, True, 2, *geometry, True, True)
    bare = (None, None, None, None, 0.0, False, 0)
    for operator, arguments in (
        (TRITON.forward, forward),
        (TRITON.training, training),
        (TRITON.training, (x, weight, None, *bare, *bare, *geometry)),
        (TRITON.backward, backward),
        (TRITON.backward, (x, x, x[:0], weight, None, *bare, *bare, *geometry, True, False)),
    ):
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_float32_parameters_beside_bfloat16_tokens():
    check(run, make_arguments(Case((5, 4), prefix=1, **LEFF), torch.bfloat16, torch.float32))


@pytest.mark.parametrize("layout", ["rows", "expanded", "channels"])
def test_strided_tokens(layout):
    arguments = make_arguments(Case((6, 5), 24, prefix=1, residual=True), torch.float32)
    x = torch.randn(4, 62, 48)
    arguments["x"] = {
        "rows": x[::2, 3:34, 8:32],
        "expanded": x[:1, :31, :24].expand(2, -1, -1),
        "channels": x[:2, :31, ::2],
    }[layout]
    check(run, arguments)


@pytest.mark.parametrize("wanted", ["x", "weight", "pre_norm"])
def test_only_the_gradients_asked_for(wanted):
    arguments = with_statistics(make_arguments(Case((4, 5), 24, prefix=1, **LEFF), torch.float32), True)
    tensor = arguments["pre_norm"].weight if wanted == "pre_norm" else arguments[wanted]
    tensor.requires_grad_()
    grad = torch.randn(2, 21, 24)
    runs = (run, functional.token_depthwise_conv)
    got, expected = (torch.autograd.grad(each(**arguments), tensor, grad)[0] for each in runs)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_tensors_beyond_32_bit_offsets_are_copied_or_refused():
    with pytest.raises(ValueError, match="expected at most 2"):
        with_small_row_strides(torch.empty(1, device="meta").expand(1, 2**20, 2**12))
    spread = torch.empty(2**32, device="meta").as_strided((2, 4, 8), (2**31, 8, 1))
    assert with_small_row_strides(spread).is_contiguous()
