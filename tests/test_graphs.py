"""fastvit.capture: CUDA graphs of a model, on a CPU with a stand-in that records operators on the memory they saw."""

from __future__ import annotations

import contextlib
import threading
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

import fastvit
from fastvit import graphs
from tests.patching.spellings.mlps import MLPS, TOKENS, WIDTH
from tests.tiny import build, images


class StandIn(graphs.Graph):
    """As a CUDA graph, it runs the operators of its capture on the tensors of its capture, and calls no module."""

    device_type = "cpu"
    replays = 0
    others_capture = False

    def __init__(self, run, device, pool):
        for _ in range(graphs.WARM_UP):
            run()
        self.recorded = make_fx(run)()
        self.outputs = self.recorded()
        self.busy = False

    @staticmethod
    def new_pool():
        return object()

    @staticmethod
    def capturing():
        return StandIn.others_capture

    @contextlib.contextmanager
    def alone(self):
        assert not self.busy
        self.busy = True
        yield
        self.busy = False

    def replay(self):
        StandIn.replays += 1
        for mine, new in zip(pytree.tree_leaves(self.outputs), pytree.tree_leaves(self.recorded()), strict=True):
            if isinstance(mine, Tensor):
                mine.copy_(new)


@pytest.fixture(autouse=True)
def _stand_in(request, monkeypatch):
    if not request.node.originalname.startswith("test_on_a"):
        monkeypatch.setattr(graphs, "Graph", StandIn)
        monkeypatch.setattr(StandIn, "replays", 0)


class Pair(NamedTuple):
    first: Tensor
    none: None


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.register_buffer("shift", torch.randn(6))
        self.calls = 0

    def forward(self, x, scale=1.0, *, other=None):
        self.calls += 1
        x = self.norm(self.layer(x)) * scale + self.shift
        return x if other is None else (x + other, {"none": None, "x": Pair(x, None)})


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape)


@pytest.fixture
def model() -> Model:
    return Model().eval()


def test_the_model_s_own_outputs_for_fresh_inputs(model):
    captured = fastvit.capture(model, draw(4, 6), (draw(2, 6), 3.0), {"x": draw(4, 6), "other": draw(6)})
    assert captured.shapes == [((4, 6),), ((2, 6),), ((4, 6), (6,))]
    with torch.no_grad():
        kept = []
        for _ in range(3):
            x, other = draw(4, 6), draw(6)
            expected = model(x, other=other)
            calls = model.calls
            got = captured(x=x, other=other)
            assert torch.equal(captured(x), model(x))
            assert model.calls == calls + 1
            kept.append((expected, got))
        for expected, got in kept:  # no later call wrote over them
            assert pytree.tree_structure(expected) == pytree.tree_structure(got)
            assert all(map(torch.equal, *(pytree.tree_leaves(each)[::2] for each in (expected, got))))
        x = draw(2, 6)
        assert torch.equal(captured(x, 3.0), model(x, 3.0))
    assert StandIn.replays == 7


def test_calls_that_no_example_stands_for_are_the_model_s(model):
    captured = fastvit.capture(model, draw(4, 6))
    with torch.no_grad():
        for args in ((draw(3, 6),), (draw(4, 6), 2.0), (draw(4, 6), draw(1))):
            assert torch.equal(captured(*args), model(*args))
        StandIn.others_capture = True
        try:
            captured(draw(4, 6))
        finally:
            StandIn.others_capture = False
        with torch.autocast("cpu"):
            assert captured(draw(4, 6)).dtype == model(draw(4, 6)).dtype
    x = draw(4, 6).requires_grad_()
    captured(x).sum().backward()
    assert x.grad is not None
    assert StandIn.replays == 0


def test_under_autocast():
    layer = nn.Linear(6, 6).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        captured, x = fastvit.capture(layer, draw(4, 6)), draw(4, 6)
        assert captured(x).dtype == torch.bfloat16
        layer.weight.mul_(2)
        assert torch.equal(captured(x), layer(x))
        assert torch.is_autocast_cache_enabled()
    assert StandIn.replays == 2


def test_weights_that_change_in_place_are_seen(model):
    captured, x = fastvit.capture(model, draw(4, 6)), draw(4, 6)
    with torch.no_grad():
        model.layer.weight.add_(1.0)
        model.shift.zero_()
        model.load_state_dict(Model().state_dict())
        assert torch.equal(captured(x), model(x))
    assert StandIn.replays == 1


def _hook(model: Model) -> Any:
    return model.layer.register_forward_hook(lambda module, args, out: out + 1)


