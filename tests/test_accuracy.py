"""The accuracy rule itself: what it allows, what it refuses, and what it makes of several tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from fastvit.accuracy import FACTOR, NONE, ULPS, deviation, is_accurate
from tests.helpers import assert_as_accurate, on_pooled_draws

EPS = torch.finfo(torch.float32).eps


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_twice_the_plain_error_and_a_few_ulp():
    exact, plain = double(1.0, 2.0), torch.tensor([1.0, 2.0 + 1e-4])
    assert is_accurate(torch.tensor([1.0, 2.0 + 1.9e-4]), plain, exact)
    assert not is_accurate(torch.tensor([1.0, 2.0 + 2.2e-4]), plain, exact)
    assert is_accurate(torch.tensor([1.0 + ULPS * EPS, 2.0]), exact.float(), exact)
    assert not is_accurate(torch.tensor([1.0, 2.0 + (2 * ULPS + 2) * EPS]), exact.float(), exact)


def test_a_cancelled_element_is_allowed_ulps_of_the_root_mean_square():
    exact = double(0.0, 1.0, 1.0, 1.0)
    assert is_accurate(torch.tensor([3 * EPS, 1.0, 1.0, 1.0]), exact.float(), exact)
    assert not is_accurate(torch.tensor([4 * EPS, 1.0, 1.0, 1.0]), exact.float(), exact)


def test_ulps_are_those_of_the_fused_dtype():
    exact = double(1.0)
    off = torch.tensor([1.0 + 2.0**-7], dtype=torch.bfloat16)
    assert is_accurate(off, exact.bfloat16(), exact)
    assert not is_accurate(off.float(), exact.float(), exact)


def test_the_worst_of_several_plain_results_counts():
    exact, fused = double(1.0, 1.0), torch.tensor([1.0, 1.0 + 1e-4])
    exactly, off = exact.float(), torch.tensor([1.0 + 0.9e-4, 1.0])
    assert not is_accurate(fused, exactly, exact)
    assert is_accurate(fused, [exactly, off], exact)
    assert deviation(fused, [exactly, off], exact).plain_error == pytest.approx(0.9e-4, rel=1e-2)


def test_infinities_and_nan_are_where_the_plain_form_has_them():
    exact = double(math.inf, math.nan, 1.0)
    assert is_accurate(exact.float(), exact.float(), exact)
    for wrong in (
        (1.0, math.nan, 1.0),
        (-math.inf, math.nan, 1.0),
        (math.inf, 0.0, 1.0),
        (math.inf, math.nan, math.inf),
    ):
        assert not is_accurate(torch.tensor(wrong), exact.float(), exact), wrong
    assert deviation(torch.tensor([math.inf, math.nan, math.nan]), exact.float(), exact).special == 1
    overflown = torch.tensor([math.inf, 1.0], dtype=torch.float16)
    assert is_accurate(overflown, overflown, double(1e5, 1.0))
    assert not is_accurate(torch.full((1,), math.nan), torch.zeros(1), double(0.0))


def test_infinities_and_nan_of_the_plain_form_alone_may_be_right_ones():
    """torch's GELU with AVX-512 gives NaN of infinity and infinity of 3e38."""
    plain, exact = torch.tensor([math.nan, math.inf, 1.0]), double(math.inf, 3e38, 1.0)
    assert is_accurate(exact.float(), plain, exact) and is_accurate(plain, plain, exact)
    assert deviation(torch.tensor([-math.inf, 2.9e38, 1.0]), plain, exact).special == 2
    assert deviation(torch.tensor([1.0, math.nan, 1.0]), plain, exact).special == 2


def test_what_is_measured():
    found = deviation(torch.tensor([1.0, 4.5]), torch.tensor([1.25, 4.0]), double(1.0, 4.0))
    assert found.fused == 0.125 and found.plain == 0.0625
    assert found.plain_error == 0.25 and found.worst == 1 and found.special == 0
    assert found.excess == pytest.approx(0.5 - ULPS * EPS * 4.0)
    assert found.is_accurate is (found.excess <= FACTOR * found.plain_error)


def test_pooled_tensors_are_judged_as_one():
    exact = double(1.0)
    off, exactly = torch.tensor([1.0 + 1e-4]), exact.float()
    lucky, usual = deviation(off, exactly, exact), deviation(exactly, off, exact)
    assert not lucky.is_accurate
    assert lucky.pooled(usual).is_accurate and usual.pooled(lucky).is_accurate
    assert NONE.pooled(usual) == usual
    assert not usual.pooled(NONE._replace(special=1)).is_accurate


def test_tensors_without_elements_are_accurate():
    assert deviation(torch.ones(0), torch.ones(0), double()) == NONE
    assert NONE.is_accurate


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"fused: expected the shape of exact, \(1,\), got \(2,\)"):
        deviation(torch.ones(2), torch.ones(1), double(1.0))
    with pytest.raises(ValueError, match=r"plain: expected the shape of exact, \(1,\), got \(3,\)"):
        deviation(torch.ones(1), [torch.ones(1), torch.ones(3)], double(1.0))
    with pytest.raises(ValueError, match="plain: expected a tensor or several of them, got an empty sequence"):
        deviation(torch.ones(1), [], double(1.0))


def test_a_draw_that_breaks_the_rule_is_pooled_with_more():
    """The plain form is exact by chance in the first draw; a wrong result breaks the rule in all of them together."""

    def check(plain_errors: Iterator[float], fused_error: float) -> Callable[[], None]:
        exact = double(1.0)

        def draw() -> None:
            plain = torch.tensor([1.0 + next(plain_errors)])
            assert_as_accurate(torch.tensor([1.0 + fused_error]), plain, exact)

        return draw

    errors = iter([0.0, 1e-4, 1e-4, 1e-4, 1e-4])
    on_pooled_draws(check(errors, 1e-4))
    assert len(list(errors)) == 3, "more draws than were needed"
    with pytest.raises(AssertionError, match="output: error .* over 4 draws"):
        on_pooled_draws(check(iter([0.0, 1e-4, 1e-4, 1e-4]), 3e-4))
    with pytest.raises(AssertionError, match="output: 1 infinities or NaN"):
        assert_as_accurate(torch.tensor([math.nan]), torch.ones(1), double(1.0))
