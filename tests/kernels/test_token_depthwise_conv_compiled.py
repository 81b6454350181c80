"""The Triton kernels of token depthwise convolution, compiled ahead of time for three GPUs."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

pytest.importorskip("triton", reason="Triton is not installed: nothing to compile")

import torch
from fastvit.kernels.token_depthwise_conv import convolve_kernel, norm_activation_kernel
from fastvit.kernels.token_depthwise_conv_backward import (
    norm_activation_backward_kernel,
    sums_kernel,
    weight_gradient_kernel,
)
from fastvit.kernels.token_depthwise_conv_tiles import Statistics, Tokens, choose_config
from fastvit.kernels.token_depthwise_conv_training import statistics_kernel

from tests.kernels.aot import TARGETS, Build, assert_fits, sample

pytestmark = pytest.mark.slow

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
KERNELS = {
    "norm_activation": norm_activation_kernel,
    "norm_activation_backward": norm_activation_backward_kernel,
    "convolve": convolve_kernel,
    "statistics": statistics_kernel,
    "sums": sums_kernel,
    "weight_gradient": weight_gradient_kernel,
}
GELU, SILU, GELU_TANH = 1, 3, 5


class Case(NamedTuple):
    kernel: str
    target: str
    dtype: str
    constants: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return "-".join((*self[:3], *(f"{name}={value}" for name, value in self.constants)))


def build(case: Case) -> Build:
    """A launch with aligned rows, float32 parameters, and every optional tensor that the case does not set to None."""
    kernel = KERNELS[case.kernel]
    config = choose_config(DTYPES[case.dtype], dict(case.constants).get("KERNEL", 3))
    constants = {"ROWS": config.rows, "CHANNELS": config.channels, **dict(case.constants)}
    tokens = Tokens(f"*{case.dtype}:16", "i32:16", "i32:16")
    vector = "*fp32:16"
    no_norm = constants.pop("norm", True) is None
    norm = Statistics(*(None if no_norm else vector,) * 4, "fp32")
    kinds = dict.fromkeys(("v", "t", "dc", "grad", "residual", "conv", "out"), tokens) | {"norm": norm, "C": "i32:16"}
    kinds |= dict.fromkeys(("height", "width", "out_width", "tokens", "num_rows", "steps"), "i32")
    types = {name: kinds.get(name, vector) for name in kernel.arg_names if name not in constants}
    return Build(kernel, case.target, types, constants, config.num_warps, 2)


def constants(**values: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(values.items())


def shape(kernel: int, stride: int) -> dict[str, int]:
    return {"KERNEL": kernel, "STRIDE": stride, "PADDING": kernel // 2}


NO_NORM = {"norm": None, "bias": None}
KINDS = [
    ("norm_activation", constants(ACTIVATION=GELU)),
    ("norm_activation_backward", constants(ACTIVATION=GELU)),
    ("norm_activation_backward", constants(ACTIVATION=GELU_TANH)),
    ("norm_activation_backward", constants(ACTIVATION=SILU, constant=None, slope=None)),
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
    # float16 and bfloat16 differ in the conversion only: the second is compiled for one GPU.
    for dtype in (DTYPES if target == "sm_80" and kernel in {"norm_activation", "sums"} else ("bf16", "fp32"))
]
CASES = sample(EVERY_CASE, 7)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_fits_the_gpu(case, reports):
    assert_fits(reports[case], case.target, tensor_cores=False)
