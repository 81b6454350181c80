"""The low-level operators of token_depthwise_conv, which kernels implement, and autograd around them.

Three operators, one set of arguments (below, ``norms`` stands for the fields of both):

    token_depthwise_conv(x, weight, bias, norms, ...) -> out
        Inference; every norm has given statistics.
    token_depthwise_conv_training(x, weight, bias, norms, ...) -> (out, conv, pre_mean, pre_var, mean, var)
        The same, with batch statistics where ``*_batch`` is true (the given ones are then None): the float32 mean and
        biased variance of each channel of the grid tokens of x, and of the convolution's result. They are returned;
        size 0 where a norm is absent or uses given statistics. ``conv`` is what backward wants to see again: the
        convolution's result, of out's shape and dtype (prefix tokens unspecified), where a norm or an activation
        follows; size 0 elsewhere.
    token_depthwise_conv_backward(grad, x, conv, weight, bias, norms, ...) -> (dx, dweight, dbias, dpre_weight,
        dpre_bias, dnorm_weight, dnorm_bias)
        ``conv`` and the statistics are those of the forward pass. dx has x's dtype, is contiguous, and has the prefix
        tokens' gradient in it; parameters' gradients are float32. Size 0: dx without ``x_grad``, parameters' without
        ``parameter_grads``, and those of parameters that are absent.

With t = pre_activation(pre_norm(x)), c = conv(t) + bias, n = norm(c), y = activation(n) [+ x], and M the number of
values of a channel in c, the gradients follow channel by channel, xhat being a norm's input less its mean over its
deviation (batch statistics; with given ones the bracket is dn alone):

    dn = dy activation'(n);  dnorm_bias = sum dn;  dnorm_weight = sum dn xhat
    dc = norm_weight / deviation [dn - dnorm_bias / M - xhat dnorm_weight / M]
    dbias = sum dc;  dweight = correlation of t with dc;  dt = transposed convolution of dc
    and for dt the same two steps backwards through pre_activation and pre_norm; dx gets dy added with ``residual``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastvit.reference.functional import BatchNorm

__all__ = ["ACTIVATION_CODES", "NATIVE", "TRITON", "Call", "Operators", "define_operators", "out_size", "run"]

ACTIVATION_CODES = {None: 0, "gelu": 1, "quick_gelu": 2, "silu": 3, "relu": 4}  # csrc's enum Activation

_TENSORS = "Tensor x, {conv}Tensor weight, Tensor? bias"
_NORM = "Tensor? {0}_weight, Tensor? {0}_bias, Tensor? {0}_mean, Tensor? {0}_var, float {0}_eps"
_GEOMETRY = "SymInt height, SymInt width, int stride, int padding, int prefix_tokens, bool residual"


class Call(NamedTuple):
    """The checked arguments of one call of the public function, ``padding`` filled in."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    grid: tuple[int, int]
    stride: int
    padding: int
    prefix_tokens: int
    pre_norm: BatchNorm | None
    pre_activation: str | None
    norm: BatchNorm | None
    activation: str | None
    residual: bool


class Operators(NamedTuple):
    """The three low-level operators of one kind of kernel."""

    forward: Callable[..., Tensor]
    training: Callable[..., tuple[Tensor, ...]]
    backward: Callable[..., tuple[Tensor, ...]]


class Numbers(NamedTuple):
    """What is not a tensor among the low-level arguments, and which statistics each norm uses."""

    pre_eps: float
    pre_batch: bool
    pre_activation: int
    eps: float
    batch: bool
    activation: int
    height: int
    width: int
    stride: int
    padding: int
    prefix_tokens: int
    residual: bool


def out_size(size: int, kernel: int, stride: int, padding: int) -> int:
    """Outputs of a convolution along one axis."""
    return (size + 2 * padding - kernel) // stride + 1


# --- The operators --------------------------------------------------------------------------------------------------


def _schema(conv: str, batch: bool) -> str:
    norms = []
    for name, activation in (("pre_norm", "pre_activation"), ("norm", "activation")):
        flag = f", bool {name}_batch" if batch else ""
        norms.append(_NORM.format(name) + flag + f", int {activation}")
    return ", ".join([_TENSORS.format(conv=conv), *norms, _GEOMETRY])


