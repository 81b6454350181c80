"""CeiT's feed-forward by its Triton kernels in the interpreter: the public function against the reference."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from fastvit.kernels import leff as kernels

from fastvit.ops import leff
from fastvit.ops.leff import Call, Convolution, _fits
from fastvit.reference import functional
from tests.helpers import assert_as_accurate
from tests.ops.composed import check_inference, check_training, converted
from tests.ops.test_leff import make

pytestmark = pytest.mark.interpreter

WIDE = kernels.Config(64, 64, 32, 1, 1), kernels.Config(64, 32, 32, 1, 1, 16)
"""Expansion and contraction. The interpreter's time depends on programs, so tiles are wide."""


@pytest.fixture
def wide(monkeypatch):
    monkeypatch.setattr(kernels, "choose_expand_configs", lambda *_, **__: WIDE[:1])
    monkeypatch.setattr(kernels, "choose_configs", lambda *_, **__: WIDE[1:])


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """One entry per call of the kernels."""
    found = []
    operator = kernels.leff_operator
    monkeypatch.setattr(kernels, "leff_operator", lambda *a: found.append(a) or operator(*a))
    return found


def check(case, dtype=torch.float32):
    check_inference(leff, functional.leff, converted(case, dtype), backend="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["official", "paper"])
def test_as_accurate_as_the_plain_steps(dtype, form, wide, calls):
    check(make(form=form, batch=2), dtype)
    assert len(calls) == 1


CASES = {
    "bare, two prefix tokens": make((6, 3), prefix=2, norms=False, channels=16),
    "one token": make((1, 1), channels=16),
    "kernel 1, no biases": make((3, 3), kernel=1, channels=16, up_bias=None, dw_bias=None, down_bias=None),
    "other width": make((4, 5), prefix=0, channels=16, down_weight=torch.randn(7, 36), down_bias=None, down_norm=None),
    "no image": make(batch=0),
}


@pytest.mark.parametrize("case", CASES)
def test_shapes(case, wide, calls):
    check(CASES[case])
    assert len(calls) == 1


def test_configurations_chosen_for_sizes_no_tile_divides():
    check(make((5, 4), channels=21, batch=1))
    check(make((3, 5), channels=54, batch=1), torch.float16)


def test_float32_parameters_beside_bfloat16_tokens(wide):
    case = converted(make((4, 6), channels=16), torch.bfloat16, torch.float32)
    with torch.no_grad():
        got, plain = leff(**case, backend="triton"), functional.leff(**converted(case, torch.bfloat16))
        assert_as_accurate(got, plain, functional.leff(**converted(case, torch.float64)))


@pytest.mark.parametrize("layout", ["rows", "expanded", "channels"])
def test_strided_tokens(layout, wide):
    case = make((4, 5), channels=16)
    tokens = torch.randn(4, 40, 48)
    views = {
        "rows": tokens[::2, 3:24, 8:24],
        "expanded": tokens[:1, :21, :16].expand(2, -1, -1),
        "channels": tokens[:2, :21, ::3],
    }
    with torch.no_grad():
        got = leff(**case | {"x": views[layout]}, backend="triton")
        assert torch.equal(got, leff(**case | {"x": views[layout].contiguous()}, backend="triton"))


@pytest.mark.parametrize("form", ["official", "paper"])
def test_autocast(form, wide, calls):
    case = make((4, 5), channels=16, form=form)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got, plain = leff(**case, backend="triton"), functional.leff(**case)
    assert len(calls) == 1
    assert got.dtype == plain.dtype == torch.float32
    assert torch.equal(got[:, :1], plain[:, :1])
    assert_as_accurate(got, plain, functional.leff(**converted(case, torch.float64)))


@pytest.mark.parametrize("batch_statistics", [False, True])
def test_training_composes(batch_statistics, calls):
    case = make((4, 3), channels=8, batch_statistics=batch_statistics)
    check_training(leff, functional.leff, converted(case, torch.float32), backend="triton")
    assert not calls


def test_larger_kernels_are_composed(wide, calls):
    check(make((4, 3), channels=8, kernel=5, batch=1))
    assert not calls


def test_images_beyond_32_bit_offsets_are_refused():
    meta = torch.empty(1, 1, 16, device="meta").expand(1, 2**21, 16)
    up, dw, down = (torch.empty(size, device="meta") for size in ((1024, 16), (1024, 1, 3, 3), (16, 1024)))
    for x, fits in ((meta, False), (meta[:, :21], True)):
        assert (
            _fits(Call(x, Convolution(x, dw, None, (3, 7)), up, None, down, None, None, "official", None, None)) is fits
        )
    bare = kernels.Epilogue(None, None, None, None, None, 0.0)
    with pytest.raises(ValueError, match="expected at most 2"):
        kernels.leff_forward(meta, up, bare, dw, bare, down, bare, (2**11, 2**10), 0, False)


def test_opcheck():
    x, up, dw, down = torch.randn(2, 13, 8), torch.randn(12, 8), torch.randn(12, 1, 3, 3), torch.randn(8, 12)
    vector, narrow = torch.rand(12) + 0.5, torch.rand(8) + 0.5
    bare = (None, None, None, None, None, 0.0)
    epilogues = (*[vector] * 5, 1e-5, *bare, *[narrow] * 5, 1e-5)
    for arguments in ((x, up, dw, down, *epilogues, 4, 3, 1, False), (x, up, dw, down[:5], *bare * 3, 4, 3, 1, True)):
        operator = torch.ops.fastvit.leff_triton.default
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_compiles_without_graph_breaks(wide):
    torch._dynamo.reset()
    compiled = torch.compile(leff, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for batch in (2, 3):
            case = make((3, 4), batch=batch, channels=16)
            assert torch.equal(compiled(**case, backend="triton"), leff(**case, backend="triton"))
