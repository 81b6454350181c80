"""No map of N x N attention weights is kept for the backward: what is kept grows as the number of tokens does."""

from __future__ import annotations

import pytest
import torch

from fastvit import backends
from fastvit.patching import patch
from tests.tiny import FAMILIES, build
from tests.training.saved import kept_bytes

pytestmark = pytest.mark.skipif(bool(backends.cpp_reasons()), reason="; ".join(backends.cpp_reasons()))

SIZES = (128, 256)
"""Four times the tokens."""


@pytest.mark.parametrize("name", FAMILIES)
def test_memory_grows_as_the_tokens_do(name):
    grown = {}
    for way in ("plain", "patched"):
        bytes_ = []
        for size in SIZES:
            model = build(name, img_size=size).train()
            bytes_.append(kept_bytes(patch(model) if way == "patched" else model, torch.randn(1, 3, size, size)))
        grown[way] = bytes_[1] / bytes_[0]
    assert grown["patched"] < 4.1
    assert grown["plain"] > 4.4  # what is counted would show


def test_what_a_context_holds_is_counted():
    class Holding(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.held = {"map": x.new_ones(100, 100)}
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            return gradient * 2

    class Model(torch.nn.Module):
        def forward(self, x):
            return Holding.apply(x)

    assert kept_bytes(Model(), torch.randn(3, requires_grad=True)) == 40_000
