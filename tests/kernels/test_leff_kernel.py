"""CeiT's feed-forward with its convolution by the Triton kernels in the interpreter, against the reference."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from fastvit.kernels import token_depthwise_conv as kernels

from fastvit.ops import leff
from fastvit.reference import functional
from tests.helpers import assert_as_accurate
from tests.ops.composed import check_inference, check_training, converted
from tests.ops.test_leff import make

pytestmark = pytest.mark.interpreter


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """One entry per call of the kernels."""
    found = []
    forward = kernels.token_depthwise_conv_forward
    monkeypatch.setattr(kernels, "token_depthwise_conv_forward", lambda *a: found.append(a) or forward(*a))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["official", "paper"])
def test_as_accurate_as_the_plain_steps(dtype, form, calls):
    check_inference(leff, functional.leff, converted(make((4, 5), form=form, batch=1), dtype), backend="triton")
    assert len(calls) == 1


@pytest.mark.parametrize("form", ["official", "paper"])
def test_autocast(form, calls):
    case = make((4, 5), channels=16, form=form)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got, plain = leff(**case, backend="triton"), functional.leff(**case)
    assert len(calls) == 1
    assert got.dtype == plain.dtype == torch.float32
    assert torch.equal(got[:, :1], plain[:, :1])
    assert_as_accurate(got, plain, functional.leff(**converted(case, torch.float64)))


@pytest.mark.parametrize("batch_statistics", [False, True])
def test_training(batch_statistics):
    case = make((4, 3), channels=8, batch_statistics=batch_statistics)
    check_training(leff, functional.leff, converted(case, torch.float32), backend="triton")
