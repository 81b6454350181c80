"""CvT's three projections from one reading of the tokens against three convolutions and linear layers."""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest
import torch

from fastvit import backends
from fastvit.ops import conv_projection
from fastvit.ops import depthwise_separable_conv as separate
from fastvit.ops._schema import unpack
from fastvit.reference import functional
from fastvit.reference.functional import BatchNorm, LayerNorm, Projection
from tests.helpers import CallCounter, poisoned_empty
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
    batch_statistics: bool = False, in_front: LayerNorm | None = None, **changes: Any
) -> Arguments:  # fmt: skip
    q, k, v = (projection(channels, stride, batch_statistics, **changes) for stride in strides)
    x = torch.randn(batch, prefix + grid[0] * grid[1], channels)
    return {"x": x, "q": q, "k": k, "v": v, "grid": grid, "prefix_tokens": prefix, "norm": in_front}


def layer_norm(channels: int) -> LayerNorm:
    return LayerNorm(torch.randn(channels), torch.randn(channels), 1e-5)


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
    "norm in front": make((14, 14), 1, channels=48, in_front=layer_norm(48)),
    "odd, norm in front": make((15, 15), 2, channels=21, in_front=layer_norm(21)),
    "wide, norm without parameters": make((56, 56), 0, channels=64, batch=1, in_front=LayerNorm(None, None)),
    "no image, norm in front": make((5, 4), 1, batch=0, in_front=layer_norm(32)),
    "bias, no norm": make((9, 8), 0, dw_bias=torch.randn(32), norm=None, pw_bias=None),
}


@pytest.fixture(params=["whole", "composed"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether ``cpp`` computes all of it in one call."""
    monkeypatch.setattr(sys.modules["fastvit.ops.conv_projection"], "takes", lambda _: request.param == "whole")
    return request.param


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES_AT_INFERENCE, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_inference(case: str, dtype: torch.dtype, way: str, isa: str) -> None:
    check_inference(conv_projection, functional.conv_projection, converted(CASES[case], dtype), backend="cpp")


@needs_cpp
def test_one_call_at_inference(way: str) -> None:
    case = make((5, 6), 1, in_front=layer_norm(32))
    counter = CallCounter()
    with torch.no_grad():
        conv_projection(**case, backend="cpp")
        with counter:
            conv_projection(**case, backend="cpp")
    assert (counter.names == ["fastvit.packed_conv_projection.default"]) is (way == "whole"), counter.names
    for trained in (case["norm"].weight, case["k"].pw_bias):
        trained.requires_grad_()
        assert any(part.requires_grad for part in conv_projection(**case))
        trained.requires_grad_(False)
    half = case | {"v": case["v"]._replace(pw_weight=case["v"].pw_weight.bfloat16())}
    with torch.no_grad():  # which products of float32 do not take
        got, expected = conv_projection(**half), functional.conv_projection(**converted(half, torch.float32))
    torch.testing.assert_close(got, expected)


@needs_cpp
def test_changed_parameters_are_seen(way: str) -> None:
    case = make((5, 6), 1, in_front=layer_norm(32))
    with torch.no_grad():
        for change in (case["q"].pw_weight, case["k"].pw_weight, case["v"].pw_bias, case["norm"].weight):
            conv_projection(**case, backend="cpp")
            change.mul_(-2)
            check_inference(conv_projection, functional.conv_projection, case, backend="cpp")


@needs_cpp
def test_long_rows_are_cut_into_slices(way: str) -> None:
    case = make((3, 4), 1, channels=3100, batch=1, in_front=layer_norm(3100))
    case |= {name: case[name]._replace(pw_weight=torch.randn(17, 3100) / 56, pw_bias=None) for name in "qkv"}
    check_inference(conv_projection, functional.conv_projection, case, backend="cpp")


@needs_cpp
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_each_part_is_the_convolution_alone(threads: int, batch: int, way: str) -> None:
    before = torch.get_num_threads()
    case = make((20, 18), 1, batch=batch)
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
@pytest.mark.parametrize("in_front", [None, layer_norm(20)], ids=["", "norm in front"])
def test_training(batch_statistics: bool, dtype: torch.dtype, in_front: LayerNorm | None) -> None:
    case = make((7, 5), 1, channels=20, batch_statistics=batch_statistics, in_front=in_front)
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
        layers = [(case[name].pw_weight, case[name].pw_bias, None) for name in "qkv"]
        size = len(parts) // 3
        whole = [each for i in range(3) for each in (*parts[i * size : (i + 1) * size], *layers[i])]
        torch.library.opcheck(
            torch.ops.fastvit.packed_conv_projection.default,
            (x, True, torch.randn(16), None, 1e-5, *whole, 5, 4, 1),
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


@needs_cpp
def test_the_whole_kernel_itself_checks() -> None:
    convolution, layer = low_level(torch.zeros(8, 1, 3, 3), None, None, 1, 1), (torch.zeros(16, 8), None, None)
    good = (True, torch.ones(8), None, 1e-5)
    run, x, whole = torch.ops.fastvit.packed_conv_projection, torch.zeros(2, 21, 8), (*convolution, *layer)
    run(x, *good, *whole, *whole, *whole, 5, 4, 1)
    short, long = torch.ones(8), torch.zeros(99)
    bad = {
        "x must be (B, P + h*w, C), got shape (21, 8)": (x[0], *good, *whole, *whole),
        "norm_weight has shape (7,), expected (8,)": (x, True, short[:7], None, 1e-5, *whole, *whole),
        "k_pw_weight must be (N, 8)": (x, *good, *whole, *convolution, torch.zeros(16, 7), None, None),
        "k_pw_bias has shape (8,), expected (16,)": (x, *good, *whole, *convolution, layer[0], short, None),
        "packed is not what": (x, *good, *whole, *convolution, layer[0], None, long),
        "k_weight must be (C, 1, k, k)": (x, *good, *whole, layer[0], *convolution[1:], *layer),
    }
    for message, arguments in bad.items():
        with pytest.raises(RuntimeError, match=re.escape(f"conv_projection: {message}")):
            run(*arguments, *whole, 5, 4, 1)
