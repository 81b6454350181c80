"""The configurations of head-mixed attention, compiled ahead of time for three GPUs with the arguments of launches."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed: nothing to compile")

from fastvit.kernels import head_mixed_attention as forward
from fastvit.kernels import head_mixed_attention_backward as backward
from fastvit.kernels import head_mixed_attention_launch as launching
from fastvit.kernels import head_mixed_attention_moments as moments
from fastvit.kernels.head_mixed_attention_configs import (
    AMD_SHARED,
    HEAVY,
    LARGE_SHARED,
    LIGHT,
    NORMED,
    SMALLEST_SHARED,
    Config,
    configurations,
)

from tests.kernels.aot import Build, assert_fits, sample

pytestmark = pytest.mark.slow

KERNELS = {
    "row_statistics": (launching, "row_statistics_kernel"),
    "head_mixed_attention": (forward, "head_mixed_attention_kernel"),
    "row_gradients": (backward, "row_gradients_kernel"),
    "query_gradients": (backward, "query_gradients_kernel"),
    "key_gradients": (backward, "key_gradients_kernel"),
    "value_gradients": (backward, "value_gradients_kernel"),
    "head_map_moments": (moments, "head_map_moments_kernel"),
}
LIMITS = {"sm_80": SMALLEST_SHARED, "sm_90": LARGE_SHARED, "gfx942": AMD_SHARED}
"""The shared memory whose configurations are compiled for a GPU; sm_80 also covers sm_86 and sm_89."""

TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.uint8: "u8"}


class Case(NamedTuple):
    kernel: str
    target: str
    dtype: str
    product: str
    heads: int
    head_dim: int
    pressure: int
    config: Config

    def __str__(self) -> str:
        tile = "x".join(map(str, self.config[:4]))
        return "-".join((*self[:4], f"{self.heads}x{self.head_dim}", str(self.pressure), tile))


class Recorder:
    """Replaces a kernel and records the arguments of its launch."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.arguments = kernel, {}

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self

    def __call__(self, *arguments: Any, **options: Any) -> None:
        self.arguments = dict(zip(self.kernel.arg_names, arguments, strict=False)) | options


def type_of(value: Any) -> Any:
    """The Triton type of an argument in a launch; batches are assumed to be large, so that no stride is 1."""
    if isinstance(value, tuple):
        return type(value)(*map(type_of, value))
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}:16"
    if isinstance(value, float):
        return "fp32"
    return None if value is None else "i32:16" if value % 16 == 0 else "i32"


@contextlib.contextmanager
def recording(case: Case) -> Iterator[dict[str, Recorder]]:
    """Record every kernel's launches with the case's configuration and settings."""
    recorders = {name: Recorder(getattr(*place)) for name, place in KERNELS.items()}
    hip = "6" if case.target == "gfx942" else None
    with contextlib.ExitStack() as stack:
        for name, (module, attribute) in KERNELS.items():
            stack.enter_context(mock.patch.object(module, attribute, recorders[name]))
        stack.enter_context(mock.patch.object(launching, "pad_kernel", Recorder(launching.pad_kernel)))
        stack.enter_context(mock.patch.object(launching, "configurations", return_value=(case.config,)))
        stack.enter_context(mock.patch.object(torch.version, "hip", hip))
        stack.enter_context(mock.patch.object(launching, "product_kind", return_value=case.product))
        yield recorders


def build(case: Case) -> Build:
    """The launch with the highest register pressure of its class."""
    dtype = {name: dtype for dtype, name in TYPES.items()}[case.dtype]
    q = torch.zeros(1, case.heads, 3, case.head_dim, dtype=dtype)
    matrix, vector = torch.zeros(case.heads, case.heads), torch.zeros(case.heads)
    pre = (None, None) if case.pressure == NORMED else (matrix, vector)
    norm = (None, None) if case.pressure == LIGHT else (vector, vector)
    mask = torch.ones((1, case.heads, 3, 3) if case.pressure == HEAVY else (1, 1, 1, 3), dtype=torch.bool)
    settings = (*pre, matrix, vector, *norm, 1e-5, case.pressure != LIGHT, 1.0, False, mask, 1.0)
    with recording(case) as recorders:
        if case.kernel == "head_map_moments":
            moments.head_map_moments(q, q, *pre, mask, 1.0)
        elif case.kernel in ("head_mixed_attention", "row_statistics"):
            forward.head_mixed_attention_forward(q, q, q, *settings[:6], None, None, *settings[6:])
        else:
            backward.head_mixed_attention_backward(q, q, q, q, *settings)
    kernel, arguments = recorders[case.kernel].kernel, recorders[case.kernel].arguments
    options = [arguments.pop(name, None) for name in ("num_warps", "num_stages", "maxnreg")]
    constants = {name: value for name, value in arguments.items() if value is None or name.isupper()}
    types = {name: type_of(value) for name, value in arguments.items() if name not in constants}
    return Build(kernel, case.target, types, constants, *options)


SHAPES = [(12, 64), (32, 64), (12, 128), (32, 128)]
"""Heads and head dimensions: the largest that an entry of the table is for."""

MORE_SHAPES = [(12, 33), (12, 48), (4, 64), (12, 32)]
"""Those of models, which use the same entries."""


def cases() -> list[Case]:
    found = []
    for target, limit in LIMITS.items():
        for product, dtype in (("half", "bf16"), ("ieee", "fp32"), ("tf32", "fp32"), ("half", "fp16")):
            # float16 and bfloat16 differ in the instruction only.
            shapes = {"bf16": SHAPES + MORE_SHAPES, "fp32": SHAPES, "fp16": SHAPES[:1]}[dtype]
            for kernel, (heads, head_dim), pressure in itertools.product(KERNELS, shapes, (LIGHT, NORMED, HEAVY)):
                if kernel == "head_map_moments" and pressure == NORMED:  # moments have no norm
                    continue
                # NORMED has no pre-mix, so its row statistics are those of single heads.
                at_once = 1 if kernel == "row_statistics" and pressure == NORMED else heads
                table = configurations(kernel, at_once, head_dim, product, pressure, limit)
                found += [Case(kernel, target, dtype, product, heads, head_dim, pressure, config) for config in table]
    return found


EVERY_CASE = cases()
CASES = sample(EVERY_CASE, 101)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_configuration_fits_the_gpu(case, reports):
    tensor_cores = case.product != "ieee" and not case.config.exact
    assert_fits(reports[case], case.target, tensor_cores=tensor_cores, shared=LIMITS[case.target])


@pytest.mark.parametrize("heads", [1, 3, 4, 6, 8, 12, 16, 17, 32])
def test_every_call_has_a_configuration(heads):
    for kernel in KERNELS:
        for head_dim in (1, 16, 32, 33, 35, 48, 64, 65, 128):
            for product in ("half", "tf32", "ieee"):
                for limit in (AMD_SHARED, SMALLEST_SHARED, 227 * 1024):
                    for pressure in (LIGHT, NORMED, HEAVY):
                        assert configurations(kernel, heads, head_dim, product, pressure, limit)