def _fake_forward(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    height, width, stride, padding, prefix_tokens = rest[-6:-1]
    kernel = weight.shape[-1]
    tokens = out_size(height, kernel, stride, padding) * out_size(width, kernel, stride, padding)
    return x.new_empty((x.shape[0], prefix_tokens + tokens, x.shape[2]))


def _fake_training(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    pre_batch, mean, batch, activation = rest[5], rest[9], rest[12], rest[13]
    out = _fake_forward(x, weight, *rest)
    finished = mean is not None or batch or activation != 0
    conv = torch.empty_like(out) if finished else x.new_empty(0)
    sizes = [x.shape[2] * used for used in (pre_batch, pre_batch, batch, batch)]
    return out, conv, *(x.new_empty(size, dtype=torch.float32) for size in sizes)


def _fake_backward(
    grad: Tensor, x: Tensor, conv: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    x_grad, parameter_grads = rest[-2:]
    sizes = [tensor.shape if tensor is not None else (0,) for tensor in (weight, bias, *rest[:2], *rest[7:9])]
    gradients = [x.new_empty(size if parameter_grads else (0,), dtype=torch.float32) for size in sizes]
    return x.new_empty(x.shape if x_grad else (0,)), *gradients


def define_operators(suffix: str = "") -> Operators:
    """Define ``fastvit::token_depthwise_conv<suffix>`` and its two companions, with their fakes.

    Args:
        suffix: tells kernels of another kind apart.
    """
    name = f"fastvit::token_depthwise_conv{suffix}"
    backward = f"Tensor grad, {_schema('Tensor conv, ', True)}, bool x_grad, bool parameter_grads"
    definitions = (
        (name, f"({_schema('', False)}) -> Tensor", _fake_forward),
        (f"{name}_training", f"({_schema('', True)}) -> ({', '.join(['Tensor'] * 6)})", _fake_training),
        (f"{name}_backward", f"({backward}) -> ({', '.join(['Tensor'] * 7)})", _fake_backward),
    )
    for operator, schema, fake in definitions:
        torch.library.define(operator, schema, tags=torch.Tag.pt2_compliant_tag)
        torch.library.register_fake(operator, fake)
    return Operators(*(getattr(torch.ops.fastvit, operator.split("::")[1]) for operator, *_ in definitions))


NATIVE = define_operators()
"""The operators of ``fastvit._C``, for the CPU and for CUDA."""

TRITON = define_operators("_triton")
"""Those of ``kernels/token_depthwise_conv*.py``; of their own, since Triton's interpreter runs them on the CPU, too."""


@torch.library.impl("fastvit::token_depthwise_conv_triton", ("cpu", "cuda"))
def _triton(*arguments: Any) -> Tensor:
    from fastvit.kernels.token_depthwise_conv import token_depthwise_conv_forward

    return token_depthwise_conv_forward(*arguments)


@torch.library.impl("fastvit::token_depthwise_conv_triton_training", ("cpu", "cuda"))
def _triton_training(*arguments: Any) -> tuple[Tensor, ...]:
    from fastvit.kernels.token_depthwise_conv_training import token_depthwise_conv_training

    return token_depthwise_conv_training(*arguments)


@torch.library.impl("fastvit::token_depthwise_conv_triton_backward", ("cpu", "cuda"))
def _triton_backward(*arguments: Any) -> tuple[Tensor, ...]:
    from fastvit.kernels.token_depthwise_conv_backward import token_depthwise_conv_backward

    return token_depthwise_conv_backward(*arguments)


# --- Autograd -------------------------------------------------------------------------------------------------------


def _low_level(
    weight: Tensor,
    bias: Tensor | None,
    pre_norm: tuple[Tensor | None, ...],
    norm: tuple[Tensor | None, ...],
    numbers: Numbers,
) -> tuple[Any, ...]:
    """The arguments of the training and the backward operator from ``weight`` on."""
    return weight, bias, *pre_norm, *numbers[:3], *norm, *numbers[3:]


class _Differentiable(torch.autograd.Function):
    """A call in which gradients are needed: (out, pre_mean, pre_var, mean, var), or out alone where no norm takes
    statistics of the batch.
    """

    @staticmethod
    def forward(
        ctx: Any,
        operators: Operators,
        numbers: Numbers,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        pre_weight: Tensor | None,
        pre_bias: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        pre_mean: Tensor | None,
        pre_var: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
    ) -> tuple[Tensor, ...] | Tensor:
        pre_norm, norm = (pre_weight, pre_bias, pre_mean, pre_var), (norm_weight, norm_bias, mean, var)
        out, conv, *statistics = operators.training(x, *_low_level(weight, bias, pre_norm, norm, numbers))
        if numbers.pre_batch:
            pre_mean, pre_var = statistics[:2]
        if numbers.batch:
            mean, var = statistics[2:]
        ctx.operators, ctx.numbers = operators, numbers
        affine = (pre_weight, pre_bias, norm_weight, norm_bias)
        ctx.save_for_backward(x, conv, weight, bias, *affine, pre_mean, pre_var, mean, var)
        ctx.set_materialize_grads(False)  # no zeros for the statistics
        if not (numbers.pre_batch or numbers.batch):
            return out
        ctx.mark_non_differentiable(*statistics)
        return out, *statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if grad is None:  # whoever used the result passes nothing back
            return (None,) * len(ctx.needs_input_grad)
        x, conv, weight, bias, pre_weight, pre_bias, norm_weight, norm_bias, pre_mean, pre_var, mean, var = (
            ctx.saved_tensors
        )
        pre_norm, norm = (pre_weight, pre_bias, pre_mean, pre_var), (norm_weight, norm_bias, mean, var)
        needed = ctx.needs_input_grad[2:9]
        arguments = _low_level(weight, bias, pre_norm, norm, ctx.numbers)
        dx, *gradients = ctx.operators.backward(
            grad if grad.stride(2) == 1 else grad.contiguous(), x, conv, *arguments, needed[0], any(needed[1:])
        )
        parameters = (weight, bias, pre_weight, pre_bias, norm_weight, norm_bias)
        found = [
            gradient.to(parameter.dtype) if wanted and parameter is not None else None
            for gradient, parameter, wanted in zip(gradients, parameters, needed[1:], strict=True)
        ]
        return None, None, dx if needed[0] else None, *found, None, None, None, None


# --- A call ---------------------------------------------------------------------------------------------------------


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or tensor.is_contiguous() else tensor.contiguous()


def _flat(norm: BatchNorm | None) -> tuple[tuple[Tensor | None, ...], float, bool]:
    """(weight, bias, mean, var) to normalise with, eps, and whether mean and var have yet to be found."""
    if norm is None:
        return (None, None, None, None), 0.0, False
    weight, bias = _contiguous(norm.weight), _contiguous(norm.bias)
    if norm.use_batch_stats:
        return (weight, bias, None, None), norm.eps, True
    return (weight, bias, _contiguous(norm.running_mean), _contiguous(norm.running_var)), norm.eps, False


def _track(norm: BatchNorm, mean: Tensor, var: Tensor, count: int) -> None:
    """Move the running statistics as ``nn.BatchNorm2d`` does, the variance made unbiased."""
    if norm.running_mean is None or norm.running_var is None or norm.momentum == 0.0:
        return
    with torch.no_grad():
        keep = 1.0 - norm.momentum
        norm.running_mean.mul_(keep).add_(mean, alpha=norm.momentum)
        norm.running_var.mul_(keep).add_(var, alpha=norm.momentum * count / (count - 1))


def run(call: Call, operators: Operators, differentiate: bool) -> Tensor:
    """Compute a call with the kernels of one kind, and move the running statistics of norms in training.

    Args:
        differentiate: whether autograd will ask for gradients.
    """
    x = call.x if call.x.stride(2) == 1 else call.x.contiguous()
    weight, bias = call.weight.contiguous(), _contiguous(call.bias)
    pre_norm, pre_eps, pre_batch = _flat(call.pre_norm)
    norm, eps, batch = _flat(call.norm)
    codes = ACTIVATION_CODES[call.pre_activation], ACTIVATION_CODES[call.activation]
    geometry = (*call.grid, call.stride, call.padding, call.prefix_tokens, call.residual)
    if not (differentiate or pre_batch or batch):
        return operators.forward(x, weight, bias, *pre_norm, pre_eps, codes[0], *norm, eps, codes[1], *geometry)
    numbers = Numbers(pre_eps, pre_batch, codes[0], eps, batch, codes[1], *geometry)
    if differentiate:
        affine = (*pre_norm[:2], *norm[:2])
        found = _Differentiable.apply(operators, numbers, x, weight, bias, *affine, *pre_norm[2:], *norm[2:])
        if not (pre_batch or batch):
            return found
        out, *statistics = found
    else:
        out, _, *statistics = operators.training(x, *_low_level(weight, bias, pre_norm, norm, numbers))
    if pre_batch and call.pre_norm is not None:
        _track(call.pre_norm, statistics[0], statistics[1], x.shape[0] * call.grid[0] * call.grid[1])
    if batch and call.norm is not None:
        _track(call.norm, statistics[2], statistics[3], out.shape[0] * (out.shape[1] - call.prefix_tokens))
    return out
