"""The kernels of a training step of head-mixed attention, compiled ahead of time with the arguments of launches."""

from __future__ import annotations

import contextlib
from typing import NamedTuple
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: nothing to compile")

from fastvit.kernels import head_mixed_attention_launch as launching
from fastvit.kernels import head_mixed_attention_tiles as tiles
from fastvit.kernels.head_mixed_attention_configs import LARGE_SHARED, SMALLEST_SHARED

from tests.kernels.aot import Build, assert_fits, sample
from tests.kernels.test_head_mixed_attention_compiled import Recorder, type_of

pytestmark = pytest.mark.slow

LIMITS = {"sm_80": SMALLEST_SHARED, "sm_90": LARGE_SHARED, "sm_100": LARGE_SHARED}
KERNELS = {
    "products": "row_sums_kernel",
    "rows": "row_sums_kernel",
    "queries": "score_gradients_kernel",
    "keys": "score_gradients_kernel",
    "forward": "weighted_rows_kernel",
    "values": "weighted_rows_kernel",
}
SPILLED = 768
"""Bytes of a thread, at most: three programs a multiprocessor are worth more than a fifth of the registers."""


class Case(NamedTuple):
    kernel: str
    target: str
    dtype: str
    heads: int
    head_dim: int
    pre_mix: bool
    moments: bool


SHAPES = [
    (12, 33, False, True),  # DeepViT-S
    (8, 48, True, False),  # CaiT-S
    (4, 48, True, False),  # CaiT-XXS
    (12, 32, False, True),
    (16, 64, False, True),
    (3, 128, False, False),
    (8, 64, True, True),
]
LARGE = [(16, 64, False, True)]
"""For more shared memory than small GPUs have."""

EVERY_CASE = [
    Case(kernel, target, dtype, *shape)
    for kernel in KERNELS
    for target in LIMITS
    for shape in SHAPES
    for dtype in ("bf16", "fp16")
    if (kernel != "products" or shape[3]) and (target != "sm_80" or shape not in LARGE)
]
CASES = sample(EVERY_CASE, 17)


def build(case: Case) -> Build:
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[case.dtype]
    packed = torch.zeros(1, 70, 3, case.heads, case.head_dim, dtype=dtype)
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    pre_weight = torch.zeros(case.heads, case.heads) if case.pre_mix else None
    lse, sizes = torch.zeros(1, case.heads, 70), torch.zeros(16)
    matrix, small = torch.zeros(16, 16, dtype=dtype), torch.zeros(16, 16, dtype=torch.float16)
    recorders = {name: Recorder(getattr(tiles, name)) for name in set(KERNELS.values())}
    with contextlib.ExitStack() as stack:
        for name, recorder in recorders.items():
            stack.enter_context(mock.patch.object(tiles, name, recorder))
        stack.enter_context(mock.patch.object(launching, "pad_kernel", Recorder(launching.pad_kernel)))
        problem = launching.Problem(q, k, None, 1.0, pre_weight)
        maps = tiles.Maps(problem, lse, launching.as_operand(v), launching.as_operand(q), matrix, sizes)
        moments = (small, sizes) if case.moments else None
        pre = (matrix, sizes) if case.pre_mix else None
        mix = (torch.zeros(case.heads, case.heads, dtype=torch.float16), sizes, sizes)
        if case.kernel == "products":
            tiles.map_products(problem, lse)
        elif case.kernel == "rows":
            tiles.row_sums(maps, moments=case.moments)
        elif case.kernel == "queries":
            tiles.query_gradients(maps, lse, moments, pre)
        elif case.kernel == "keys":
            tiles.key_gradients(maps, lse, moments, pre, mix)
        else:
            tiles.weighted_rows(problem, lse, maps.values, mix, columns_are_queries=case.kernel == "values")
        assert case.target != "sm_80" or tiles.fits(problem, LIMITS["sm_80"])
    recorder = recorders[KERNELS[case.kernel]]
    arguments = recorder.arguments
    options = [arguments.pop("num_warps"), 3, arguments.pop("maxnreg")]
    constants = {name: arguments.pop(name) for name in [n for n, a in arguments.items() if a is None or n == "PLAN"]}
    return Build(recorder.kernel, case.target, {n: type_of(a) for n, a in arguments.items()}, constants, *options)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_kernel_fits_the_gpu(case, reports):
    report = reports[case]
    if not isinstance(report, str):
        assert report.spilled <= SPILLED
        report = report._replace(spilled=0)
    assert_fits(report, case.target, tensor_cores=True, shared=LIMITS[case.target])
