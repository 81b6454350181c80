"""Every configuration of depthwise-separable convolution's kernels, compiled ahead of time for three GPUs."""

from __future__ import annotations

from typing import NamedTuple

import pytest

pytest.importorskip("triton", reason="Triton is not installed: nothing to compile")

from fastvit.kernels import _depthwise_prologue as products
from fastvit.kernels import conv_projection as kernels

from tests.kernels.aot import TARGETS, Build, assert_fits, compile_kernel, sample

pytestmark = pytest.mark.slow

DTYPES = {"half": ("bf16", "fp16"), "tf32": ("fp32",), "ieee": ("fp32",)}
CHIPS = {"sm_80": 8, "sm_90": 9, "gfx942": 0}


class Case(NamedTuple):
    target: str
    dtype: str
    product: str
    config: products.Config
    regular: bool
    stride: int
    prefix: bool

    def __str__(self) -> str:
        tile = "x".join(map(str, self.config))
        flags = ("irregular" * (not self.regular), "prefix" * self.prefix)
        return "-".join((*self[:3], tile, f"stride {self.stride}", *filter(None, flags)))


def build(case: Case) -> Build:
    config, size = case.config, "i32:16" if case.regular else "i32"
    pointer = f"*{case.dtype}:16" if case.regular else f"*{case.dtype}"
    types = dict.fromkeys(("x", "weight", "out"), pointer) | dict.fromkeys(("folded", "bias"), "*fp32:16")
    types |= dict.fromkeys(("stride_xb", "stride_xn", "C", "num_out"), size)
    types |= dict.fromkeys(("prefix_tokens", "height", "width", "out_width", "tokens", "num_rows"), "i32")
    constants = {"KERNEL": 3, "STRIDE": case.stride, "PADDING": 1, "PREFIX": case.prefix}
    constants |= {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_N2": config.block_n2}
    constants |= {"BLOCK_K": config.block_k, "PRECISION": "tf32" if case.product == "tf32" else "ieee"}
    return Build(kernels.separable_kernel, case.target, types, constants, config.num_warps, config.num_stages)


ALL = [
    Case(target, dtype, product, config, regular, stride, prefix)
    for target in TARGETS
    for product, dtypes in DTYPES.items()
    for regular in (True, False)
    for config in products.choose_configs(product, 384, regular=regular, chip=CHIPS[target])
    for stride in (1, 2)
    for prefix in (True, False)
    for dtype in (dtypes if target == "sm_80" else dtypes[:1])
]
CASES = sample(ALL, 17)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_configuration_fits_the_gpu(case, reports):
    assert_fits(reports[case], case.target, tensor_cores=case.product != "ieee")


@pytest.mark.parametrize("target", TARGETS)
def test_the_fold_kernel_fits_the_gpu(target):
    vector = "*fp32:16"
    types = {"taps": "*bf16:16", "epilogue": products.Epilogue(*[vector] * 5, "fp32"), "folded": vector, "C": "i32:16"}
    constants = {"TAPS": 9, "BLOCK": products.FOLD_BLOCK}
    assert_fits(compile_kernel(Build(kernels.fold_kernel, target, types, constants, 4, 2)), target, tensor_cores=False)
