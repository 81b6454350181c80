"""Thirty steps of training: a patched model strays from the float64 trajectory no farther than the plain one does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastvit import accuracy
from fastvit.patching import patch
from tests.tiny import build
from tests.training.steps import SEVEN, copies, train, with_dropouts

STEPS = 30
DRAWS = 4
"""At most: how far rounding leads astray is in few directions, so that one draw is much a matter of luck."""
WITH_STATISTICS = ("deepvit", "cvt", "ceit")


def squares(one: Tensor, other: Tensor) -> float:
    return float((one - other).square().sum())


@pytest.mark.parametrize("drops", [0.0, 0.2], ids=["", "dropout"])
@pytest.mark.parametrize("name", SEVEN)
def test_parameters_and_statistics(name, drops):
    strayed = {"parameters": [0.0, 0.0], "statistics": [0.0, 0.0]}
    for _ in range(DRAWS):
        plain, fused, exact = copies(with_dropouts(build(name), drops), 3)
        patch(fused)
        oracle = train(exact, name, STEPS, torch.float64)
        assert sum(oracle.losses[-4:]) < sum(oracle.losses[:4])  # it goes somewhere
        expected, got = train(plain, name, STEPS), train(fused, name, STEPS)
        assert got.batches_counted == expected.batches_counted == oracle.batches_counted
        assert bool(got.batches_counted) == (name in WITH_STATISTICS) == bool(oracle.statistics.numel())
        assert set(got.batches_counted) <= {STEPS}
        for what, sums in strayed.items():
            for index, each in enumerate((got, expected)):
                sums[index] += squares(getattr(each, what), getattr(oracle, what))
        # The losses are of the same run, not of one that happens to end as near.
        torch.testing.assert_close(torch.tensor(got.losses), torch.tensor(oracle.losses).float(), rtol=1e-3, atol=1e-4)
        if all(one <= accuracy.FACTOR**2 * other for one, other in strayed.values()):
            return
    raise AssertionError({what: [value**0.5 for value in sums] for what, sums in strayed.items()})


def test_dropouts_do_drop():
    """The test above would hold if they did not."""
    kept, dropped = build("cait"), with_dropouts(build("cait"), 0.2)
    dropped.load_state_dict(kept.state_dict())
    assert train(patch(kept), "cait", 2).losses[0] != train(patch(dropped), "cait", 2).losses[0]
