"""Classes of one's own, told to ``patch`` by ``register``."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from fastvit import ops
from fastvit.patching import explain, is_patched, patch, report, unpatch
from fastvit.patching.fusion import Fused
from fastvit.patching.matching import recognise, supported
from fastvit.patching.register import REGISTERED, register, unregister
from tests.helpers import assert_as_accurate


class Mine(nn.Module):
    def __init__(self, dim: int = 16, heads: int = 2):
        super().__init__()
        self.heads, self.drop = heads, nn.Dropout(0.0)
        self.into, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.into(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        maps = self.drop((q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1))
        return self.out((maps @ v).transpose(1, 2).flatten(2))


class FusedMine(Fused):
    def forward(self, x: Tensor) -> Tensor:
        out = ops.masked_attention(*self.split(x), dropout_p=self.drop.p, backend=self.fastvit_backend)
        return self.out(out.transpose(1, 2).flatten(2))


@pytest.fixture(autouse=True)
def _registered():
    register(Mine, op="masked_attention", reads={"drop": nn.Dropout})(FusedMine)
    yield
    REGISTERED.pop(Mine, None)


def test_a_registered_class_is_fused_reported_and_undone():
    model, x = nn.Sequential(Mine(), nn.Linear(16, 4)), torch.randn(2, 5, 16)
    with torch.no_grad():
        oracle = copy.deepcopy(model).double()(x.double())
        expected = model(x)
        patch(model, strict=True, verify=x)
        assert_as_accurate(model(x), expected, oracle)
        (row,) = report(model).rows
        assert (row.name, row.cls, row.op, row.status) == ("0", "Mine", "masked_attention", "patched")
        assert [call.backend for call in explain(model, x).rows] in (["cpp"], ["sdpa"])
        clone = pickle.loads(pickle.dumps(model))
        assert isinstance(clone[0], Mine) and is_patched(clone)
        assert torch.equal(unpatch(model)(x), expected)
    assert f"{__name__}.Mine" in supported()


def test_subclasses_are_fused_unless_they_override():
    class Named(Mine):
        pass

    class Other(Mine):
        def forward(self, x: Tensor) -> Tensor:
            return self.out(x)

    assert recognise(Named()).reasons == []
    assert recognise(Other()).reasons == ["Other overrides forward"]


def test_what_it_reads_must_be_plain():
    block = Mine()
    block.drop = nn.AlphaDropout(0.1)
    assert recognise(block).reasons == ["drop is AlphaDropout, expected is exactly Dropout"]
    block = patch(Mine())
    called: list[int] = []
    block.drop.register_forward_hook(lambda *_: called.append(1))
    block(torch.randn(1, 3, 16))
    assert called == [1]


def test_a_check_of_ones_own():
    register(Mine, op="masked_attention", check=lambda block: ["one head"] if block.heads == 1 else [])(FusedMine)
    assert recognise(Mine(heads=1)).reasons == ["one head"]
    assert recognise(Mine(heads=2)).reasons == []


def test_verify_holds_wrong_methods_to_account():
    class Wrong(Fused):
        def forward(self, x: Tensor) -> Tensor:
            return self.out(ops.masked_attention(*self.split(x), scale=1.0).transpose(1, 2).flatten(2))

    register(Mine, op="masked_attention")(Wrong)
    block = Mine()
    with pytest.raises(RuntimeError, match="verify: less accurate"):
        patch(block, verify=torch.randn(2, 5, 16))
    assert type(block) is Mine


def test_unregister():
    unregister(Mine)
    assert recognise(Mine()) is None
    with pytest.raises(ValueError, match=r"cls: expected one of \[.*got "):
        unregister(Mine)


def test_bad_use():
    with pytest.raises(TypeError, match="cls: expected a subclass of torch.nn.Module, got 'Mine'"):
        register("Mine", op="masked_attention")
    with pytest.raises(
        ValueError, match=r"op: expected one of \[.*'head_mixed_attention', .*'masked_attention'.*got 'attention"
    ):
        register(Mine, op="attention")
    with pytest.raises(TypeError, match=r"derived from fastvit.Fused, got <function"):
        register(Mine, op="masked_attention")(lambda x: x)

    class Misspelt(Fused):
        def forwards(self, x: Tensor) -> Tensor:
            return x

    class Empty(Fused):
        pass

    with pytest.raises(ValueError, match=r"Misspelt: expected methods of Mine, got \['forwards'\]"):
        register(Mine, op="masked_attention")(Misspelt)
    with pytest.raises(ValueError, match="Empty: expected methods of Mine, got none"):
        register(Mine, op="masked_attention")(Empty)
    assert REGISTERED[Mine].override is FusedMine
