"""Every shipped configuration of CeiT's feed-forward kernels, compiled ahead of time for three GPUs."""

from __future__ import annotations

from typing import NamedTuple

import pytest

pytest.importorskip("triton", reason="Triton is not installed: nothing to compile")

from fastvit.kernels import leff as kernels

from tests.kernels.aot import TARGETS, Build, assert_fits, sample

pytestmark = pytest.mark.slow

DTYPES = {"half": ("bf16", "fp16"), "tf32": ("fp32",), "ieee": ("fp32",)}
CHIPS = {"sm_80": 8, "sm_90": 9, "gfx942": 0}


class Case(NamedTuple):
    kernel: str
    target: str
    dtype: str
    product: str
    config: kernels.Config
    regular: bool
    norm: bool = True
    paper: bool = False

    def __str__(self) -> str:
        flags = ("irregular" * (not self.regular), "bare" * (not self.norm), "paper" * self.paper)
        tile = "x".join(map(str, self.config))
        return "-".join((*self[:4], tile, *filter(None, flags)))


def epilogue(norm: bool) -> kernels.Epilogue:
    """The types of an epilogue."""
    vector = "*fp32:16"
    return kernels.Epilogue(vector, *([vector if norm else None] * 4), "fp32")


def build(case: Case) -> Build:
    config, size = case.config, "i32:16" if case.regular else "i32"
    pointer = f"*{case.dtype}:16" if case.regular else f"*{case.dtype}"
    if case.kernel == "fold":
        types = dict.fromkeys(("up", "dw", "down"), epilogue(case.norm))
        types |= {"taps": pointer, "folded": "*fp32:16", "folded_down": "*fp32:16", "E": size, "num_out": size}
        constants = {"TAPS": 9, "BLOCK": kernels.FOLD_BLOCK}
        return Build(kernels.leff_fold_kernel, case.target, types, constants, 4, 2)
    types = dict.fromkeys(("x", "weight", "out"), pointer) | {"folded": "*fp32:16"}
    types |= dict.fromkeys(("stride_xb", "stride_xn", "E"), size) | dict.fromkeys(("prefix_tokens", "num_rows"), "i32")
    constants = {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "PRECISION": "tf32" if case.product == "tf32" else "ieee",
    }
    if case.kernel == "expand":
        types |= {"grid_tokens": "i32", "C": size}
        constants["TAPS"] = 9
        kernel = kernels.leff_expand_kernel
    else:
        types |= {"h": pointer, "folded_down": "*fp32:16", "height": "i32", "width": "i32", "num_out": size}
        constants |= {"KERNEL": 3, "PAPER": case.paper, "BLOCK_N2": config.block_n2}
        kernel = kernels.leff_contract_kernel
    return Build(kernel, case.target, types, constants, config.num_warps, config.num_stages)


def configurations(kernel: str, product: str, target: str, regular: bool) -> tuple[kernels.Config, ...]:
    if kernel == "expand":
        return kernels.choose_expand_configs(product, regular=regular)
    return kernels.choose_configs(product, 384, regular=regular, chip=CHIPS[target])


FOLD = kernels.Config(1, kernels.FOLD_BLOCK, 1, 4, 2)
SHIPPED = [
    Case(kernel, target, dtype, product, config, regular)
    for kernel in ("expand", "contract")
    for target in TARGETS
    for product, dtypes in DTYPES.items()
    for regular in ((True, False) if target != "sm_90" else (True,))  # what fits sm_80 fits sm_90
    for config in configurations(kernel, product, target, regular)
    # float16 and bfloat16 differ in the instruction only: the second is compiled for one GPU.
    for dtype in (dtypes if target == "sm_80" else dtypes[:1])
]
ALL = [
    *SHIPPED,
    *(case._replace(paper=True) for case in SHIPPED if case.kernel == "contract"),
    *(
        Case("fold", target, dtype, "ieee", FOLD, True, norm)
        for target in TARGETS
        for dtype in ("bf16", "fp32")
        for norm in (True, False)
    ),
]
CASES = sample(ALL, 11)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_configuration_fits_the_gpu(case, reports):
    assert_fits(reports[case], case.target, tensor_cores=case.product != "ieee")


def test_a_wide_output_is_covered_by_one_program_where_registers_allow():
    for width in (192, 384):
        widest = kernels.choose_configs("half", width, regular=True, chip=9)[0]
        assert widest.block_n + widest.block_n2 >= width
