"""The spellings under ``torch.compile``: the operator named stands in the graph that Inductor's pass leaves."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch._inductor import config

from fastvit import backends
from fastvit.patching import patch, unpatch
from tests.helpers import assert_as_accurate, on_pooled_draws
from tests.patching.fused_and_plain import joined
from tests.patching.spellings.calls import gradients, in_float64
from tests.patching.spellings.compiling import compiled
from tests.patching.spellings.mlps import CONVOLUTION, MLPS
from tests.patching.spellings.modules import SPELLINGS

pytestmark = pytest.mark.skipif(bool(backends.cpp_reasons()), reason="kernels in C++ are not built")

NO_KERNEL = ("NormWithoutMix", *(name for name, spelling in MLPS.items() if spelling.operator != CONVOLUTION))
"""Those whose gradients no kernel computes; those of MLPs are the compiler's, which makes products of its own."""


@pytest.fixture(autouse=True)
def nothing_compiled_yet() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    assert config.pre_grad_custom_pass is None
    torch._dynamo.reset()


def with_dynamic_batch(x: torch.Tensor) -> torch.Tensor:
    torch._dynamo.mark_dynamic(x, 0)
    return x


def test_inference_of_any_batch(spelling, module):
    torch.manual_seed(3)
    one = spelling.shape[0] == 1  # a module whose biases are those of one image
    small = torch.randn(spelling.shape) if one else with_dynamic_batch(torch.randn(spelling.shape))
    large = torch.randn(1 if one else 3 * spelling.shape[0], *spelling.shape[1:])
    plain, double = copy.deepcopy(module), in_float64(module)
    run, passed = compiled(patch(module, example=small))
    with torch.no_grad():
        for x in (small, large):
            assert_as_accurate(run(x), plain(x), double(x.double()))
    assert passed.operators() == [spelling.operator]
    assert len(passed.graphs) == 1


@pytest.mark.parametrize("name", ["Windows", "ReAttention", "MultiheadModule"])
def test_unpatched(name):
    """Compiled anew, to the graph that the plain module has."""
    module, x = SPELLINGS[name].cls().eval(), torch.randn(SPELLINGS[name].shape)
    plain, _ = compiled(copy.deepcopy(module))
    run, passed = compiled(patch(module, example=x))
    with torch.no_grad():
        run(x)
        unpatch(module)
        torch.testing.assert_close(run(x), plain(x), rtol=0.0, atol=0.0, equal_nan=True)
    assert passed.operators() == [SPELLINGS[name].operator]
    assert len(passed.graphs) == 2


def test_gradients(spelling, module):
    plain, double = copy.deepcopy(module), in_float64(module)
    patch(module, example=torch.randn(spelling.shape))
    run, passed = compiled(module)

    def check() -> None:
        x = torch.randn(spelling.shape)
        exact_out, exact = gradients(double, x.double())
        expected_out, expected = gradients(plain, x)
        got_out, got = gradients(module, x, run)
        assert got.keys() == exact.keys()
        assert_as_accurate(got_out, expected_out, exact_out)
        right = joined(exact, exact)
        assert_as_accurate(joined(got, exact).float(), joined(expected, exact).float(), right, name="gradients")

    on_pooled_draws(check, 16)
    assert len(passed.graphs) == 1
    assert passed.operators() == ([] if spelling.cls.__name__ in NO_KERNEL else [spelling.operator])


def test_training_moves_running_statistics_once():
    spelling = SPELLINGS["ReAttention"]
    module = spelling.cls().train()
    plain, double = copy.deepcopy(module), in_float64(module)
    patch(module, example=torch.randn(spelling.shape))
    run, passed = compiled(module)

    def check() -> None:
        x = torch.randn(spelling.shape)
        _, exact = gradients(double, x.double())
        _, expected = gradients(plain, x)
        _, got = gradients(module, x, run)
        right = joined(exact, exact)
        assert_as_accurate(joined(got, exact).float(), joined(expected, exact).float(), right, name="gradients")
        assert module.norm.num_batches_tracked == plain.norm.num_batches_tracked
        for statistic in ("running_mean", "running_var"):
            assert_as_accurate(*(getattr(model.norm, statistic) for model in (module, plain, double)), name=statistic)

    on_pooled_draws(check)
    assert passed.operators() == [spelling.operator]


@pytest.mark.parametrize(("name", "train"), [("Windows", False), ("ClassAttention", False), ("ReAttention", True)])
def test_by_inductor(name, train):
    spelling = SPELLINGS[name]
    module = spelling.cls().train(train)
    plain, double = copy.deepcopy(module), in_float64(module)
    patch(module, example=torch.randn(spelling.shape))
    run = torch.compile(module, fullgraph=True)

    def check() -> None:
        x = torch.randn(spelling.shape)
        if train:
            (_, exact), (_, expected) = gradients(double, x.double()), gradients(plain, x)
            _, got = gradients(module, x, run)
            right = joined(exact, exact)
            assert_as_accurate(joined(got, exact).float(), joined(expected, exact).float(), right, name="gradients")
        else:
            with torch.no_grad():
                assert_as_accurate(run(x), plain(x), double(x.double()))

    on_pooled_draws(check)
    with torch.profiler.profile() as profile, torch.set_grad_enabled(train):
        run(torch.randn(spelling.shape))
    assert [event for event in profile.events() if event.name.startswith("fastvit::")]
