"""The short way of a call: the same results, and the long way wherever something stands against it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastvit import backends, ops
from fastvit.ops import _at_once, _products
from fastvit.ops._dispatch import recording
from fastvit.reference.functional import BatchNorm, Projection

pytestmark = pytest.mark.skipif(bool(backends.cpp_reasons()), reason="the C++ operators are not there")

CHANNELS, GRID, TOKENS = 32, (4, 5), 21


def _norm(channels: int) -> BatchNorm:
    mean, weight, bias = torch.randn(3, channels)
    return BatchNorm(mean, 0.5 + torch.rand(channels), weight, bias)


def _projection(stride: int) -> Projection:
    pointwise = torch.randn(CHANNELS, CHANNELS)
    return Projection(torch.randn(CHANNELS, 1, 3, 3), _norm(CHANNELS), pointwise, torch.randn(CHANNELS), stride)


def _tokens() -> Tensor:
    return torch.randn(2, TOKENS, CHANNELS)


def _heads(tokens: int) -> Tensor:
    return torch.randn(2, 3, tokens, 16)


def _linear(inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
    return torch.randn(outputs, inputs) / inputs**0.5, torch.randn(outputs)


Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def _leff_arguments() -> Arguments:
    hidden = 2 * CHANNELS
    depthwise = torch.randn(hidden, 1, 3, 3), torch.randn(hidden)
    layers = (*_linear(CHANNELS, hidden), *depthwise, *_linear(hidden, CHANNELS))
    norms = {"up_norm": _norm(hidden), "dw_norm": _norm(hidden), "down_norm": _norm(CHANNELS)}
    return (_tokens(), *layers), {"grid": GRID, **norms}


CALLS: dict[str, Callable[[], Arguments]] = {
    "token_depthwise_conv": lambda: (
        (_tokens(), torch.randn(CHANNELS, 1, 3, 3), torch.randn(CHANNELS)),
        {"grid": GRID, "prefix_tokens": 1, "pre_norm": _norm(CHANNELS), "activation": "silu", "residual": True},
    ),
    "depthwise_separable_conv": lambda: (
        (_tokens(), *_projection(2)[:4]),
        {"grid": GRID, "prefix_tokens": 1, "stride": 2},
    ),
    "conv_projection": lambda: (
        (_tokens(), _projection(1), _projection(2), _projection(2)),
        {"grid": GRID, "prefix_tokens": 1},
    ),
    "leff": _leff_arguments,
    "linear": lambda: ((_tokens(), *_linear(CHANNELS, 24), "gelu"), {}),
    "mlp": lambda: ((_tokens(), *_linear(CHANNELS, 64), *_linear(64, CHANNELS)), {}),
    "masked_attention": lambda: (
        (_heads(9), _heads(11), _heads(11)),
        {"mask": torch.rand(2, 1, 1, 11) < 0.8, "bias": torch.randn(1, 3, 9, 11)},
    ),
    "class_attention": lambda: ((_heads(1), _heads(11), _heads(11)), {}),
}


@pytest.fixture
def went(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls that the short way answered."""
    found: list[str] = []

    def noting(module: ModuleType, name: str) -> Callable[..., Any]:
        plain = getattr(module, name)

        def run(*args: Any, **kwargs: Any) -> Any:
            result = plain(*args, **kwargs)
            found.append(name)
            return result

        return run

    convolution = importlib.import_module("fastvit.ops.token_depthwise_conv")
    names = [(_at_once, name) for name in ("attention", "convolution", "norm_arguments", "product")]
    for module, name in (*names, (convolution, "_train_at_once")):
        monkeypatch.setattr(module, name, noting(module, name))
    return found


