"""The newcomer's walk, in each way of installing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests import walk
from tests.test_build import CXX

pytestmark = [
    pytest.mark.build,
    pytest.mark.skipif(sys.platform != "linux", reason="the build is tested on Linux"),
]


@pytest.mark.parametrize("way", walk.WAYS)
def test_a_newcomer_gets_through(way: str, tmp_path: Path) -> None:
    if way in ("compiled", "editable") and CXX is None:
        pytest.skip("no C++ compiler on PATH")
    found = walk.walk(way, tmp_path)
    assert {"own", "ours"} <= set(found["models"])
