"""Convolution of an image, norm and activation: parity, layouts, what is turned down, the choice by measurement."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from fastvit import backends, ops
from fastvit.ops._operator import recording
from fastvit.reference import functional
from fastvit.reference.functional import BatchNorm
from tests.helpers import CallCounter, assert_as_accurate, poisoned_empty

needs_cpp = pytest.mark.skipif(bool(backends.cpp_reasons()), reason="; ".join(backends.cpp_reasons()))
BACKENDS = [pytest.param("cpp", marks=needs_cpp), "channels_last"]


def _norm(channels: int, affine: bool = True) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, affine=affine).eval()
    for tensor in (*norm.parameters(), norm.running_mean, norm.running_var):
        tensor.data.uniform_(0.5, 2.0)
    return norm.requires_grad_(False)


def _stem(dtype: torch.dtype, bias: bool = False, affine: bool = True) -> tuple[Tensor, nn.Conv2d, nn.BatchNorm2d]:
    conv = nn.Conv2d(3, 8, 7, 2, 3, bias=bias)
    return (
        torch.randn(2, 3, 22, 30).to(dtype),
        conv.to(dtype).requires_grad_(False),
        _norm(8, affine).to(dtype),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize(("bias", "affine"), [(False, True), (True, True), (True, False)])
def test_as_accurate_as_the_plain_form(backend, dtype, activation, bias, affine) -> None:
    x, conv, norm = _stem(dtype, bias, affine)
    options = {"stride": 2, "padding": 3, "activation": activation}
    got = ops.conv_batch_norm(x, conv.weight, conv.bias, BatchNorm.of(norm), **options, backend=backend)
    plain = functional.conv_batch_norm(x, conv.weight, conv.bias, BatchNorm.of(norm), **options)
    conv, norm = conv.double(), norm.double()
    exact = functional.conv_batch_norm(x.double(), conv.weight, conv.bias, BatchNorm.of(norm), **options)
    assert_as_accurate(got, plain, exact)
    assert got.is_contiguous(memory_format=torch.channels_last)


class Windows(NamedTuple):
    """A convolution of a map (B, C, H, W)."""

    x: tuple[int, int, int, int]
    outputs: int
    kernel: tuple[int, int]
    stride: int | tuple[int, int] = 1
    padding: int | tuple[int, int] = 0


WINDOWS = {
    "cvt": Windows((2, 3, 30, 26), 20, (7, 7), 4, 2),
    "cvt_3x3": Windows((1, 24, 13, 9), 40, (3, 3), 2, 1),
    "patches": Windows((3, 3, 32, 48), 33, (16, 16), 16),
    "patches_cut": Windows((2, 5, 11, 14), 17, (4, 3), (4, 3)),
    "pointwise": Windows((2, 19, 5, 7), 16, (1, 1)),
    "one_channel": Windows((2, 1, 9, 9), 3, (3, 3), 1, 1),
    "deep": Windows((1, 64, 16, 16), 16, (8, 8), 8),  # longer sums than one slice
    "more_padding_than_map": Windows((1, 2, 1, 3), 5, (5, 3), (1, 2), (4, 5)),
    "wide_kernel": Windows((1, 1, 3, 60), 4, (2, 41), (1, 3), (0, 2)),
    "long_stride": Windows((1, 4, 5, 6), 4, (2, 2), (2**20, 9), (1, 0)),
    "tall_grid": Windows((1, 2, 150, 3), 6, (3, 3), 1, 1),
}
LAYOUTS = {
    "channels_first": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "tokens": lambda x: (
        torch.cat((x.flatten(2), x.flatten(2)[..., :1]), 2)  # behind a class token, as in a model
        .roll(1, 2)
        .transpose(1, 2)
        .contiguous()[:, 1:]
        .transpose(1, 2)
        .unflatten(2, x.shape[2:])
    ),
    "strided": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "cut": lambda x: torch.nn.functional.pad(x, (1, 2, 3, 0))[:, :, 3:, 1:-2],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", WINDOWS)
def test_windows_are_read_where_they_lie(name, layout, dtype):
    case = WINDOWS[name]
    weight, bias = torch.randn(case.outputs, case.x[1], *case.kernel), torch.randn(case.outputs)
    weight = weight / weight[0].numel() ** 0.5
    x = torch.randn(case.x)
    norm, activation = (BatchNorm.of(_norm(case.outputs)), "gelu") if name in ("cvt", "deep") else (None, None)
    x, weight, bias = (tensor.to(dtype) for tensor in (x, weight, bias))
    around = {"stride": case.stride, "padding": case.padding, "activation": activation}
    plain = functional.conv_batch_norm(x, weight, bias, norm, **around)
    exact = functional.conv_batch_norm(
        x.double(), weight.double(), bias.double(), norm and norm._replace(**_double(norm)), **around
    )
    laid = LAYOUTS[layout](x)
    assert torch.equal(laid, x)
    with torch.inference_mode(), poisoned_empty():
        got = ops.conv_batch_norm(laid, weight, bias, norm, **around, backend="cpp")
    assert_as_accurate(got, plain, exact)
    tokens = got.flatten(2).transpose(1, 2)
    assert tokens.data_ptr() == got.data_ptr() and tokens.is_contiguous()


def _double(norm: BatchNorm) -> dict[str, Any]:
    return {name: getattr(norm, name).double() for name in BatchNorm._fields[:4]}


@needs_cpp
@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 3, 0, 8), (2, 3, 8, 0)])
def test_empty_maps(shape):
    x, weight, bias = torch.randn(shape), torch.randn(6, shape[1], 3, 3), torch.randn(6)
    for layout in (torch.contiguous_format, torch.channels_last):
        got = ops.conv_batch_norm(x.contiguous(memory_format=layout), weight, bias, None, padding=2, backend="cpp")
        expected = bias[None, :, None, None].expand(shape[0], 6, shape[2] + 2, shape[3] + 2)
        assert torch.equal(got, expected)


@needs_cpp
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_weight_that_changes_is_packed_anew(layout):
    conv, x = nn.Conv2d(3, 16, 4, 4), torch.randn(2, 3, 16, 16).contiguous(memory_format=layout)
    with torch.no_grad():
        for change in (
            lambda: None,
            lambda: conv.weight.add_(1.0),
            lambda: conv.weight.data.mul_(2.0),
            lambda: setattr(conv, "weight", nn.Parameter(torch.randn(16, 3, 4, 4))),
            lambda: conv.to(memory_format=torch.channels_last),
            lambda: conv.load_state_dict(nn.Conv2d(3, 16, 4, 4).state_dict()),
            lambda: conv.share_memory(),
        ):
            change()
            got = ops.conv_batch_norm(x, conv.weight, conv.bias, None, stride=4, backend="cpp")
            torch.testing.assert_close(got, conv(x))


@needs_cpp
def test_the_fastest_by_measurement_is_taken(monkeypatch):
    module = sys.modules["fastvit.ops.conv_batch_norm"]
    x, weight = torch.randn(2, 3, 12, 12), torch.randn(8, 3, 3, 3)
    for winner in ("cpp", "channels_last", "reference"):
        seen: list[Any] = []
        monkeypatch.setattr(module, "_FASTER", {})
        monkeypatch.setattr(module.autotune, "choose", lambda *_, winner=winner, **__: (winner,))
        with torch.no_grad(), recording(lambda selection, seen=seen: seen.append(selection)):
            ops.conv_batch_norm(x, weight, None, None)
        assert [selection.backend for selection in seen] == [winner]


@needs_cpp
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_registered_operators(layout):
    x, weight = torch.randn(2, 3, 9, 11).contiguous(memory_format=layout), torch.randn(16, 3, 3, 2)
    norm = BatchNorm.of(_norm(16))
    behind = (norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps, 1)
    sizes, pixels = (3, 2, 2, 1, 1, 0), layout == torch.channels_last
    matrix = (weight.permute(0, 2, 3, 1) if pixels else weight).flatten(1)
    registered = torch.ops.fastvit
    tests = ("test_schema", "test_faketensor")
    arguments = (x, weight, None, *sizes, *behind)
    torch.library.opcheck(registered.conv_batch_norm.default, arguments, test_utils=tests)
    arguments = (x, matrix, None, registered.pack_weight(matrix), *sizes, pixels, *behind)
    torch.library.opcheck(registered.packed_conv_batch_norm.default, arguments, test_utils=tests)


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_takes_the_reference_and_moves_the_statistics(backend) -> None:
    x, conv, norm = _stem(torch.float32)
    norm.train()
    before = norm.running_mean.clone()
    with pytest.raises(RuntimeError, match="the norm uses batch statistics"):
        ops.conv_batch_norm(x, conv.weight, None, BatchNorm.of(norm), backend=backend)
    out = ops.conv_batch_norm(x, conv.weight, None, BatchNorm.of(norm), stride=2, padding=3)
    assert not torch.equal(norm.running_mean, before)
    torch.testing.assert_close(out.mean((0, 2, 3)), norm.bias)


def test_gradients_reach_everything() -> None:
    x, conv, norm = _stem(torch.float32)
    leaves = [tensor.requires_grad_() for tensor in (x, conv.weight, norm.weight, norm.bias)]
    ops.conv_batch_norm(x, conv.weight, None, BatchNorm.of(norm)).sum().backward()
    assert all(leaf.grad is not None for leaf in leaves)


@needs_cpp
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_compiled(layout):
    torch._dynamo.reset()
    conv = nn.Conv2d(3, 16, 3, 2, 1)

    def run(x: Tensor) -> Tensor:
        return ops.conv_batch_norm(x, conv.weight, conv.bias, None, stride=2, padding=1)

    with torch.no_grad():
        compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
        for size in (9, 14):
            x = torch.randn(2, 3, size, size).contiguous(memory_format=layout)
            got = compiled(x)
            torch.testing.assert_close(got, conv(x))
            assert got.stride() == ops.conv_batch_norm(x, conv.weight, conv.bias, None, stride=2, padding=1).stride()


@needs_cpp
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_recording_in_inference_mode_packs_nothing_anew(channels_last: bool) -> None:
    x, weight = torch.randn(1, 16, 9, 9), nn.Parameter(torch.randn(24, 16, 3, 3))
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    counter = CallCounter()
    with torch.inference_mode():
        ops.conv_batch_norm(x, weight, None, None, backend="cpp")
        with counter:
            ops.conv_batch_norm(x, weight, None, None, backend="cpp")
    assert counter.names == ["aten.view.default", "fastvit.packed_conv_batch_norm.default"]
