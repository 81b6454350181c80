"""Calls of every public operator on tensors so small that the call takes longer than the arithmetic."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fastvit.reference.functional import BatchNorm, Projection

BATCH, GRID, CHANNELS, HEADS, HEAD_DIM = 1, (4, 4), 16, 2, 8
TOKENS = 1 + GRID[0] * GRID[1]
PRODUCTS = frozenset({"addmm", "mm", "bmm", "convolution", "convolution_backward"})
"""The library's operators that count as kernels of a call."""


class Call(NamedTuple):
    """The arguments of one call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def to(self, dtype: torch.dtype) -> Call:
        return pytree.tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, self)

    def leaves(self) -> list[Tensor]:
        """The tensors that a training step has gradients of: all floating ones except running statistics."""
        named = pytree.tree_leaves_with_path(self)
        return [
            leaf
            for path, leaf in named
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and "running" not in pytree.keystr(path)
        ]


def _norm(size: int, training: bool) -> BatchNorm:
    weight, bias = torch.randn(2, size)
    return BatchNorm(torch.randn(size), 0.5 + torch.rand(size), weight, bias, use_batch_stats=training)


def _linear(inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
    return torch.randn(outputs, inputs) / inputs**0.5, torch.randn(outputs)


def _tokens() -> Tensor:
    return torch.randn(BATCH, TOKENS, CHANNELS)


def _heads(tokens: int) -> Tensor:
    return torch.randn(BATCH, tokens, HEADS, HEAD_DIM).transpose(1, 2)


def _attention(queries: int) -> Call:
    return Call((_heads(queries), _heads(TOKENS), _heads(TOKENS)), {})


def _mix() -> tuple[Tensor, Tensor]:
    return torch.eye(HEADS) + 0.1 * torch.randn(HEADS, HEADS), 0.1 * torch.randn(HEADS)


def _depthwise(channels: int) -> tuple[Tensor, Tensor]:
    return torch.randn(channels, 1, 3, 3) / 3, torch.randn(channels)


def _projection(stride: int, training: bool) -> Projection:
    weight, _ = _depthwise(CHANNELS)
    return Projection(weight, _norm(CHANNELS, training), *_linear(CHANNELS, CHANNELS), stride)


def _leff(training: bool) -> Call:
    hidden = 2 * CHANNELS
    layers = (*_linear(CHANNELS, hidden), *_depthwise(hidden), *_linear(hidden, CHANNELS))
    sizes = {"up_norm": hidden, "dw_norm": hidden, "down_norm": CHANNELS}
    return Call((_tokens(), *layers), {"grid": GRID} | {name: _norm(size, training) for name, size in sizes.items()})


_ON_TOKENS = {"grid": GRID, "prefix_tokens": 1}

CALLS: dict[str, Callable[[bool], Call]] = {
    "masked_attention": lambda training: _attention(TOKENS),
    "class_attention": lambda training: _attention(1),
    "head_mixed_attention": lambda training: Call(
        _attention(TOKENS).args, dict(zip(("post_weight", "post_bias"), _mix(), strict=True))
    ),
    "re_attention": lambda training: Call((*_attention(TOKENS).args, *_mix(), _norm(HEADS, training)), {}),
    "talking_heads_attention": lambda training: Call((*_attention(TOKENS).args, *_mix(), *_mix()), {}),
    "token_depthwise_conv": lambda training: Call(
        (_tokens(), *_depthwise(CHANNELS)), {**_ON_TOKENS, "norm": _norm(CHANNELS, training), "activation": "gelu"}
    ),
    "depthwise_separable_conv": lambda training: Call((_tokens(), *_projection(1, training)[:4]), _ON_TOKENS),
    "conv_projection": lambda training: Call(
        (_tokens(), *(_projection(stride, training) for stride in (1, 2, 2))), _ON_TOKENS
    ),
    "leff": _leff,
    "linear": lambda training: Call((_tokens(), *_linear(CHANNELS, CHANNELS), "gelu"), {}),
    "mlp": lambda training: Call((_tokens(), *_linear(CHANNELS, 2 * CHANNELS), *_linear(2 * CHANNELS, CHANNELS)), {}),
    "glu_mlp": lambda training: Call(
        (_tokens(), *(part for sizes in ((1, 2), (1, 2), (2, 1)) for part in _linear(*(CHANNELS * n for n in sizes)))),
        {},
    ),
    "conv_batch_norm": lambda training: Call(
        (torch.randn(BATCH, 3, 4, 4), torch.randn(CHANNELS, 3, 3, 3) / 5, None, _norm(CHANNELS, training)),
        {"stride": 2, "padding": 1},
    ),
}
"""By public operator, a function that makes the arguments of an inference call or, given True, of a training call."""

PARTS = {
    "mlp": 2,  # two products
    "glu_mlp": 3,  # three products
    "depthwise_separable_conv": 2,  # convolution, product
    "conv_projection": 6,  # three convolutions, three products
    "leff": 3,  # product, convolution, product
}
"""How many operators a composition is made of; those not listed are one."""


def backend_of(op: str, training: bool = False) -> str:
    """The fast implementation of an operator on a CPU, as ``backend=`` and FASTVIT_BACKEND name it."""
    return "reference" if training and op == "conv_batch_norm" else "cpp"


def runner(function: Callable[..., Any], call: Call, training: bool, **options: Any) -> Callable[[], Any]:
    """A function of no arguments: the call or, in training, a step that returns outputs and gradients."""
    forward = functools.partial(function, *call.args, **call.kwargs, **options)
    if not training:
        return forward
    leaves = [leaf.requires_grad_() for leaf in call.leaves()]
    gradients = [torch.randn_like(output) for output in pytree.tree_leaves(forward())]

    def step() -> list[Tensor]:
        outputs = pytree.tree_leaves(forward())
        return [*outputs, *torch.autograd.grad(outputs, leaves, gradients)]

    return step


Kernel = Callable[[], Any]


class _Recorder(TorchDispatchMode):
    """Records the kernels that are called, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kernel = functools.partial(func, *args, **(kwargs or {}))
        namespace, name = func._schema.name.split("::")
        if namespace == "fastvit" or name in PRODUCTS:
            self.kernels.append(kernel)
        return kernel()


def kernels_of(run: Callable[[], Any]) -> list[Kernel]:
    """The kernels that ``run`` calls, as functions of no arguments."""
    run()  # warm up
    with _Recorder() as recorder:
        run()
    return recorder.kernels
