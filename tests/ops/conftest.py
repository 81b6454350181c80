"""What the tests of the C++ operators share: every instruction set this CPU has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fastvit import backends


def supported_isas() -> list[str]:
    if backends.cpp_reasons():
        return []
    from fastvit import _C

    return list(_C.cpu_info()["supported"])


@pytest.fixture(params=supported_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once with each instruction set this CPU has."""
    from fastvit import _C

    before = _C.cpu_info()["in_use"]
    _C._set_cpu_capability(request.param)
    yield request.param
    _C._set_cpu_capability(before)
