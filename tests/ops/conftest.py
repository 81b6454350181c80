"""What the tests of the C++ operators share: every instruction set they are built for, one after the other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers import ISAS, skip_without


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once with each instruction set; skips those that the CPU or the build lacks."""
    skip_without(request.param)
    from fastvit import _C

    before = _C.cpu_info()["in_use"]
    _C._set_cpu_capability(request.param)
    yield request.param
    _C._set_cpu_capability(before)
