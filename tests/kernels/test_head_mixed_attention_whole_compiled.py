"""The one-pass kernels of head-mixed attention, compiled ahead of time with the arguments of launches."""

from __future__ import annotations

from typing import NamedTuple
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: nothing to compile")

from fastvit.kernels import head_mixed_attention_fold as folding
from fastvit.kernels import head_mixed_attention_launch as launching
from fastvit.kernels import head_mixed_attention_whole as whole
from fastvit.kernels.head_mixed_attention_configs import LARGE_SHARED, SMALLEST_SHARED
from fastvit.kernels.head_mixed_attention_fold import Post

from tests.kernels.aot import Build, assert_fits, sample
from tests.kernels.test_head_mixed_attention_compiled import Recorder, type_of

pytestmark = pytest.mark.slow

SPILLED = 512
"""Bytes of a thread, at most: a hundred of eight thousand instructions. Half the maps a program would cost more."""

LIMITS = {"sm_80": SMALLEST_SHARED, "sm_90": LARGE_SHARED, "sm_100": LARGE_SHARED}


class Case(NamedTuple):
    target: str
    dtype: str
    lse: bool
    heads: int
    head_dim: int
    keys: int
    pre_mix: bool


SHAPES = [
    (12, 33, 197, False),  # DeepViT-S
    (8, 48, 196, True),  # CaiT-S
    (6, 48, 196, True),  # CaiT-XS
    (4, 48, 196, True),  # CaiT-XXS
    (16, 64, 256, False),  # eight warps, and more shared memory than small GPUs have
    (12, 64, 256, False),
    (3, 128, 50, False),
]
EVERY_CASE = [
    Case(target, dtype, lse, *shape)
    for lse in (False, True)
    for target, limit in LIMITS.items()
    for shape in SHAPES
    for dtype in ("bf16", "fp16")
    if shape[0] * shape[2] < 3000 or limit != SMALLEST_SHARED
]
CASES = sample(EVERY_CASE, 17)


def build(case: Case) -> Build:
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[case.dtype]
    packed = torch.zeros(1, case.keys, 3, case.heads, case.head_dim, dtype=dtype)
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    matrix, vector = torch.zeros(case.heads, case.heads), torch.zeros(case.heads)
    pre = (matrix, vector) if case.pre_mix else (None, None)
    recorder, others = Recorder(whole.whole_rows_kernel), Recorder(folding.fold_kernel)
    lse = torch.zeros(1, case.heads, case.keys) if case.lse else None
    with (
        mock.patch.object(whole, "whole_rows_kernel", recorder),
        mock.patch.object(folding, "fold_kernel", others),
        mock.patch.object(launching, "pad_kernel", others),
    ):
        post = Post(matrix, vector, None, None, None, None, 0.0, 1.0)
        whole.whole_rows(q, k, v, *pre, post, 1.0, LIMITS[case.target], centred=False, lse=lse)
    arguments = recorder.arguments
    warps = arguments.pop("num_warps")
    constants = {"PLAN": arguments.pop("PLAN")}
    if lse is None:
        constants["lse"] = arguments.pop("lse")
    return Build(recorder.kernel, case.target, {n: type_of(a) for n, a in arguments.items()}, constants, warps, 3)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_kernel_fits_the_gpu(case, reports):
    report = reports[case]
    if not isinstance(report, str):
        assert report.spilled <= SPILLED
        report = report._replace(spilled=0)
    assert_fits(report, case.target, tensor_cores=True, shared=LIMITS[case.target])
