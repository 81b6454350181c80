"""CvT's three projections from one reading of the tokens against three convolutions and linear layers."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from fastvit import backends
from fastvit.ops import conv_projection
from fastvit.ops import depthwise_separable_conv as separate
from fastvit.ops._schema import unpack
from fastvit.reference import functional
from fastvit.reference.functional import BatchNorm, Projection
from tests.helpers import poisoned_empty
from tests.ops.composed import Arguments, check_inference, check_training, converted, random_norm

needs_cpp = pytest.mark.skipif(bool(backends.cpp_reasons()), reason="; ".join(backends.cpp_reasons()))
DTYPES = (torch.float32, torch.bfloat16)
DTYPES_AT_INFERENCE = (*DTYPES, torch.float16)


def projection(channels: int, stride: int, batch_statistics: bool = False, **changes: Any) -> Projection:
    return Projection(
        torch.randn(channels, 1, 3, 3) / 3,
        random_norm(channels, batch_statistics),
        torch.randn(channels, channels) / channels**0.5,
        torch.randn(channels),
        stride,
    )._replace(**changes)


def make(
    grid: tuple[int, int], prefix: int, strides: tuple[int, int, int] = (1, 2, 2), channels: int = 32, batch: int = 2,
    batch_statistics: bool = False, **changes: Any
) -> Arguments:  # fmt: skip
    q, k, v = (projection(channels, stride, batch_statistics, **changes) for stride in strides)
    x = torch.randn(batch, prefix + grid[0] * grid[1], channels)
    return {"x": x, "q": q, "k": k, "v": v, "grid": grid, "prefix_tokens": prefix}


def low_level(
    weight: torch.Tensor, bias: torch.Tensor | None, norm: BatchNorm | None, stride: int, padding: int
) -> tuple[Any, ...]:
    """One part's arguments of the registered operator."""
    return weight, bias, *unpack(norm), stride, padding


CASES = {
    "cvt": make((14, 14), 1, channels=48),
    "no prefix": make((7, 5), 0),
    "odd": make((15, 15), 2, channels=20),
    "one token": make((1, 1), 1),
    "stride 1": make((6, 7), 0, (1, 1, 1)),
    "other strides": make((6, 7), 1, (2, 1, 2), channels=17),
    "wide": make((56, 56), 0, channels=64, batch=1),
    "many images": make((5, 4), 1, batch=7),
    "no image": make((5, 4), 1, batch=0),
    "kernel 5": make((9, 8), 0, dw_weight=torch.randn(32, 1, 5, 5) / 5, padding=1),
    "bias, no norm": make((9, 8), 0, dw_bias=torch.randn(32), norm=None, pw_bias=None),
}


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES_AT_INFERENCE, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_inference(case: str, dtype: torch.dtype, isa: str) -> None:
    check_inference(conv_projection, functional.conv_projection, converted(CASES[case], dtype), backend="cpp")


@needs_cpp
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_each_part_is_the_convolution_alone(threads: int) -> None:
    before = torch.get_num_threads()
    case = make((20, 18), 1, batch=3)
    shared = {name: case[name] for name in ("x", "grid", "prefix_tokens")}
    try:
        torch.set_num_threads(threads)
        with torch.no_grad(), poisoned_empty():
            together = conv_projection(**case, backend="cpp")
            alone = [separate(**shared, **case[name]._asdict(), backend="cpp") for name in "qkv"]
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(list(together), alone, rtol=0, atol=0)


@needs_cpp
@pytest.mark.parametrize("layout", ["rows", "channels"])
def test_x_with_other_strides(layout: str) -> None:
    case = make((6, 5), 1)
    x = torch.randn(4, 62, 80)
    case["x"] = x[:2, 3:34, 8:40] if layout == "rows" else x[:2, :31, ::2][..., :32]
    check_inference(conv_projection, functional.conv_projection, case, backend="cpp")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch_statistics", [False, True])
def test_training(batch_statistics: bool, dtype: torch.dtype) -> None:
    case = make((7, 5), 1, channels=20, batch_statistics=batch_statistics)
    check_training(conv_projection, functional.conv_projection, converted(case, dtype))


