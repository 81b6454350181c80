"""Depthwise-separable convolution and CvT's projections by their Triton kernels, in the interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from fastvit.kernels import conv_projection as kernels
from fastvit.kernels._depthwise_prologue import Config, Epilogue

from fastvit.ops import conv_projection, depthwise_separable_conv
from fastvit.reference import functional
from tests.helpers import assert_as_accurate
from tests.ops import test_conv_projection as projections
from tests.ops.composed import check_inference, check_training, converted, random_norm
from tests.ops.test_conv_projection_separable import CASES, make

pytestmark = pytest.mark.interpreter

TWIN = functional.depthwise_separable_conv


@pytest.fixture
def wide(monkeypatch):
    """Wide tiles, since the interpreter's time depends on programs."""
    monkeypatch.setattr(kernels, "choose_configs", lambda *_, **__: (Config(64, 16, 32, 1, 1, 16),))


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """One entry per call of the kernels."""
    found = []
    operator = kernels.depthwise_separable_conv_operator
    monkeypatch.setattr(kernels, "depthwise_separable_conv_operator", lambda *a: found.append(a) or operator(*a))
    return found


@pytest.mark.parametrize("case", CASES)
def test_shapes(case, wide, calls):
    check_inference(depthwise_separable_conv, TWIN, converted(case, torch.float32), backend="triton")
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_dtypes(dtype, wide):
    check_inference(depthwise_separable_conv, TWIN, converted(make((7, 5), 1, 2), dtype), backend="triton")


def test_configurations_chosen_for_sizes_no_tile_divides():
    check_inference(depthwise_separable_conv, TWIN, make((5, 4), 1, 1, batch=1), backend="triton")


def test_float32_parameters_beside_bfloat16_tokens(wide):
    case = converted(make((4, 6), 1, 2), torch.bfloat16, torch.float32)
    with torch.no_grad():
        got, plain = depthwise_separable_conv(**case, backend="triton"), TWIN(**converted(case, torch.bfloat16))
        assert_as_accurate(got, plain, TWIN(**converted(case, torch.float64)))


def test_strided_tokens(wide):
    case = make((4, 5), 1, 2)
    tokens = torch.randn(4, 40, 48)
    with torch.no_grad():
        for x in (tokens[::2, 3:24, 8:28], tokens[:1, :21, :20].expand(2, -1, -1), tokens[:2, :21, :40:2]):
            got = depthwise_separable_conv(**case | {"x": x}, backend="triton")
            assert torch.equal(got, depthwise_separable_conv(**case | {"x": x.contiguous()}, backend="triton"))


def test_autocast(wide, calls):
    case = make((4, 5), 1, 2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got, plain = depthwise_separable_conv(**case, backend="triton"), TWIN(**case)
    assert len(calls) == 1
    assert_as_accurate(got, plain, TWIN(**converted(case, torch.float64)))


def test_training_and_larger_kernels_are_composed(calls):
    case = make((4, 3), 1, 2, norm=random_norm(20, True))
    check_training(depthwise_separable_conv, TWIN, converted(case, torch.float32), backend="triton")
    larger = make((5, 4), 0, 1, dw_weight=torch.randn(20, 1, 5, 5) / 5)
    check_inference(depthwise_separable_conv, TWIN, larger, backend="triton")
    assert not calls


@pytest.mark.parametrize("case", ["odd", "other strides", "bias, no norm"])
def test_three_projections(case, wide, calls):
    arguments = converted(projections.CASES[case], torch.float32)
    check_inference(conv_projection, functional.conv_projection, arguments, backend="triton")
    assert len(calls) == 3


def test_opcheck():
    x, dw, pw, vector = torch.randn(2, 13, 8), torch.randn(8, 1, 3, 3), torch.randn(5, 8), torch.rand(8) + 0.5
    bare = (None, None, None, None, None, 0.0)
    for arguments in (
        (x, dw, pw, None, *bare, 4, 3, 2, 1, 1),
        (x, dw, pw, vector[:5], *[vector] * 5, 1e-5, 4, 3, 1, 0, 1),
    ):
        operator = torch.ops.fastvit.depthwise_separable_conv_triton.default
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_images_beyond_32_bit_offsets_are_refused():
    x = torch.empty(1, 1, 16, device="meta").expand(1, 2**21, 16)
    dw, pw = torch.empty(16, 1, 3, 3, device="meta"), torch.empty(1024, 16, device="meta")
    with pytest.raises(ValueError, match="expected at most 2"):
        kernels.depthwise_separable_conv_forward(
            x, dw, Epilogue(None, None, None, None, None, 0.0), pw, None, (2**11, 2**10), 1, 1, 0
        )
