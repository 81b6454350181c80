"""Gradients of gradients, as a gradient penalty takes them, of every operator and of whole models, against float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastvit import accuracy, backends, ops
from fastvit.patching import patch
from fastvit.reference import functional
from fastvit.reference.functional import LayerNorm
from tests.helpers import assert_as_accurate, on_pooled_draws, on_thread_counts
from tests.ops.calls import CALLS, HEADS, batch_norm
from tests.patching.fused_and_plain import joined
from tests.tiny import FAMILIES, build, images

pytestmark = pytest.mark.skipif(bool(backends.cpp_reasons()), reason="; ".join(backends.cpp_reasons()))

Arguments = dict[str, Any]


def varied(batch: bool) -> Arguments:
    """A convolution with everything there is around it, every parameter away from 0 and 1."""
    arguments = CALLS["token_depthwise_conv"](batch)
    return arguments | {"pre_activation": "gelu", "activation": "silu", "residual": True}


CASES: dict[str, tuple[str, Callable[[], Arguments]]] = {
    **{op: (op, lambda op=op: CALLS[op](False)) for op in CALLS if op != "conv_batch_norm"},
    **{
        f"{op}, batch statistics": (op, lambda op=op: CALLS[op](True))
        for op in ("head_mixed_attention", "re_attention", "depthwise_separable_conv", "conv_projection", "leff")
    },
    "token_depthwise_conv, all around": ("token_depthwise_conv", lambda: varied(False)),
    "token_depthwise_conv, all around, batch statistics": ("token_depthwise_conv", lambda: varied(True)),
    "token_depthwise_conv, stride": (
        "token_depthwise_conv",
        lambda: CALLS["token_depthwise_conv"](True) | {"stride": 2},
    ),
    "leff, paper": ("leff", lambda: CALLS["leff"](True) | {"form": "paper"}),
    "leff, no prefix": (
        "leff",
        lambda: (
            CALLS["leff"](True) | {"x": torch.randn(2, 12, 6), "residual": torch.randn(2, 12, 6), "prefix_tokens": 0}
        ),
    ),
    "linear, gelu": ("linear", lambda: CALLS["linear"](False) | {"activation": "gelu"}),
    "linear, one row": ("linear", lambda: CALLS["linear"](False) | {"x": torch.randn(8), "residual": torch.randn(4)}),
    "re_attention, layer norm": (
        "re_attention",
        lambda: CALLS["re_attention"](False) | {"norm": LayerNorm(torch.rand(HEADS) + 0.5, torch.randn(HEADS), 1e-3)},
    ),
    "re_attention, norm without affine": (
        "re_attention",
        lambda: CALLS["re_attention"](False) | {"norm": batch_norm(HEADS, True, weight=None, bias=None), "mask": None},
    ),
    "head_mixed_attention, no mix": (
        "head_mixed_attention",
        lambda: (
            CALLS["head_mixed_attention"](False)
            | dict.fromkeys(("pre_weight", "pre_bias", "post_weight", "post_bias"))
            | {"norm": None, "output_scale": 0.5}
        ),
    ),
    "masked_attention, masked rows": (
        "masked_attention",
        lambda: CALLS["masked_attention"](False) | {"mask": torch.arange(10).view(2, 1, 5, 1) > 2, "scale": 0.7},
    ),
}
"""By name, an operator and its arguments."""


ULPS = {"out": accuracy.ULPS, "d ": 2 * accuracy.ULPS, "dd ": 4 * accuracy.ULPS}
"""Last places by kind. The loss's gradient is a multiple of the outputs, so a gradient is a product of two numbers that
may each be off by the rule's; a penalty's gradient is one of two such gradients."""


def randomized(arguments: Arguments) -> Arguments:
    """Every parameter of a norm away from 0 and 1."""

    def change(path: pytree.KeyPath, leaf: Any) -> Any:
        name = pytree.keystr(path)
        if not isinstance(leaf, Tensor) or "norm" not in name:
            return leaf
        return torch.rand_like(leaf) + 0.5 if "var" in name or "weight" in name else 0.3 * torch.randn_like(leaf)

    return pytree.tree_map_with_path(change, arguments)


def loss_of(outputs: Any) -> Tensor:
    """A number whose gradient depends on the outputs."""
    leaves = pytree.tree_leaves(outputs)
    weights = [torch.linspace(-1, 1, each.numel(), dtype=each.dtype).view_as(each) for each in leaves]
    return torch.stack([(each.square() * weight).sum() for each, weight in zip(leaves, weights, strict=True)]).sum()


def penalty(
    function: Callable[..., Any], arguments: Arguments, dtype: torch.dtype, **options: Any
) -> dict[str, Tensor]:
    """Results, gradients of a loss, and gradients of the size of these, by name; running statistics after the call."""

    def leaf(path: pytree.KeyPath, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return value.to(dtype, copy=True).requires_grad_("running" not in pytree.keystr(path))

    arguments = pytree.tree_map_with_path(leaf, arguments)
    named = {pytree.keystr(path): value for path, value in pytree.tree_leaves_with_path(arguments)}
    leaves = {name: value for name, value in named.items() if isinstance(value, Tensor) and value.requires_grad}
    outputs = pytree.tree_leaves(function(**arguments, **options))
    first = torch.autograd.grad(loss_of(outputs), leaves.values(), create_graph=True, materialize_grads=True)
    size = torch.stack([gradient.square().sum() for gradient in first]).sum()
    second = torch.autograd.grad(size, leaves.values(), materialize_grads=True)
    found = {f"out {i}": output.detach() for i, output in enumerate(outputs)}
    for name, one, two in zip(leaves, first, second, strict=True):
        found |= {f"d {name}": one.detach(), f"dd {name}": two}
    return found | {name: value for name, value in named.items() if "running" in name and isinstance(value, Tensor)}


def judge(got: dict[str, Tensor], plain: Sequence[dict[str, Tensor]], exact: dict[str, Tensor]) -> None:
    """``plain``: on several numbers of threads, whose sums differ."""
    assert all(each.keys() == exact.keys() for each in (got, *plain))
    kinds = [("out", "running"), ("d ",), ("dd ",)]
    for kind in kinds:
        names = [name for name in exact if name.startswith(kind) or any(each in name for each in kind[1:])]
        parts = [{name: each[name] for name in names} for each in (exact, got, *plain)]
        oracle, one, *others = (joined(part, parts[0]) for part in parts)
        assert_as_accurate(one.float(), [other.float() for other in others], oracle, ulps=ULPS[kind[0]], name=kind[0])


@pytest.mark.parametrize("case", CASES)
def test_as_accurate_as_the_plain_form(case):
    op, make = CASES[case]

    def check() -> None:
        arguments = randomized(make())
        got = penalty(getattr(ops, op), arguments, torch.float32, backend="cpp")
        plain = on_thread_counts(lambda: penalty(getattr(functional, op), arguments, torch.float32))
        judge(got, plain, penalty(getattr(functional, op), arguments, torch.float64))

    on_pooled_draws(check)


@pytest.mark.parametrize("op", ["masked_attention", "class_attention", "re_attention", "talking_heads_attention"])
def test_one_tensor_as_queries_keys_and_values(op):
    def shared(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(x: Tensor, **others: Any) -> Tensor:
            return function(q=x, k=x, v=x, **others)

        return call

    def check() -> None:
        arguments = randomized(CALLS[op](True))
        x = torch.randn(2, HEADS, 7, 8)
        others = {name: value for name, value in arguments.items() if name not in ("q", "k", "v")}
        if op in ("masked_attention", "class_attention"):
            others["bias"] = torch.randn(HEADS, 7, 7)
        arguments = {"x": x, **others}
        got = penalty(shared(getattr(ops, op)), arguments, torch.float32, backend="cpp")
        plain = on_thread_counts(lambda: penalty(shared(getattr(functional, op)), arguments, torch.float32))
        judge(got, plain, penalty(shared(getattr(functional, op)), arguments, torch.float64))

    on_pooled_draws(check)


def one_at_a_time(
    function: Callable[..., Any], arguments: Arguments, dtype: torch.dtype, create_graph: bool, **options: Any
) -> dict[str, Tensor]:
    """The gradient of every tensor, where it is the only one that needs it."""
    arguments = pytree.tree_map_only(
        Tensor, lambda value: value.to(dtype) if value.is_floating_point() else value, arguments
    )
    found = {}
    for path, value in pytree.tree_leaves_with_path(arguments):
        name = pytree.keystr(path)
        if isinstance(value, Tensor) and value.is_floating_point() and "running" not in name:
            value.requires_grad_()
            (gradient,) = torch.autograd.grad(
                loss_of(function(**arguments, **options)), value, create_graph=create_graph
            )
            assert gradient.requires_grad == create_graph
            found[name] = gradient.detach()
            value.requires_grad_(False)
    return found


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("op", [op for op in CALLS if op != "conv_batch_norm"])
def test_only_the_gradients_asked_for(op, create_graph):
    def check() -> None:
        arguments = randomized(CALLS[op](False))
        got = one_at_a_time(getattr(ops, op), arguments, torch.float32, create_graph, backend="cpp")
        plain, exact = (
            one_at_a_time(getattr(functional, op), arguments, dtype, create_graph)
            for dtype in (torch.float32, torch.float64)
        )
        one, other, oracle = (joined(each, exact) for each in (got, plain, exact))
        assert_as_accurate(one.float(), other.float(), oracle, ulps=ULPS["d "])

    on_pooled_draws(check)


def model_penalty(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The gradients of a gradient penalty on the images."""
    x = x.clone().requires_grad_()
    outputs = pytree.tree_leaves(model(x))
    (gradient,) = torch.autograd.grad(loss_of(outputs), x, create_graph=True)
    gradient.square().sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"out": outputs[0].detach(), "gradient": gradient.detach(), "x": x.grad, **found}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_models_with_a_gradient_penalty(name, training):
    plain, x = build(name).train(training), images(name)
    fused, exact = patch(copy.deepcopy(plain)), copy.deepcopy(plain).double()
    got, expected, oracle = (
        model_penalty(fused, x),
        model_penalty(plain, x),
        model_penalty(exact, x.double()),
    )
    assert got.keys() == expected.keys() == oracle.keys()
    one, other, right = (joined(each, oracle) for each in (got, expected, oracle))
    assert_as_accurate(one.float(), other.float(), right)
