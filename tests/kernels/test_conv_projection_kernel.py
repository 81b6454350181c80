"""CvT's projections with their convolutions by the Triton kernels in the interpreter, against the reference."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from fastvit.ops import conv_projection, depthwise_separable_conv
from fastvit.reference import functional
from tests.helpers import assert_as_accurate
from tests.ops import test_conv_projection as projections
from tests.ops.composed import check_inference, check_training, converted, random_norm
from tests.ops.test_conv_projection_separable import make

pytestmark = pytest.mark.interpreter

TWIN = functional.depthwise_separable_conv


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_as_accurate_as_the_plain_steps(dtype):
    check_inference(depthwise_separable_conv, TWIN, converted(make((7, 5), 1, 2), dtype), backend="triton")


def test_autocast():
    case = make((4, 5), 1, 2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got, plain = depthwise_separable_conv(**case, backend="triton"), TWIN(**case)
    assert_as_accurate(got, plain, TWIN(**converted(case, torch.float64)))


def test_training():
    case = make((4, 3), 1, 2, norm=random_norm(20, True))
    check_training(depthwise_separable_conv, TWIN, converted(case, torch.float32), backend="triton")


@pytest.mark.parametrize("case", ["odd", "other strides", "bias, no norm"])
def test_three_projections(case):
    arguments = converted(projections.CASES[case], torch.float32)
    check_inference(conv_projection, functional.conv_projection, arguments, backend="triton")
