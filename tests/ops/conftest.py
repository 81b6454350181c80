"""What the tests of the C++ operators share: every instruction set they are built for, one after the other."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.helpers import ISAS, skip_without
from tests.standalone.program import Program


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once with each instruction set; skips those that the CPU or the build lacks.

    One that FASTVIT_TEST_EMULATED names is that of a program in place of the extension.
    """
    if request.param == os.environ.get("FASTVIT_TEST_EMULATED"):
        with Program(request.param).in_place_of_the_extension():
            yield request.param
        return
    skip_without(request.param)
    from fastvit import _C

    before = _C.cpu_info()["in_use"]
    _C._set_cpu_capability(request.param)
    yield request.param
    _C._set_cpu_capability(before)
