"""Every shipped configuration of the masked attention kernel, compiled ahead of time for three GPUs."""

from __future__ import annotations

from typing import NamedTuple

import pytest

pytest.importorskip("triton", reason="Triton is not installed: nothing to compile")

from fastvit.kernels import _primitives as primitives
from fastvit.kernels import attention_masked as kernels

from tests.kernels.aot import TARGETS, Build, assert_fits, sample

pytestmark = pytest.mark.slow

STRIDES = [f"stride_{tensor}{axis}" for tensor in "qkv" for axis in "bhn"]
MASK_STRIDES = [f"stride_{tensor}{axis}" for tensor in ("m", "bias") for axis in "bhqk"]


class Case(NamedTuple):
    target: str
    dtype: str
    product: str
    block_d: int
    config: kernels.Config
    regular: bool

    def __str__(self) -> str:
        form = "one_pass" if self.config.one_pass else "streaming"
        tile = f"{self.config.block_m}x{self.config.block_n}x{self.block_d}"
        return "-".join((*self[:3], form, tile, "regular" if self.regular else "irregular"))


def build(case: Case) -> Build:
    """The launch with the most register pressure: aligned rows and a key padding mask, or for irregular cases unaligned
    rows, a mask of (queries, keys) and a bias."""
    regular, config = case.regular, case.config
    types = dict.fromkeys(("q", "k", "v", "out"), f"*{case.dtype}:16")
    types |= dict.fromkeys(("H", "num_queries", "num_keys"), "i32") | {"scale": "fp32", "lse": "*fp32:16"}
    types |= dict.fromkeys(STRIDES, "i32:16" if regular else "i32") | dict.fromkeys(MASK_STRIDES, "i32")
    types |= {"mask": "*u8:16"} if regular else {"mask": "*u8", "bias": f"*{case.dtype}"}
    constants = {
        "D": case.block_d if regular else case.block_d - 15,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_D": case.block_d,
        "ONE_PASS": config.one_pass,
        "MASK_KIND": primitives.KEY_MASK if regular else primitives.FULL_MASK,
        "HAS_BIAS": not regular,
        "WRITE_LSE": True,
        "NEGATIVE": False,
        "PRECISION": "tf32" if case.product == "tf32" else "ieee",
    }
    constants |= {"stride_mk": 1, "stride_biask": 1} | ({"bias": None} if regular else {})
    types = {name: kind for name, kind in types.items() if name not in constants}
    registers = config.registers if case.target in ("sm_90", "sm_100") else None
    settings = (config.num_warps, config.num_stages, registers)
    return Build(kernels.masked_attention_kernel, case.target, types, constants, *settings)


def dtypes(product: str, target: str) -> list[str]:
    """float16 and bfloat16 differ in the instruction only: the second is compiled for one GPU."""
    return ["fp32"] if product not in ("half", "few") else ["bf16", "fp16"] if target == "sm_80" else ["bf16"]


EVERY_CASE = [
    Case(target, dtype, product, block_d, config, table is kernels.REGULAR)
    for target in TARGETS
    for table in (kernels.REGULAR, kernels.IRREGULAR)
    for (product, block_d), configs in table.items()
    for config in configs
    if TARGETS[target].backend == "cuda" or not config.one_pass or config.block_n <= kernels.AMD_ONE_PASS_KEYS
    for dtype in dtypes(product, target)
]
CASES = sample(EVERY_CASE)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_configuration_fits_the_gpu(case, reports):
    assert_fits(reports[case], case.target, tensor_cores=case.product != "ieee")


def test_every_head_dimension_and_token_count_has_a_configuration():
    for regular in (True, False):
        for product in ("half", "tf32", "ieee"):
            for head_dim in (1, 16, 33, 48, 64, 65, 128):
                for num_queries, num_keys in ((1, 1), (50, 50), (197, 197), (1, 577), (577, 100_000)):
                    configs = kernels.choose_configs(product, head_dim, num_queries, num_keys, regular=regular)
                    assert all(num_keys <= config.block_n for config in configs if config.one_pass)
                    assert not configs[-1].one_pass, "the last one streams, so it takes any number of keys"
                    assert num_keys <= 128 or not configs[0].one_pass, "what is taken unmeasured"
