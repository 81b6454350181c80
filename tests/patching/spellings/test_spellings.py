"""Every spelling is computed by the operator named, as accurately as it is written, and is as before once unpatched."""

from __future__ import annotations

import copy

import pytest
import torch

from fastvit.patching import patch, report, unpatch
from tests.helpers import assert_as_accurate, on_pooled_draws
from tests.patching.fused_and_plain import joined
from tests.patching.spellings.calls import gradients, in_float64, operators_in
from tests.patching.spellings.modules import SPELLINGS

TORCH_S_OWN = ("Multihead",)
"""Those whose plain path at inference is not the one that is watched: torch has a kernel of its own for them."""


def test_there_are_enough():
    assert len(SPELLINGS) >= 60


@pytest.fixture
def x(spelling) -> torch.Tensor:
    torch.manual_seed(3)
    return torch.randn(spelling.shape)


def test_inference(spelling, module, x):
    with torch.no_grad():
        expected, exact = module(x), in_float64(module)(x.double())
        state = {name: tensor.data_ptr() for name, tensor in module.state_dict().items()}
        patch(module, example=x)
        got, ran = operators_in(lambda: module(x))
        assert ran == [spelling.operator]
        assert_as_accurate(got, expected, exact)
        assert {name: tensor.data_ptr() for name, tensor in module.state_dict().items()} == state
        assert [row.op for row in report(module).rows if row.status == "patched"] == [spelling.operator]
        after, ran = operators_in(lambda: unpatch(module)(x))
    assert ran == []
    assert torch.equal(after, expected)
    assert type(module) is spelling.cls


def test_gradients(spelling, module, x):
    plain, double = copy.deepcopy(module), in_float64(module)
    patch(module, example=x)
    gradients(module, x)  # the first call of a kind with gradients is watched

    def check() -> None:
        x = torch.randn(spelling.shape)
        exact_out, exact = gradients(double, x.double())
        expected_out, expected = gradients(plain, x)
        (got_out, got), ran = operators_in(lambda: gradients(module, x))
        assert ran == [spelling.operator]
        assert got.keys() == exact.keys()
        assert_as_accurate(got_out, expected_out, exact_out)
        right = joined(exact, exact)
        assert_as_accurate(joined(got, exact).float(), joined(expected, exact).float(), right, name="gradients")

    on_pooled_draws(check)


def test_the_first_call_decides_and_computes_as_written(spelling, module, x):
    with torch.no_grad():
        expected = module(x)
        patch(module)
        first, ran = operators_in(lambda: module(x))
        assert ran == []
        if not spelling.cls.__name__.startswith(TORCH_S_OWN):
            assert torch.equal(first, expected)
        _, ran = operators_in(lambda: module(x))
        assert ran == [spelling.operator]
        assert torch.equal(unpatch(module)(x), expected)
    assert type(module) is spelling.cls


def test_training_moves_running_statistics_once():
    spelling = SPELLINGS["ReAttention"]
    module = spelling.cls().train()
    plain, double = copy.deepcopy(module), in_float64(module)
    patch(module, example=torch.randn(spelling.shape))

    def check() -> None:
        x = torch.randn(spelling.shape)
        _, exact = gradients(double, x.double())
        _, expected = gradients(plain, x)
        (_, got), ran = operators_in(lambda: gradients(module, x))
        assert ran in ([spelling.operator], [])  # watched at first
        right = joined(exact, exact)
        assert_as_accurate(joined(got, exact).float(), joined(expected, exact).float(), right, name="gradients")
        assert module.norm.num_batches_tracked == plain.norm.num_batches_tracked
        for statistic in ("running_mean", "running_var"):
            assert_as_accurate(*(getattr(model.norm, statistic) for model in (module, plain, double)), name=statistic)

    on_pooled_draws(check)
    assert operators_in(lambda: module(torch.randn(spelling.shape)))[1] == [spelling.operator]
