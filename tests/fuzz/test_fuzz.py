"""A short run of the fuzzer: the same cases of every operator each time, with every instruction set of this CPU."""

from __future__ import annotations

import sys

import pytest

from fastvit import backends
from tests.fuzz.cases import OPERATORS
from tests.fuzz.workers import hunt
from tests.helpers import ISAS, skip_without

SEEDS = range(12)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="guard pages and limits of memory are Linux's")


@pytest.mark.parametrize("isa", ["none"] if backends.cpp_reasons() else ISAS)
def test_random_calls(isa: str) -> None:
    if isa != "none":
        skip_without(isa)
    findings = [finding for finding in hunt([(op, seed) for op in OPERATORS for seed in SEEDS], isa) if finding]
    assert not findings, "\n\n".join(f"{f.kind}: {f.detail}\n{f.case}\n{f.replay}" for f in findings)
