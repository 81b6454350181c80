"""The class attention kernels, compiled ahead of time for three GPUs."""

from __future__ import annotations

from typing import NamedTuple

import pytest

pytest.importorskip("triton", reason="Triton is not installed: nothing to compile")

from fastvit.kernels import attention_class as kernels
from fastvit.kernels.attention_class_backward import class_attention_tokens_kernel

from tests.kernels.aot import TARGETS, Build, assert_fits, sample

pytestmark = pytest.mark.slow

KERNELS = {
    "parts": kernels.class_attention_parts_kernel,
    "backward_parts": kernels.class_attention_parts_kernel,
    "combine": kernels.class_attention_combine_kernel,
    "tokens": class_attention_tokens_kernel,
}
ROWS = ("q", "k", "v", "grad", "out", "dk", "dv", "bias")
FLOATS = ("part_max", "part_sum", "part_acc", "dq", "dlogits")


class Case(NamedTuple):
    target: str
    dtype: str
    kernel: str
    block_d: int
    config: kernels.Config

    def __str__(self) -> str:
        return "-".join((*self[:3], f"{self.config.block_n}x{self.block_d}", f"{self.config.num_warps}_warps"))


def build(case: Case) -> Build:
    """The launch with the most register pressure: unaligned rows, a mask, a bias and the most parts."""
    kernel, config = KERNELS[case.kernel], case.config
    constants = {
        "D": case.block_d - 15,
        "BLOCK_N": config.block_n,
        "BLOCK_D": case.block_d,
        "PARTS": kernels.MAX_PARTS,
        "HAS_MASK": True,
        "HAS_BIAS": True,
        "BACKWARD": case.kernel == "backward_parts",
        "WRITE_DLOGITS": True,
    }
    if case.kernel == "parts":
        constants["grad"] = None
    pointers = dict.fromkeys(ROWS, f"*{case.dtype}") | dict.fromkeys(FLOATS, "*fp32:16")
    pointers |= {"mask": "*u8", "scale": "fp32"}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    types = {name: pointers.get(name, "i32") for name in kernel.arg_names if name not in constants}
    warps = kernels.COMBINE_WARPS if case.kernel == "combine" else config.num_warps
    return Build(kernel, case.target, types, constants, warps, 1)


EVERY_CASE = [
    Case(target, dtype, kernel, block_d, config)
    for kernel in KERNELS
    for block_d, configs in kernels.CONFIGS.items()
    for config in (configs[:1] if kernel == "combine" else configs)
    for target in TARGETS
    for dtype in ("fp32", "fp16", "bf16")
]
CASES = sample(EVERY_CASE)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_configuration_fits_the_gpu(case, reports):
    assert_fits(reports[case], case.target, tensor_cores=False)
