"""The Triton kernels of token depthwise convolution, compiled ahead of time for three chips in the shapes of models."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import pytest

pytest.importorskip("triton", reason="Triton is not installed: nothing to compile")

import torch
from aot import TARGETS, Build, Report, assert_fits, compile_all, sample
from fastvit.kernels import token_depthwise_conv as kernels

pytestmark = pytest.mark.slow

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NORM = ("mean", "var", "weight", "bias")
GELU, SILU = 1, 3


class Case(NamedTuple):
    kernel: str
    target: str
    dtype: str
    constants: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return "-".join((*self[:3], *(f"{name}={value}" for name, value in self.constants)))


def build(case: Case) -> Build:
    """Aligned rows, float32 parameters, and every optional tensor there is unless the case says otherwise."""
    kernel = getattr(kernels, f"{case.kernel}_kernel")
    config = kernels.choose_config(DTYPES[case.dtype], dict(case.constants).get("KERNEL", 3))
    constants = {"ROWS": config.rows, "CHANNELS": config.channels, **dict(case.constants)}
    tensors = {"v", "t", "dc", "grad", "residual", "conv", "out"}
    types = {}
    for name in kernel.arg_names:
        if name in constants:
            continue
        if name in tensors:
            types[name] = f"*{case.dtype}:16"
        elif name.startswith("stride_") or name == "C":
            types[name] = "i32:16"
        elif name == "eps":
            types[name] = "fp32"
        elif name in {"height", "width", "out_width", "out_tokens", "tokens", "num_rows", "steps"}:
            types[name] = "i32"
        else:
            types[name] = "*fp32:16"
    return Build(kernel, case.target, types, constants, config.num_warps, 2)


def constants(**values: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(values.items())


def shape(kernel: int, stride: int) -> dict[str, int]:
    return {"KERNEL": kernel, "STRIDE": stride, "PADDING": kernel // 2}


NO_NORM = dict.fromkeys(("mean", "var", "norm_weight", "norm_bias", "bias"))
KINDS = [
    ("map", constants(ACTIVATION=GELU)),
    ("map_backward", constants(ACTIVATION=GELU)),
    ("map_backward", constants(ACTIVATION=SILU, constant=None, slope=None)),
    ("convolve", constants(ACTIVATION=GELU, TRANSPOSED=False, **shape(3, 1))),
    ("convolve", constants(ACTIVATION=0, TRANSPOSED=False, conv=None, **NO_NORM, **shape(3, 2))),
    ("convolve", constants(ACTIVATION=0, TRANSPOSED=False, conv=None, **NO_NORM, **shape(7, 1))),
    ("convolve", constants(ACTIVATION=0, TRANSPOSED=True, conv=None, residual=None, **NO_NORM, **shape(3, 1))),
    ("convolve", constants(ACTIVATION=0, TRANSPOSED=True, conv=None, residual=None, **NO_NORM, **shape(5, 2))),
    ("statistics", ()),
    ("sums", constants(ACTIVATION=GELU)),
    ("weight_gradient", constants(**shape(3, 1))),
    ("weight_gradient", constants(**shape(7, 2))),
]

EVERY_CASE = [
    Case(kernel, target, dtype, values)
    for target in TARGETS
    for kernel, values in KINDS
    # float16 and bfloat16 differ in the conversion alone: one chip for the second of them.
    for dtype in (DTYPES if target == "sm_80" and kernel in {"map", "sums"} else ("bf16", "fp32"))
]
CASES = sample(EVERY_CASE, 7)


@pytest.fixture(scope="module")
def reports() -> dict[Case, Report | str]:
    return dict(zip(CASES, compile_all([partial(build, case) for case in CASES]), strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_fits_the_chip(case, reports):
    assert_fits(reports[case], case.target, tensor_cores=False)
