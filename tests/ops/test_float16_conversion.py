"""Conversions of float16 in the C++ kernels: every value, and every place where rounding turns."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.helpers import skip_without
from tests.standalone.program import build_rules

CSRC = Path(__file__).resolve().parents[2] / "csrc"
CXX = shutil.which("c++") or shutil.which("g++")
SOURCE = r"""
#include "common/vec.h"

using namespace fastvit::FASTVIT_ISA;

// Whole vectors, and the last by parts and one by one.
extern "C" void widen_all(const uint16_t* from, float* to, int64_t count) {
  const f16* in = reinterpret_cast<const f16*>(from);
  int64_t i = 0;
  for (; i + 3 * kLanes <= count; i += kLanes) Vec::load(in + i).store(to + i);
  for (; i + kLanes <= count; i += kLanes - 1) Vec::load(in + i, kLanes - 1).store(to + i, kLanes - 1);
  for (; i < count; ++i) to[i] = widen(in[i]);
}

extern "C" void narrow_all(const float* from, uint16_t* to, int64_t count) {
  f16* out = reinterpret_cast<f16*>(to);
  int64_t i = 0;
  for (; i + 3 * kLanes <= count; i += kLanes) Vec::load(from + i).store(out + i);
  for (; i < count; i += kLanes - 1) {
    const int64_t n = count - i < kLanes - 1 ? count - i : kLanes - 1;
    Vec::load(from + i, n).store(out + i, n);
  }
}

extern "C" void round_all(float* values, int64_t count) {
  for (int64_t i = 0; i + kLanes <= count; i += kLanes) round_to<f16>(Vec::load(values + i)).store(values + i);
}
"""


@pytest.fixture(scope="module", params=("portable", "avx2", "avx512", "neon"))
def run(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, Tensor, Tensor], None]:
    """Calls one of the functions above, compiled for an instruction set, with what it reads and what it writes."""
    skip_without(request.param)
    if CXX is None:
        pytest.skip("needs a C++ compiler")
    folder = tmp_path_factory.mktemp("float16")
    (folder / "conversions.cpp").write_text(SOURCE, encoding="utf-8")
    library = folder / "conversions.so"
    flags = ["-std=c++20", "-O2", "-fPIC", "-shared", f"-I{CSRC}", f"-DFASTVIT_ISA={request.param}"]
    command = [
        CXX,
        *flags,
        *build_rules().ISA_FLAGS[request.param],
        str(folder / "conversions.cpp"),
        "-o",
        str(library),
    ]
    subprocess.run(command, check=True)
    loaded = ctypes.CDLL(str(library))

    def call(name: str, *tensors: Tensor) -> None:
        pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors)
        getattr(loaded, name)(*pointers, ctypes.c_int64(tensors[0].numel()))

    return call


def every() -> Tensor:
    """All 65,536 values, as bits."""
    return torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)


def assert_same(got: Tensor, expected: Tensor) -> None:
    """The same bits, except that a NaN may be any."""
    kind = {2: torch.int16, 4: torch.int32}[got.itemsize]
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.view(kind)[~got.isnan()], expected.view(kind)[~got.isnan()])


@pytest.mark.parametrize("flush", [False, True])
def test_widens_every_value(run, flush):
    bits, got = every(), torch.full((65536,), torch.nan)
    expected = bits.view(torch.float16).double().float()
    torch.set_flush_denormal(flush)
    try:
        run("widen_all", bits, got)
    finally:
        torch.set_flush_denormal(False)
    assert_same(got, expected)


def test_narrows_to_nearest_even(run):
    """Every value, the middles between neighbours, what is next to those, and what is beyond the range."""
    values = every().view(torch.float16).double()
    values = values[values.isfinite()].unique()
    middles = (values[1:] + values[:-1]) / 2
    places = torch.cat((values, middles, torch.tensor([65519.99, 65520.0, 65520.01, 7e4, 1e30, 3.4e38, 1e-40, 2e-8])))
    places = torch.cat((places, -places)).float()
    up, down = (torch.nextafter(places, torch.tensor(limit)) for limit in (torch.inf, -torch.inf))
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0])
    wide = torch.cat((places, up, down, special, torch.randn(10_000) * 10.0 ** torch.randint(-9, 5, (10_000,))))
    got = torch.zeros(wide.numel(), dtype=torch.int16)
    run("narrow_all", wide, got)
    expected = wide.half()
    assert_same(got.view(torch.float16), expected)
    rounded = wide[: wide.numel() // 16 * 16].clone()
    run("round_all", rounded)
    assert_same(rounded, expected[: rounded.numel()].float())