def _bitwise_equal(one: Any, other: Any) -> bool:
    pairs = zip(pytree.tree_leaves(one), pytree.tree_leaves(other), strict=True)
    return all(torch.equal(a, b) and a.dtype == b.dtype and a.stride() == b.stride() for a, b in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", CALLS)
def test_gives_what_the_long_way_gives(op, dtype, went, monkeypatch):
    args, kwargs = pytree.tree_map_only(
        Tensor, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, CALLS[op]()
    )
    with torch.no_grad():
        found = getattr(ops, op)(*args, **kwargs)
        assert went
        monkeypatch.setattr(_at_once, "is_open", lambda *_: False)
        assert _bitwise_equal(found, getattr(ops, op)(*args, **kwargs))


@pytest.mark.parametrize("op", CALLS)
def test_stays_closed_where_something_is_to_be_known_of_the_call(op, went, monkeypatch):
    args, kwargs = CALLS[op]()
    call = getattr(ops, op)
    call(*args, **kwargs)  # gradients could be needed
    assert not set(went) - {"_train_at_once"}
    went.clear()
    with torch.no_grad():
        with recording(lambda selection: None):
            call(*args, **kwargs)
        with torch.autocast("cpu", torch.bfloat16):
            call(*args, **kwargs)
        call(*args, **kwargs, backend="reference")
        torch.func.vmap(lambda x: call(x, *args[1:], **kwargs))(args[0][None])
        monkeypatch.setattr(backends, "REQUESTED", frozenset({"reference"}))
        call(*args, **kwargs)
    assert not went


@pytest.mark.parametrize("op", CALLS)
def test_what_its_operators_refuse_goes_the_long_way(op, monkeypatch):
    """Inputs that lie otherwise, and a dtype that it is not for."""
    args, kwargs = CALLS[op]()
    spread = pytree.tree_map_only(Tensor, lambda tensor: tensor.repeat_interleave(2, -1)[..., ::2], args)
    doubled = pytree.tree_map_only(
        Tensor, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, (args, kwargs)
    )
    with torch.no_grad():
        call = getattr(ops, op)
        short = call(*spread, **kwargs), call(*doubled[0], **doubled[1])
        monkeypatch.setattr(_at_once, "is_open", lambda *_: False)
        assert _bitwise_equal(short, (call(*spread, **kwargs), call(*doubled[0], **doubled[1])))


def test_a_norm_over_the_batch_goes_the_long_way(went):
    layer = nn.BatchNorm2d(CHANNELS)
    with torch.no_grad():
        ops.token_depthwise_conv(
            _tokens(), torch.randn(CHANNELS, 1, 3, 3), grid=GRID, prefix_tokens=1, norm=BatchNorm.of(layer)
        )
    assert not {"convolution", "product"} & set(went)
    assert layer.num_batches_tracked == 1
    assert not torch.equal(layer.running_mean, torch.zeros(CHANNELS))


def _training_arguments(dtype: torch.dtype) -> dict[str, Any]:
    """Of a convolution between two norms over the batch; every parameter needs its gradient."""

    def parameter(*shape: int) -> Tensor:
        return torch.randn(*shape).to(dtype).requires_grad_()

    def norm() -> BatchNorm:
        running = torch.randn(CHANNELS).to(dtype), torch.rand(CHANNELS).to(dtype)
        return BatchNorm(*running, parameter(CHANNELS), parameter(CHANNELS), use_batch_stats=True)

    around = {"pre_norm": norm(), "pre_activation": "gelu", "norm": norm(), "activation": "gelu"}
    return {"x": _tokens().to(dtype).requires_grad_(), "weight": parameter(CHANNELS, 1, 3, 3), "bias": None, **around}


def _step(arguments: dict[str, Any]) -> list[Tensor]:
    """The result, the gradients and what became of the running statistics."""
    out = ops.token_depthwise_conv(**arguments, grid=GRID, prefix_tokens=1)
    leaves = [leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Tensor)]
    trained = [leaf for leaf in leaves if leaf.requires_grad]
    gradients = torch.autograd.grad(out.float().square().sum(), trained, allow_unused=True)
    return [out.detach(), *gradients, *(leaf for leaf in leaves if not leaf.requires_grad)]


def _copied(arguments: dict[str, Any]) -> dict[str, Any]:
    return pytree.tree_map_only(
        Tensor, lambda tensor: tensor.detach().clone().requires_grad_(tensor.requires_grad), arguments
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_trains_as_the_long_way_does(dtype, went, monkeypatch):
    arguments = _training_arguments(dtype)
    found = _step(_copied(arguments))
    assert went == ["_train_at_once"]
    monkeypatch.setattr(_at_once, "is_open", lambda *_: False)
    assert _bitwise_equal(found, _step(_copied(arguments)))


UNTRAINABLE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a layer of another kind": lambda given: given.update(norm=BatchNorm.of(nn.GroupNorm(4, CHANNELS))),
    "a float64 parameter": lambda given: given.update(weight=given["weight"].detach().double()),
}


@pytest.mark.parametrize("name", UNTRAINABLE)
def test_what_it_cannot_train_goes_the_long_way(name, went, monkeypatch):
    arguments = _training_arguments(torch.float32)
    arguments["norm"] = arguments["norm"]._replace(use_batch_stats=False)
    UNTRAINABLE[name](arguments)
    found = _step(_copied(arguments))
    assert not went
    monkeypatch.setattr(_at_once, "is_open", lambda *_: False)
    assert _bitwise_equal(found, _step(_copied(arguments)))


@pytest.mark.parametrize("wrong", ["pre_norm", "norm"])
def test_running_statistics_stay_where_a_call_is_refused(wrong):
    """Those of the other norm are right, and would be moved."""
    arguments = _training_arguments(torch.float32)
    arguments[wrong] = arguments[wrong]._replace(running_mean=torch.zeros(CHANNELS + 1))
    before = _copied(arguments)
    with pytest.raises(ValueError, match=f"{wrong}.running_mean"):
        _step(arguments)
    kept, then = (
        [leaf for leaf in pytree.tree_leaves(each) if isinstance(leaf, Tensor)] for each in (arguments, before)
    )
    assert _bitwise_equal(kept, then)


@pytest.mark.parametrize("pays_off", [False, True])
@pytest.mark.parametrize("vectorised", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_are_chosen_as_on_the_long_way(dtype, vectorised, pays_off, monkeypatch):
    monkeypatch.setattr(_products, "pays_off", lambda: pays_off)
    monkeypatch.setattr(_products, "_has_bfloat16_products", lambda: vectorised)
    for rows in (1, 15, 16, 40):
        for columns in (15, 16, 40):
            x, weight = torch.randn(rows, 24).to(dtype), torch.randn(columns, 24).to(dtype)
            call = _products.Call(x, (_products.Layer(weight, None),), None)
            first = next(each for each in _products.IMPLEMENTATIONS if not each.reasons(call))
            assert _products.chooses_cpp(x, weight) == (first.name == "cpp")