def test_batch_statistics_without_gradients() -> None:
    got, expected = (make((5, 5), 0, channels=8, batch_statistics=True) for _ in range(2))
    expected = converted(got, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(conv_projection(**got), functional.conv_projection(**expected))
    torch.testing.assert_close(got["q"].norm.running_mean, expected["q"].norm.running_mean)


@pytest.mark.parametrize("trained", ["q", "v", "x"])
def test_gradients_of_one_thing_only(trained: str) -> None:
    case = make((5, 5), 1, channels=8)
    leaf = case["x"] if trained == "x" else case[trained].norm.weight
    leaf.requires_grad_()
    torch.stack([part.sum() for part in conv_projection(**case)]).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.abs().sum() > 0


@pytest.mark.parametrize("prefix", [0, 1])
def test_autocast(prefix: int) -> None:
    case = make((5, 6), prefix)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got, plain = conv_projection(**case), functional.conv_projection(**case)
    for each, expected in zip(got, plain, strict=True):
        assert each.dtype == expected.dtype
        torch.testing.assert_close(each, expected, atol=0.1, rtol=0.05)


@needs_cpp
def test_the_kernel_names_the_operator_and_the_argument() -> None:
    run = torch.ops.fastvit.conv_projection.default
    part = (torch.zeros(8, 1, 3, 3), None, torch.ones(8), torch.zeros(8), torch.zeros(8), torch.ones(8), 1e-5, 1, 1)
    names = [argument.name for argument in run._schema.arguments]
    good = dict(zip(names, (torch.zeros(2, 21, 8), *part, *part, *part, 5, 4, 1), strict=True))
    run(**good)
    bad = {
        "x must be (B, P + h*w, C), got shape (2, 8)": {"x": torch.zeros(2, 8)},
        "x must be float32, bfloat16 or float16 on the CPU, got float64": {"x": torch.zeros(2, 21, 8).double()},
        "x has 21 tokens, expected 1 + 5 * 5": {"width": 5},
        "q_weight must be (C, 1, k, k)": {"q_weight": torch.zeros(8, 1, 3, 5)},
        "k_bias must be contiguous with 8 elements, got shape (7,)": {"k_bias": torch.zeros(7)},
        "v_norm_weight must be float32 or of x's dtype": {"v_norm_weight": torch.ones(8, dtype=torch.bool)},
        "k_norm_mean and k_norm_var must be given together": {"k_norm_mean": None},
        "v_stride must be at least 1, got 0": {"v_stride": 0},
        "k_padding must be at least 0, got -1": {"k_padding": -1},
        "q_weight: a kernel of 7 does not fit": {"q_weight": torch.zeros(8, 1, 7, 7)},
    }
    for message, change in bad.items():
        with pytest.raises(RuntimeError, match=re.escape(f"conv_projection: {message}")):
            run(**good | change)


@needs_cpp
def test_opcheck() -> None:
    for change in ({}, {"norm": None, "dw_bias": torch.randn(16)}):
        case = make((5, 4), 1, channels=16, **change)
        x = torch.randn(2, 21, 24)[:, :, :16]
        parts = [
            value
            for name in "qkv"
            for value in low_level(case[name].dw_weight, case[name].dw_bias, case[name].norm, case[name].stride, 1)
        ]
        torch.library.opcheck(
            torch.ops.fastvit.conv_projection.default,
            (x, *parts, 5, 4, 1),
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )


def test_backend_asked_for_gives_its_reasons() -> None:
    with pytest.raises(RuntimeError, match=r"'cpp' cannot run this call: .*dtype torch.float64 is not one of"):
        conv_projection(**converted(make((5, 4), 1), torch.float64), backend="cpp")


@needs_cpp
def test_the_kernel_itself_checks() -> None:
    """What reaches the operator without the public function must not read beyond a tensor."""
    weight = torch.zeros(8, 1, 3, 3)
    good, norm = low_level(weight, None, None, 1, 1), random_norm(8)
    bad = {
        "weight must be (C, 1, k, k)": low_level(torch.zeros(8, 1, 3, 5), None, None, 1, 1),
        "bias must be contiguous with 8 elements": low_level(weight, torch.zeros(7), None, 1, 1),
        "norm_var must be contiguous": low_level(weight, None, norm._replace(running_var=torch.ones(9)), 1, 1),
        "norm_mean and k_norm_var must be given together": low_level(
            weight, None, norm._replace(running_var=None), 1, 1
        ),
        "k_stride must be at least 1": low_level(weight, None, None, 0, 1),
    }
    run, x = torch.ops.fastvit.conv_projection, torch.zeros(2, 21, 8)
    run(x, *good, *good, *good, 5, 4, 1)
    for message, part in bad.items():
        with pytest.raises(RuntimeError, match=re.escape(message)):
            run(x, *good, *part, *good, 5, 4, 1)
    with pytest.raises(RuntimeError, match="x must be float32, bfloat16 or float16"):
        run(x.double(), *good, *good, *good, 5, 4, 1)
    with pytest.raises(RuntimeError, match="x has 21 tokens"):
        run(x, *good, *good, *good, 5, 5, 1)
