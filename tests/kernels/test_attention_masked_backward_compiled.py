"""The backward kernels of masked attention, compiled ahead of time for three GPUs."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest

pytest.importorskip("triton", reason="Triton is not installed: nothing to compile")

from fastvit.kernels import _primitives as primitives
from fastvit.kernels import attention_masked_backward as kernels
from fastvit.kernels.attention_masked import Config
from fastvit.kernels.attention_masked_bias_gradient import masked_attention_dbias_kernel

from tests.kernels.aot import TARGETS, Build, assert_fits, sample

pytestmark = pytest.mark.slow

KERNELS = {
    "dq": kernels.masked_attention_dq_kernel,
    "dkv": kernels.masked_attention_dkv_kernel,
    "dbias": masked_attention_dbias_kernel,
}


class Case(NamedTuple):
    target: str
    dtype: str
    kernel: str
    product: str
    block_d: int
    config: Config
    regular: bool

    def __str__(self) -> str:
        form = "one_pass" if self.config.one_pass else "streaming"
        tile = f"{self.config.block_m}x{self.config.block_n}x{self.block_d}"
        return "-".join((*self[:4], form, tile, "regular" if self.regular else "irregular"))


def build(case: Case) -> Build:
    """The launch with the most register pressure: aligned rows and a key padding mask, or for irregular cases unaligned
    rows, a mask of (queries, keys) and a bias."""
    regular, config = case.regular, case.config
    kernel = KERNELS[case.kernel]
    constants = {
        "D": case.block_d if regular else case.block_d - 15,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_D": case.block_d,
        "ONE_PASS": config.one_pass,
        "MASK_KIND": primitives.KEY_MASK if regular else primitives.FULL_MASK,
        "HAS_BIAS": not regular,
        "PRECISION": "tf32" if case.product == "tf32" else "ieee",
        "stride_mk": 1,
        "stride_biask": 1,
    }
    if regular and case.kernel != "dbias":
        constants["bias"] = None
    pointer = f"*{case.dtype}:16" if regular else f"*{case.dtype}"
    pointers = dict.fromkeys(("grad", "q", "k", "v", "bias", "out", "dq", "dk", "dv"), pointer)
    pointers |= dict.fromkeys(("lse", "shift", "factor", "delta", "dbias"), "*fp32:16") | {
        "mask": "*u8",
        "scale": "fp32",
    }

    def kind(name: str) -> str:
        aligned = regular and name.startswith("stride_") and name[7:] in TOKEN_STRIDES
        return pointers.get(name) or ("i32:16" if aligned else "i32")

    names = kernel.arg_names
    types = {name: kind(name) for name in names if name not in constants}
    constants = {name: value for name, value in constants.items() if name in names}
    return Build(kernel, case.target, types, constants, config.num_warps, config.num_stages)


TOKEN_STRIDES = {f"{tensor}{axis}" for tensor in "gqkvo" for axis in "bhn"}


def configurations(configs: kernels.Configs) -> list[tuple[str, Config]]:
    found = [("dq", config) for config in configs.queries] + [("dkv", config) for config in configs.keys]
    return [*found, ("dbias", configs.bias)]


def cases() -> list[Case]:
    """Every configuration for every GPU, dtype and alignment that it is for."""
    found = []
    for table, alignments in ((kernels.CONFIGS, (True, False)), (kernels.REGULAR_CONFIGS, (True,))):
        for (product, block_d), configs in table.items():
            for kernel, config in configurations(configs):
                for target in TARGETS:
                    if table is kernels.REGULAR_CONFIGS and TARGETS[target].backend != "cuda":
                        continue
                    for regular in alignments:
                        for dtype in ["bf16", "fp16"] if product == "half" else ["fp32"]:
                            found.append(Case(target, dtype, kernel, product, block_d, config, regular))
    return list(dict.fromkeys(found))


CASES = sample(cases())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_configuration_fits_the_gpu(case, reports):
    assert_fits(reports[case], case.target, tensor_cores=case.product != "ieee")


def test_every_call_has_configurations():
    for product, head_dim in itertools.product(("half", "tf32", "ieee"), (1, 16, 33, 48, 64, 65, 128)):
        for num_keys, regular, amd in itertools.product((1, 50, 197, 577, 100_000), (True, False), (True, False)):
            configs = kernels.configurations(product, head_dim, num_keys, regular=regular, amd=amd)
            assert all(num_keys <= config.block_n for config in configs.queries if config.one_pass)
            assert not configs.queries[-1].one_pass, "the last one streams, so it takes any number of keys"
            assert num_keys <= 128 or not configs.queries[0].one_pass, "what is taken unmeasured"
