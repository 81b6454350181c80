"""The C++ operators without torch, and with instruction sets that this CPU lacks, are as accurate as the extension."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch

from fastvit import backends, ops
from fastvit.reference import functional
from tests.fuzz.cases import ACTIVATIONS, OPERATORS
from tests.fuzz.workers import hunt
from tests.helpers import assert_as_accurate
from tests.standalone.program import TARGETS, Program

SEEDS = range(12)

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="guard pages and emulators of user programs are Linux's"),
    pytest.mark.skipif(bool(backends.cpp_reasons()), reason="; ".join(backends.cpp_reasons())),
]


@pytest.fixture(scope="module", params=TARGETS)
def target(request: pytest.FixtureRequest) -> str:
    if reason := TARGETS[request.param].missing():
        pytest.skip(reason)
    return request.param


@pytest.fixture
def program(target: str) -> Iterator[None]:
    with Program(target).in_place_of_the_extension():
        yield


def test_random_calls(target: str) -> None:
    findings = [finding for finding in hunt([(op, seed) for op in OPERATORS for seed in SEEDS], target) if finding]
    assert not findings, "\n\n".join(f"{f.kind}: {f.detail}\n{f.case}\n{f.replay}" for f in findings)


@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("program")
def test_activations_over_their_range(activation: str, dtype: torch.dtype) -> None:
    x = torch.cat((torch.linspace(-20, 20, 20_001), torch.linspace(-0.01, 0.01, 501), torch.tensor([0.0, -0.0, 1e4])))
    x, one = x.to(dtype)[:, None], torch.ones(1, 1, dtype=dtype)
    exact = functional.linear(x.double(), one.double(), activation=activation)
    plain = functional.linear(x, one, activation=activation)
    assert_as_accurate(ops.linear(x, one, activation=activation, backend="cpp"), plain, exact)


@pytest.mark.usefixtures("program")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_value_comes_through(dtype: torch.dtype) -> None:
    x = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)
    for columns in (1, 16):  # by parts of a vector, and by whole ones
        rows = x.reshape(-1, columns)
        got = ops.linear(rows, torch.eye(columns, dtype=dtype), backend="cpp")
        finite = rows.isfinite().all(1)
        assert torch.equal(got[finite], rows[finite])
        alone = ops.linear(x[:, None], torch.ones(1, 1, dtype=dtype), backend="cpp")[:, 0]
        assert torch.equal(alone.isnan(), x.isnan())
        assert torch.equal(alone[~x.isnan()], x[~x.isnan()])


@pytest.mark.usefixtures("program")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_are_rounded_to_nearest_even(dtype: torch.dtype) -> None:
    x, factor = torch.randn(4096, 1, dtype=dtype), torch.randn(16, 1, dtype=dtype)
    x[::7] *= 2.0 ** torch.randint(-20, 12, (x[::7].numel(), 1))
    factor[::5] = 1.5  # ties
    exact = x.float() * factor.float()[:, 0]  # products of two such have few enough digits
    assert torch.equal(ops.linear(x, factor, backend="cpp"), exact.to(dtype))
