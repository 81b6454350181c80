"""Gluon in Triton's interpreter, which knows Triton alone: layouts are left out, shared memory is an array.

A layout says where numbers lie, not what they are; that conversions are of the kinds that are meant is what compiling
checks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import ampere
from triton.runtime.interpreter import TensorHandle


class Shared:
    """A piece of shared memory: NaN until it is written."""

    def __init__(self, dtype: Any, data: np.ndarray) -> None:
        self.dtype, self.data = dtype, data

    def index(self, i: int) -> Shared:
        return Shared(self.dtype, self.data[i])

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        assert start + length <= self.data.shape[dim], "a slice beyond the end"
        return Shared(self.dtype, self.data[(slice(None),) * dim + (slice(start, start + length),)])

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.dtype, self.data.transpose(order))

    def store(self, value: Any) -> None:
        assert value.dtype == self.dtype and value.handle.data.shape == self.data.shape
        self.data[...] = value.handle.data

    def load(self, layout: Any) -> Any:
        shape = list(self.data.shape)
        return tl.core.tensor(TensorHandle(self.data.copy(), self.dtype), tl.core.block_type(self.dtype, shape))


def allocate(dtype: Any, shape: list[int], layout: Any, value: Any = None) -> Shared:
    nan = {tl.float32: np.float32("nan"), tl.float16: np.float16("nan"), tl.bfloat16: np.uint16(0x7FC0)}[dtype]
    found = Shared(dtype, np.full(shape, nan))
    if value is not None:
        found.store(value)
    return found


def assembly(asm: Any, constraints: str, args: list[Any], dtype: Any, is_pure: bool, pack: int) -> Any:
    """The instructions that our kernels ask for by name."""
    name = getattr(asm, "value", asm).split()[0]
    if name == "cvt.rn.f16x2.f32":
        return args[0].to(dtype)
    assert name == "fma.rn.f16x2", f"unknown instruction {name}"
    exact = (args[0].to(tl.float32) * args[1].to(tl.float32)) + args[2].to(tl.float32)
    return exact.to(dtype)


def install() -> None:
    """Before a module with kernels in Gluon is imported."""
    gluon.jit = triton.jit
    gl.static_range = range
    gl.arange = lambda start, end, layout=None: tl.arange(start, end)
    gl.full = lambda shape, value, dtype, layout=None: tl.full(shape, value, dtype)
    gl.convert_layout = lambda value, layout, assert_trivial=False: value
    gl.allocate_shared_memory = allocate
    gl.inline_asm_elementwise = assembly
    ampere.mma_v2 = lambda a, b, acc: tl.dot(a, b, acc)
    for name in "exp2 log2 sum max join split reshape permute expand_dims where broadcast".split():
        setattr(gl, name, _through(name))
    for name in ("minimum", "maximum", "program_id", "cdiv"):
        setattr(gl, name, _through(name))


def _through(name: str) -> Any:
    # Looked up at each call: the interpreter replaces tl's functions at each launch.
    return lambda *arguments, **options: getattr(tl, name)(*arguments, **options)
