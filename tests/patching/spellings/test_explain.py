"""explain tells which chain was seen, and at which line of the user's code one broke off."""

from __future__ import annotations

import inspect
import json

import torch

from fastvit.patching import explain, patch
from fastvit.patching.deferral import Undecided
from tests.patching.spellings.modules import MASKED, SPELLINGS, Heads, Operators


class Floored(Heads):
    def weigh(self, q, k, v):
        attn = q @ k.mT * self.scale
        attn = attn.clamp(min=-1.0)
        return attn.softmax(-1) @ v


def test_the_chain_and_its_operator():
    module, x = Operators().eval(), torch.randn(2, 9, 24)
    patch(module, example=x)
    told = explain(module, x)
    assert [(row.name, row.op, row.backend) for row in told.rows] == [("", MASKED, told.rows[0].backend)]
    (chain,) = told.chains
    assert (chain.name, chain.chain, chain.op, chain.reason) == ("", "q@k^T, *c, softmax, @v", MASKED, "")
    assert f"(the model itself): q@k^T, *c, softmax, @v -> {MASKED}" in str(told)
    assert json.loads(told.to_json())["chains"][0]["op"] == MASKED


def test_mixes_are_told_by_name():
    spelling = SPELLINGS["ReAttention"]
    module, x = spelling.cls().eval(), torch.randn(spelling.shape)
    patch(module, example=x)
    (chain,) = explain(module, x).chains
    assert chain.chain == "q@k^T, *c, softmax, conv2d 1x1 over heads, BatchNorm over heads, *c, @v"


def test_where_a_chain_broke_off():
    source, first = inspect.getsourcelines(Floored.weigh)
    line = first + next(number for number, text in enumerate(source) if "clamp" in text)
    model, x = torch.nn.Sequential(Floored(), Operators()).eval(), torch.randn(2, 9, 24)
    told = explain(model, x)
    assert [chain.op for chain in told.chains] == [None, None]
    assert "masked_attention would take it" in told.chains[1].reason
    patch(model, example=x)
    broken, taken = explain(model, x).chains
    assert (broken.name, broken.chain, broken.op) == ("0", "q@k^T, *c", None)
    assert "clamp" in broken.reason
    assert broken.line == f"{__file__}:{line}"
    assert (taken.name, taken.op) == ("1", MASKED)


def test_it_decides_nothing():
    model, x = torch.nn.Sequential(Operators()).eval(), torch.randn(2, 9, 24)
    patch(model)
    assert "would take it" in explain(model, x).chains[0].reason
    assert isinstance(model, Undecided)
