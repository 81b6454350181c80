"""The CUDA kernel of CvT's three convolutions, run on the host thread by thread.

``tests/kernels/test_on_gpu.py`` runs it on a GPU.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit.ops._schema import unpack
from fastvit.reference import functional
from tests.helpers import poisoned_empty
from tests.ops.composed import check_inference, converted
from tests.ops.test_conv_projection import CASES, make
from tests.ops.test_token_depthwise_conv_cuda import DTYPES, MAX_SHARED, Arguments, built, describe

NO_PRE_NORM = (None, None, None, None, 0.0, 0)

SIZES = {
    # Of 64 channels in 16 bits and 32 in 32, a block has tiles of 28 columns and 8 rows at most.
    "cvt stage 1": make((56, 56), 0, channels=64, batch=1),
    "cvt stage 2": make((28, 28), 0, channels=96, batch=1),
    "cvt stage 3": make((14, 14), 1, channels=128),
    "cvt stage 3 of 384 pixels": make((24, 24), 1, channels=64, batch=1),
    "odd": make((15, 15), 2, channels=72),
    "odd tiles": make((35, 37), 0, channels=8, batch=1),
    "one row": make((1, 30), 1, channels=8),
    "one column": make((30, 1), 1, channels=8),
    "one token": make((1, 1), 1, channels=8),
    "no norm": make((9, 8), 0, dw_bias=torch.randn(32), norm=None),
    "bias and norm": make((9, 8), 3, dw_bias=torch.randn(32)),
    "many images": make((5, 4), 1, batch=7),
}
"""Those that one kernel computes."""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    found = built("conv_projection_host.cpp", tmp_path_factory.mktemp("host"))
    found.projection_host.restype = ctypes.c_int64
    return found


@pytest.fixture
def host(library: ctypes.CDLL) -> Callable[..., Any]:
    """conv_projection with the convolutions by the CUDA kernels' functions on the host."""

    def run(
        x: Tensor, q: Any, k: Any, v: Any, grid: tuple[int, int], prefix_tokens: int, *, together: bool
    ) -> tuple[Tensor, ...]:
        descriptions, outs = [], []
        for part in (q, k, v):
            padding = part.dw_weight.shape[-1] // 2
            geometry = (*grid, part.stride, padding, prefix_tokens, False)
            arguments, shape = describe(x, part.dw_weight, part.dw_bias, NO_PRE_NORM, (*unpack(part.norm), 0), geometry)
            descriptions.append(arguments)
            outs.append(torch.empty(shape, dtype=x.dtype))
        pointers = (ctypes.c_void_p * 3)(*(out.data_ptr() for out in outs))
        shared = library.projection_host((Arguments * 3)(*descriptions), pointers)
        assert (shared > 0) is together
        assert abs(shared) <= MAX_SHARED
        return tuple(F.linear(out, part.pw_weight, part.pw_bias) for out, part in zip(outs, (q, k, v), strict=True))

    return run


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_one_kernel_for_all_three(size: str, dtype: torch.dtype, host: Callable[..., Any]) -> None:
    check_inference(host, functional.conv_projection, converted(SIZES[size], dtype), together=True)


def test_float32_parameters_beside_16_bit_tokens(host: Callable[..., Any]) -> None:
    case = converted(make((9, 8), 1), torch.float32) | {"x": torch.randn(2, 73, 32).bfloat16()}
    convolutions = {name: case[name]._replace(pw_weight=torch.eye(32).bfloat16(), pw_bias=None) for name in "qkv"}
    with torch.no_grad(), poisoned_empty():
        got = host(**case | convolutions, together=True)
        exact = functional.conv_projection(**converted(case | convolutions, torch.float64))
    for ours, expected in zip(got, exact, strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=2**-8, atol=2**-8)


@pytest.mark.parametrize("case", ["stride 1", "other strides", "odd"])
def test_other_convolutions_one_after_another(case: str, host: Callable[..., Any]) -> None:
    """Other strides, and channels that no vector of 16 bytes divides."""
    arguments = converted(CASES[case], torch.bfloat16)
    check_inference(host, functional.conv_projection, arguments, together=False)


def test_a_view_of_wider_tokens(host: Callable[..., Any]) -> None:
    case = make((6, 5), 1)
    case["x"] = torch.randn(4, 62, 80)[:2, 3:34, 8:40]
    with torch.no_grad(), poisoned_empty():
        got = host(**case, together=True)
    dense = host(**case | {"x": case["x"].contiguous()}, together=True)
    assert all(map(torch.equal, got, dense))


def test_a_larger_kernel_for_one_of_them(host: Callable[..., Any]) -> None:
    case = make((9, 8), 1)
    case["k"] = case["k"]._replace(dw_weight=torch.randn(32, 1, 5, 5) / 5)
    check_inference(host, functional.conv_projection, case, together=False)
