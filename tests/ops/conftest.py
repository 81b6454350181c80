"""What the tests of the C++ operators share: every instruction set they are built for, one after the other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fastvit import backends

ISAS = ("portable", "avx2", "avx512", "avx512_bf16")


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once with each instruction set; skips those that the CPU or the build lacks."""
    if reasons := backends.cpp_reasons():
        pytest.skip("; ".join(reasons))
    from fastvit import _C

    if request.param not in backends.extension().info["isa_levels"]:
        pytest.skip(f"the C++ kernels were built without {request.param}")
    if request.param not in _C.cpu_info()["supported"]:
        pytest.skip(f"this CPU has no {request.param}")
    before = _C.cpu_info()["in_use"]
    _C._set_cpu_capability(request.param)
    yield request.param
    _C._set_cpu_capability(before)