CHANGES = {
    "hook": _hook,
    "pre-hook": lambda model: model.norm.register_forward_pre_hook(lambda module, args: (args[0] + 1,)),
    "global hook": lambda model: nn.modules.module.register_module_forward_hook(lambda module, args, out: out + 1),
    "parameter": lambda model: setattr(model.layer, "weight", nn.Parameter(draw(6, 6))),
    "data": lambda model: setattr(model.layer.weight, "data", draw(6, 6)),
    "buffer": lambda model: setattr(model, "shift", draw(6)),
    "module": lambda model: setattr(model, "layer", nn.Linear(6, 6)),
    "forward": lambda model: setattr(model.layer, "forward", lambda x: x),
    "class": lambda model: setattr(
        model.norm, "__class__", type("Other", (nn.BatchNorm1d,), {"forward": lambda s, x: x})
    ),
    "training": lambda model: model.norm.train(),
    "parametrization": lambda model: nn.utils.parametrizations.weight_norm(model.layer),
}


@pytest.mark.parametrize("name", CHANGES)
def test_behind_a_change_the_model_is_called(name, model):
    captured, x = fastvit.capture(model, draw(4, 6)), draw(4, 6)
    handle = CHANGES[name](model)
    try:
        with torch.no_grad():
            model.norm.momentum = 0.0
            before = model.calls
            got = captured(x)
            assert model.calls == before + 1
            assert torch.equal(got, model(x))
    finally:
        if hasattr(handle, "remove"):
            handle.remove()
    if name in ("hook", "pre-hook", "global hook"):
        with torch.no_grad():
            assert torch.equal(captured(x), model(x))
        assert model.calls == before + 3
    elif name != "training":
        captured.add(x)
        before = model.calls
        with torch.no_grad():
            captured(x)
        assert model.calls == before


def test_a_patched_model_and_the_way_back():
    model, x = fastvit.patch(build("vit")), images("vit")
    captured = fastvit.capture(model, x)
    with torch.inference_mode():
        torch.testing.assert_close(captured(x), model(x))
        assert StandIn.replays == 1
        fastvit.unpatch(model)
        assert torch.equal(captured(x), model(x))


def test_a_model_that_decides_at_its_first_call():
    model, x = fastvit.patch(nn.Sequential(MLPS["Module"].cls()).eval()), draw(2, TOKENS, WIDTH)
    captured = fastvit.capture(model, x)
    with torch.inference_mode():
        torch.testing.assert_close(captured(x), model(x))
    assert StandIn.replays == 1


def test_threads_share_it(model):
    captured, wrong = fastvit.capture(model, draw(4, 6), draw(2, 6)), []

    def use(inputs: list[Tensor]) -> None:
        with torch.no_grad():
            wrong.extend(x for x in inputs if not torch.equal(captured(x), model(x)))

    threads = [threading.Thread(target=use, args=([draw(2 + 2 * (i % 2), 6) for _ in range(50)],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert StandIn.replays == 200


def test_released(model):
    captured = fastvit.capture(model, draw(4, 6))
    captured.release()
    with torch.no_grad():
        captured(draw(4, 6))
    assert captured.shapes == []
    assert StandIn.replays == 0


class Counting(nn.Module):
    def forward(self, x):
        return x, len(x)


def test_what_cannot_be_captured(model):
    with pytest.raises(TypeError, match=r"model: expected an nn.Module, got str"):
        fastvit.capture("vit", draw(4, 6))
    with pytest.raises(TypeError, match=r"example: expected a tensor, .* got ndarray"):
        fastvit.capture(model, np.zeros((4, 6), np.float32))
    with pytest.raises(ValueError, match=r"example: expected tensors, and other arguments that can be hashed"):
        fastvit.capture(model, (draw(4, 6), {1}))
    with pytest.raises(TypeError, match=r"model: expected outputs of tensors alone"):
        fastvit.capture(Counting().eval(), draw(4, 6))
    with pytest.raises(ValueError, match=r"one CPU device, got cpu, meta"):
        fastvit.capture(model, draw(4, 6).to("meta"))
    with pytest.raises(ValueError, match=r"model: expected one in eval mode, with no hooks"):
        fastvit.capture(model.train(), draw(4, 6))
    _hook(model.eval())
    with pytest.raises(ValueError, match=r"model: expected one in eval mode, with no hooks"):
        fastvit.capture(model, draw(4, 6))


def test_on_a_cpu_it_says_what_it_needs(model):
    with pytest.raises(ValueError, match=r"example: expected it and the model on one CUDA device, got cpu"):
        fastvit.capture(model, draw(4, 6))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu():
    model, x = fastvit.patch(build("vit")).cuda(), images("vit").cuda()
    captured = fastvit.capture(model, x, x[:1])
    beside = torch.cuda.Stream()
    with torch.inference_mode():
        for step in range(3):
            fresh = torch.randn_like(x)
            expected = model(fresh)
            torch.testing.assert_close(captured(fresh), expected)
            torch.cuda.synchronize()
            with torch.cuda.stream(beside):
                got = captured(fresh)
            other = captured(fresh * 2)  # on this stream, behind the other one's
            torch.cuda.synchronize()
            torch.testing.assert_close(got, expected)
            torch.testing.assert_close(other, model(fresh * 2))
            model.head.weight.mul_(0.5 + step)
