"""``freeze``: the same results from packed weights alone, ordinary weights for everybody who asks, and the way back."""

from __future__ import annotations

import copy
import gc
import importlib
import io
import weakref

import pytest
import torch
from torch import nn

import fastvit
from fastvit import backends
from fastvit.ops._packing import PackedWeight, release_memory
from tests.tiny import build, images

pytestmark = [
    pytest.mark.skipif(bool(backends.cpp_reasons()), reason="; ".join(backends.cpp_reasons())),
    pytest.mark.skipif(
        not backends.cpp_reasons() and importlib.import_module("fastvit._C").cpu_info()["in_use"] == "portable",
        reason="without vectors products are torch's, whose weights are not packed",
    ),
]

FAMILIES = ("vit", "deit", "deepvit", "cait", "cpvt", "cvt", "ceit")


@pytest.fixture(autouse=True)
def nothing_packed() -> None:
    release_memory()


def small(family: str = "vit", dtype: torch.dtype = torch.float32) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = fastvit.patch(build(family)).eval().to(dtype)
    return model, images(family, 2).to(dtype)


def frozen_weights(model: nn.Module) -> list[PackedWeight]:
    return [weight for weight in model.parameters() if type(weight) is PackedWeight]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_results_and_state_are_the_same_and_the_weights_are_gone(family, dtype):
    model, x = small(family, dtype)
    with torch.no_grad():
        expected = model(x)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before = {id(weight): weakref.ref(weight) for weight in model.parameters()}
    assert fastvit.freeze(model) is model
    gc.collect()
    gone = [ref for ref in before.values() if ref() is None]
    assert len(gone) == len(frozen_weights(model)) >= 2
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(type(value) is torch.Tensor and torch.equal(value, state[name]) for name, value in after.items())
    fastvit.unfreeze(model)
    assert not frozen_weights(model)
    assert all(type(weight) is nn.Parameter and weight.requires_grad for weight in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(x), expected)


def test_an_example_packs_the_weights():
    model, x = small()
    with pytest.raises(ValueError, match="model: none of its weights is packed; patch it, and run it"):
        fastvit.freeze(model)
    fastvit.freeze(model, (x,))
    assert frozen_weights(model)
    fastvit.freeze(model)  # once more changes nothing
    with pytest.raises(ValueError, match="model: expected eval mode"):
        fastvit.freeze(model.train())
    with pytest.raises(ValueError, match="none of its weights is packed"):
        fastvit.freeze(fastvit.unpatch(small()[0]), x)


def test_nothing_can_write_to_a_frozen_weight():
    model, x = small()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    fastvit.freeze(model, x)
    (weight, *_) = frozen_weights(model)
    for write in (lambda: weight.zero_(), lambda: weight.data.mul_(2.0), lambda: weight.copy_(weight + 1.0)):
        with torch.no_grad(), pytest.raises(RuntimeError, match=r"cannot be changed: fastvit\.unfreeze\(model\) first"):
            write()
    with pytest.raises(RuntimeError, match="cannot be changed"):
        model.load_state_dict(state)
    with torch.no_grad():  # reading is allowed, also into something else
        assert torch.equal(torch.zeros(weight.shape).copy_(weight), weight.unpacked())
        assert torch.equal(weight.t() @ weight, weight.unpacked().t() @ weight.unpacked())
    model.load_state_dict(state, assign=True)
    assert not frozen_weights(model)


def test_copies():
    model, x = small()
    with torch.no_grad():
        expected = model(x)
    fastvit.freeze(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    twin, loaded = copy.deepcopy(model), torch.load(buffer, weights_only=False)
    assert len(frozen_weights(twin)) == len(frozen_weights(model)) and not frozen_weights(loaded)
    states = io.BytesIO()
    torch.save(model.state_dict(), states)
    states.seek(0)
    plain = fastvit.unpatch(copy.deepcopy(model))
    assert not frozen_weights(plain)
    plain.load_state_dict(torch.load(states, weights_only=True))
    for other in (twin, loaded, fastvit.patch(plain)):
        with torch.no_grad():
            assert torch.equal(other(x), expected)


def test_another_dtype_gives_the_weights_back():
    model, x = small()
    expected = copy.deepcopy(model).double()(x.double())
    fastvit.freeze(model, x)
    assert torch.equal(model.double()(x.double()), expected)
    assert not frozen_weights(model)


def test_tied_and_shared_weights():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = small()[0]
            self.last = nn.Linear(1, 1)
            self.last.weight = self.model.blocks[0].mlp.fc1.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.model(x)

    model = Tied().eval()
    fastvit.freeze(model, images("vit", 2))
    assert type(model.last.weight) is PackedWeight
    assert model.last.weight is model.model.blocks[0].mlp.fc1.weight
    fastvit.unfreeze(model)
    assert model.last.weight is model.model.blocks[0].mlp.fc1.weight


def test_gradients_reach_what_is_before_a_frozen_weight():
    model, x = small()
    x.requires_grad_()
    (expected,) = torch.autograd.grad(model(x).sum(), x)
    fastvit.freeze(model, x.detach())
    (got,) = torch.autograd.grad(model(x).sum(), x)
    torch.testing.assert_close(got, expected)


def test_a_compiled_frozen_model_is_right():
    model, x = small()
    with torch.no_grad():
        expected = model(x)
        fastvit.freeze(model)
        torch.testing.assert_close(torch.compile(model, backend="eager")(x), expected)
