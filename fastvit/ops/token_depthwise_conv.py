"""Depthwise convolution of tokens as they lie, with the norms, activations and residual around it.

- ``cuda``: ``csrc/token_depthwise_conv``, its CUDA kernels; ``cpp``: its CPU kernels, float16 at inference alone.
- ``triton``: ``kernels/token_depthwise_conv*.py``, for ROCm and for installations without the extension; where both it
  and ``cuda`` take a call at inference, the faster one by measuring.
- ``reference``: ``fastvit.reference.functional.token_depthwise_conv``.

Kernels implement three registered operators of nearly the same arguments:

    token_depthwise_conv(x, weight, ...) -> out
        Inference; every norm has given statistics.
    token_depthwise_conv_training(x, weight, ...) -> (out, conv, pre_mean, pre_var, mean, var)
        The same, with batch statistics where ``*_batch`` is true (the given ones are then None): the float32 mean and
        biased variance of each channel of the grid tokens of x, and of the convolution's result. They are returned;
        size 0 where a norm is absent or uses given statistics. ``conv`` is the convolution's result, for the backward,
        of out's shape and dtype (prefix tokens unspecified), where a norm or an activation follows; else of size 0.
        Under batch statistics conv and mean are without the bias, which the norm takes away again: rounded to 16 bits
        with it, small results would lose their digits. A NaN or infinite bias makes var NaN.
    token_depthwise_conv_backward(grad, x, conv, weight, ...) -> (dx, dweight, dbias, dpre_norm_weight, dpre_norm_bias,
        dnorm_weight, dnorm_bias)
        ``conv`` and the statistics are those of the forward pass. dx has x's dtype, is contiguous, and includes the
        gradient of the prefix tokens; those of parameters are float32. Size 0: dx without ``x_grad``, parameters'
        without ``parameter_grads``, and those of parameters that are absent.

With t = pre_activation(pre_norm(x)), c = conv(t) + bias, n = norm(c), y = activation(n) [+ x], and M the number of
values of a channel in c, the gradients follow channel by channel, xhat being a norm's input less its mean over its
deviation (batch statistics; with given ones the bracket is dn alone):

    dn = dy activation'(n);  dnorm_bias = sum dn;  dnorm_weight = sum dn xhat
    dc = norm_weight / deviation [dn - dnorm_bias / M - xhat dnorm_weight / M]
    dbias = sum dc;  dweight = correlation of t with dc;  dt = transposed convolution of dc
    and for dt the same two steps backwards through pre_activation and pre_norm; dx gets dy added with ``residual``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvit import backends
from fastvit.ops._checks import (
    check_activation,
    check_batch,
    check_batch_norm,
    check_depthwise,
    check_geometry,
    check_grid,
    check_parameter,
    check_tokens,
    fail,
    out_size,
)
from fastvit.ops._operator import (
    AUTO,
    REFERENCE,
    Implementation,
    Operator,
    any_autocast,
    differentiable_backward,
    gradients_needed,
    is_dynamo_compiling,
    is_grad_enabled,
)
from fastvit.ops._schema import ACTIVATION_CODES, NO_NORM, define, launch, norm_arguments
from fastvit.reference import functional
from fastvit.reference.functional import BatchNorm

__all__ = ["token_depthwise_conv"]

_NAME = "token_depthwise_conv"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Convolution(NamedTuple):
    """The arguments of the public function."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    grid: tuple[int, int]
    stride: int = 1
    padding: int | None = None
    prefix_tokens: int = 0
    pre_norm: BatchNorm | None = None
    pre_activation: str | None = None
    norm: BatchNorm | None = None
    activation: str | None = None
    residual: bool = False

    def tensors(self) -> list[Tensor | None]:
        """Every tensor that a gradient could be asked for."""
        pre_norm, norm = self.pre_norm or (), self.norm or ()
        return [self.x, self.weight, self.bias, *pre_norm[:4], *norm[:4]]


def _check(call: Convolution) -> None:
    x, prefix_tokens = call.x, call.prefix_tokens
    check_tokens(x)
    channels = x.shape[2]
    kernel = check_depthwise("weight", call.weight, channels, x)
    check_parameter("bias", call.bias, (channels,), x)
    check_grid(x, call.grid, prefix_tokens)
    out = check_geometry(call.grid, kernel, call.stride, call.padding)
    if not isinstance(call.residual, bool):
        fail("residual", "a bool", call.residual)
    if call.residual and out != tuple(call.grid):
        fail("residual", f"False, since the convolution gives a grid of {out} from {tuple(call.grid)}", call.residual)
    check_activation("pre_activation", call.pre_activation)
    check_activation("activation", call.activation)
    check_batch_norm("pre_norm", call.pre_norm, channels, x)
    check_batch_norm("norm", call.norm, channels, x)
    check_batch("pre_norm", call.pre_norm, x.shape[0] * call.grid[0] * call.grid[1])
    check_batch("norm", call.norm, x.shape[0] * out[0] * out[1])


# --- Registered operators -------------------------------------------------------------------------------------------

_GEOMETRY = "SymInt height, SymInt width, int stride, int padding, int prefix_tokens, bool residual"


def _arguments(batch: bool, conv: str = "") -> str:
    pre_norm, after = norm_arguments("pre_norm", batch), norm_arguments("norm", batch)
    tensors = f"Tensor x, {conv}Tensor weight, Tensor? bias"
    return f"{tensors}, {pre_norm}, int pre_activation, {after}, int activation, {_GEOMETRY}"


def convolved(x: Tensor, weight: Tensor, a: Any) -> Tensor:
    """Empty, of the result's size; ``a`` has the geometry."""
    rows, columns = (out_size(size, weight.shape[-1], a.stride, a.padding) for size in (a.height, a.width))
    return x.new_empty((x.shape[0], a.prefix_tokens + rows * columns, x.shape[2]))


def _fake(a: Any) -> Tensor:
    return convolved(a.x, a.weight, a)


def _fake_training(a: Any) -> tuple[Tensor, ...]:
    out, channels = _fake(a), a.x.shape[2]
    keeps = a.norm_mean is not None or a.norm_batch or a.activation != 0
    sizes = (channels * used for used in (a.pre_norm_batch, a.pre_norm_batch, a.norm_batch, a.norm_batch))
    statistics = (a.x.new_empty(size, dtype=torch.float32) for size in sizes)
    return out, torch.empty_like(out) if keeps else a.x.new_empty(0), *statistics


def _fake_backward(a: Any) -> tuple[Tensor, ...]:
    parameters = (a.weight, a.bias, a.pre_norm_weight, a.pre_norm_bias, a.norm_weight, a.norm_bias)
    shapes = ((0,) if p is None or not a.parameter_grads else p.shape for p in parameters)
    gradients = (a.x.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return a.x.new_empty(a.x.shape if a.x_grad else (0,)), *gradients


class Kernels(NamedTuple):
    """The three registered operators of one kind of kernel (``eager``: see :class:`Registered`)."""

    forward: Callable[..., Tensor]
    eager: Callable[..., Tensor]
    training: Callable[..., tuple[Tensor, ...]]
    backward: Callable[..., tuple[Tensor, ...]]


def _define(suffix: str = "") -> Kernels:
    name = f"{_NAME}{suffix}"
    forward = define(name, _arguments(False), "Tensor", _fake)
    training = define(f"{name}_training", _arguments(True), f"({', '.join(['Tensor'] * 6)})", _fake_training)
    arguments = f"Tensor grad, {_arguments(True, 'Tensor conv, ')}, bool x_grad, bool parameter_grads"
    backward = define(f"{name}_backward", arguments, f"({', '.join(['Tensor'] * 7)})", _fake_backward)
    return Kernels(forward.call, forward.eager, training.call, backward.call)


NATIVE = _define()
"""The operators of ``fastvit._C``, for the CPU and for CUDA."""

TRITON = _define("_triton")
"""Operators of their own, since Triton's interpreter runs them on the CPU, too."""

for _suffix, _function in (("", "forward"), ("_training", "training"), ("_backward", "backward")):
    launch(f"{_NAME}_triton{_suffix}", _NAME + _suffix, f"{_NAME}_{_function}", on_tokens=True)


# --- Autograd -------------------------------------------------------------------------------------------------------


class Tensors(NamedTuple):
    """The tensors among a training operator's arguments: first those that have a gradient."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    pre_norm_weight: Tensor | None
    pre_norm_bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    pre_norm_mean: Tensor | None
    pre_norm_var: Tensor | None
    norm_mean: Tensor | None
    norm_var: Tensor | None


class Settings(NamedTuple):
    """The others."""

    pre_norm_eps: float
    pre_norm_batch: bool
    pre_activation: int
    norm_eps: float
    norm_batch: bool
    activation: int
    height: int
    width: int
    stride: int
    padding: int
    prefix_tokens: int
    residual: bool


_PARAMETERS = ("weight", "bias", "pre_norm_weight", "pre_norm_bias", "norm_weight", "norm_bias")
"""In the order in which the backward operator gives their gradients."""


def _in_order(t: Tensors, s: Settings) -> tuple[Any, ...]:
    """As the schema has them."""
    pre_norm = (t.pre_norm_weight, t.pre_norm_bias, t.pre_norm_mean, t.pre_norm_var, s.pre_norm_eps, s.pre_norm_batch)
    norm = (t.norm_weight, t.norm_bias, t.norm_mean, t.norm_var, s.norm_eps, s.norm_batch)
    geometry = (s.height, s.width, s.stride, s.padding, s.prefix_tokens, s.residual)
    return t.x, t.weight, t.bias, *pre_norm, s.pre_activation, *norm, s.activation, *geometry


class _Convolution(torch.autograd.Function):
    """A call in which gradients are needed: out, or with batch statistics (out, pre_mean, pre_var, mean, var)."""

    @staticmethod
    def forward(ctx: Any, kernels: Kernels, s: Settings, *tensors: Any) -> tuple[Tensor, ...] | Tensor:
        t = Tensors(*tensors)
        out, conv, pre_mean, pre_var, mean, var = kernels.training(*_in_order(t, s))
        if s.pre_norm_batch:
            t = t._replace(pre_norm_mean=pre_mean, pre_norm_var=pre_var)
        if s.norm_batch:
            t = t._replace(norm_mean=mean, norm_var=var)
        ctx.kernels, ctx.settings = kernels, s
        ctx.save_for_backward(conv, *t)
        ctx.set_materialize_grads(False)  # no zeros for the statistics
        if not (s.pre_norm_batch or s.norm_batch):
            return out
        ctx.mark_non_differentiable(pre_mean, pre_var, mean, var)
        return out, pre_mean, pre_var, mean, var

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
        _, _, *needed = ctx.needs_input_grad
        if grad is None:  # the result was not used
            return None, None, *(None for _ in needed)
        conv, *saved = ctx.saved_tensors
        t, s = Tensors(*saved), ctx.settings
        needs = dict(zip(Tensors._fields, needed, strict=True))
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():  # create_graph=True
            found = differentiable_backward(lambda *tensors: _plain(Tensors(*tensors), s), t, needed, grad)
            return None, None, *found
        x, *rest = _in_order(t, s)
        for_parameters = any(needs[name] for name in _PARAMETERS)
        dx, *gradients = ctx.kernels.backward(grad, x, conv, *rest, needs["x"], for_parameters)
        by_name: dict[str, Tensor | None] = {"x": dx if needs["x"] else None}
        for name, gradient in zip(_PARAMETERS, gradients, strict=True):
            parameter = getattr(t, name)
            by_name[name] = gradient.to(parameter.dtype) if needs[name] and parameter is not None else None
        return None, None, *map(by_name.get, Tensors._fields)


def _plain(t: Tensors, s: Settings) -> Tensor:
    """The call by the plain form; no running statistics move."""
    dtype = torch.promote_types(t.x.dtype, t.weight.dtype)
    x, weight, bias, pre_weight, pre_bias, norm_weight, norm_bias, pre_mean, pre_var, mean, var = (
        None if tensor is None else tensor.to(dtype) for tensor in t
    )
    assert x is not None and weight is not None
    names = {code: name for name, code in ACTIVATION_CODES.items()}
    pre_norm = norm = None
    if pre_mean is not None:
        pre_mean, pre_var = (None, None) if s.pre_norm_batch else (pre_mean, pre_var)
        pre_norm = BatchNorm(pre_mean, pre_var, pre_weight, pre_bias, s.pre_norm_batch, eps=s.pre_norm_eps)
    if mean is not None:
        mean, var = (None, None) if s.norm_batch else (mean, var)
        norm = BatchNorm(mean, var, norm_weight, norm_bias, s.norm_batch, eps=s.norm_eps)
    out = functional.token_depthwise_conv(
        x,
        weight,
        bias,
        grid=(s.height, s.width),
        stride=s.stride,
        padding=s.padding,
        prefix_tokens=s.prefix_tokens,
        pre_norm=pre_norm,
        pre_activation=names[s.pre_activation],
        norm=norm,
        activation=names[s.activation],
        residual=s.residual,
    )
    return out.to(t.x.dtype)


# --- A call by kernels ----------------------------------------------------------------------------------------------


def _runner(kernels: Kernels) -> Callable[[Convolution], Tensor]:
    """``run`` of an implementation by these kernels, norms that sum over several processes apart from them."""

    def run(call: Convolution) -> Tensor:
        x, weight, bias, grid, stride, padding, prefix_tokens, pre_norm, pre_activation, norm, activation, residual = (
            call
        )
        pre_mean, pre_var, pre_weight, pre_bias, pre_batch, _, pre_eps, _, pre_group = pre_norm or NO_NORM
        mean, var, norm_weight, norm_bias, batch, _, eps, _, group = norm or NO_NORM
        if pre_group is not None or group is not None:
            return _by_parts(call, run)
        pre_code, code = ACTIVATION_CODES[pre_activation], ACTIVATION_CODES[activation]
        height, width = grid
        padding = weight.shape[3] // 2 if padding is None else padding
        ints = type(height) is type(width) is type(stride) is type(padding) is type(prefix_tokens) is int
        if not ints or type(residual) is not bool:
            _check(call)  # a schema takes True for 1, and a tensor of one number
        differentiate = is_grad_enabled() and gradients_needed(*call.tensors())
        if not (differentiate or pre_batch or batch):
            forward = kernels.forward if is_dynamo_compiling() else kernels.eager
            # fmt: off
            out = forward(
                x, weight, bias, pre_weight, pre_bias, pre_mean, pre_var, pre_eps, pre_code,
                norm_weight, norm_bias, mean, var, eps, code, height, width, stride, padding, prefix_tokens, residual,
            )
            # fmt: on
        else:
            if pre_batch:  # the kernel does not see the running statistics, which are to be moved
                check_batch_norm("pre_norm", pre_norm, x.shape[2], x)
                pre_mean = pre_var = None
            if batch:
                check_batch_norm("norm", norm, x.shape[2], x)
                mean = var = None
            t = Tensors(x, weight, bias, pre_weight, pre_bias, norm_weight, norm_bias, pre_mean, pre_var, mean, var)
            geometry = (height, width, stride, padding, prefix_tokens, residual)
            s = Settings(pre_eps, pre_batch, pre_code, eps, batch, code, *geometry)
            out = _train(call, kernels, differentiate, t, s)
        if any_autocast() and torch.is_autocast_enabled(x.device.type):
            return out.to(_autocast_dtype(call))
        return out

    return run


def _by_parts(call: Convolution, run: Callable[[Convolution], Tensor]) -> Tensor:
    """With statistics of several processes: the kernels convolve, and what stands around that is computed apart."""
    _check(call)  # before running statistics move
    prefix, tokens = call.x[:, : call.prefix_tokens], call.x[:, call.prefix_tokens :]
    inner = _normalised(tokens, call.pre_norm, call.pre_activation, call.grid)
    out = run(Convolution(inner, call.weight, call.bias, call.grid, call.stride, call.padding))
    grid = check_geometry(call.grid, call.weight.shape[3], call.stride, call.padding)
    out = _normalised(out, call.norm, call.activation, grid)
    if call.residual:
        out = out + tokens
    return torch.cat((prefix, out), dim=1) if call.prefix_tokens else out


def _normalised(x: Tensor, norm: BatchNorm | None, activation: str | None, grid: tuple[int, int]) -> Tensor:
    """activation(norm(x)) of tokens (B, h*w, C)."""
    if norm is not None:
        x = norm(x.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)
    return functional.activate(x, activation)


def _train(call: Convolution, kernels: Kernels, differentiate: bool, t: Tensors, s: Settings) -> Tensor:
    """With gradients or statistics of the batch; moves running statistics when the result is there."""
    if not differentiate:
        out, _, pre_mean, pre_var, mean, var = kernels.training(*_in_order(t, s))
    elif s.pre_norm_batch or s.norm_batch:
        out, pre_mean, pre_var, mean, var = _Convolution.apply(kernels, s, *t)
    else:
        return _Convolution.apply(kernels, s, *t)
    if s.pre_norm_batch and call.pre_norm is not None:
        _track(call.pre_norm, pre_mean, None, pre_var, t.x.shape[0] * s.height * s.width)
    if s.norm_batch and call.norm is not None:
        _track(call.norm, mean, t.bias, var, out.shape[0] * (out.shape[1] - s.prefix_tokens))
    return out


def _track(norm: BatchNorm, mean: Tensor, bias: Tensor | None, var: Tensor, count: int) -> None:
    """Move the running statistics as ``nn.BatchNorm2d`` does: the mean with the bias, the variance made unbiased."""
    if norm.running_mean is None or norm.running_var is None:
        return
    share = norm.momentum
    with torch.no_grad():
        for running, new, factor in (
            (norm.running_mean, mean if bias is None else mean + bias, share),
            (norm.running_var, var, share * count / (count - 1)),
        ):
            wide = running.float()  # itself, unless of 16 bits: rounded once
            wide.mul_(1.0 - share).add_(new, alpha=factor)
            if wide is not running:
                running.copy_(wide)


def _autocast_dtype(call: Convolution) -> torch.dtype:
    """The dtype of the plain result: autocast lowers the convolution, adding or joining x raises it again."""
    lowered = torch.get_autocast_dtype(call.x.device.type)
    return torch.promote_types(call.x.dtype, lowered) if call.prefix_tokens or call.residual else lowered


# --- Implementations ------------------------------------------------------------------------------------------------


def _missing_kernel(device_type: str, reasons: list[str]) -> tuple[str, ...]:
    if reasons or backends.extension().has_op(_NAME, device_type):
        return tuple(reasons)
    return (f"fastvit._C has no {_NAME} for {device_type}",)


_CPP_REASONS = _missing_kernel("cpu", backends.cpp_reasons())
_CUDA_REASONS = _missing_kernel("cuda", backends.cuda_reasons())


def _reasons_of(
    unavailable: Callable[[Tensor, bool], Sequence[str]],
    dtypes: tuple[torch.dtype, ...],
    untrained: torch.dtype | None = None,
    max_kernel: int | None = None,
    available: bool = False,
) -> Callable[[Convolution, bool], Iterator[str]]:
    """``reasons`` of an implementation.

    Args:
        unavailable: ``unavailable(x, named)`` says why it cannot run where x is.
        untrained: one of the dtypes, in which it computes neither gradients nor statistics of a batch.
        available: whether that is nothing on the CPU, so that it need not be asked.
    """

    def reasons(call: Convolution, named: bool) -> Iterator[str]:
        x, weight, _, grid, stride, padding, _, pre_norm, _, norm, _, _ = call
        if not (available and x.is_cpu):
            yield from unavailable(x, named)
        if x.dtype not in dtypes:
            yield f"dtype {x.dtype} is not one of {', '.join(map(str, dtypes))}"
        if x.dtype is untrained:
            if is_grad_enabled() and gradients_needed(*call.tensors()):
                yield f"it has no backward in {str(x.dtype).removeprefix('torch.')}"
            if any(each is not None and each.use_batch_stats for each in (pre_norm, norm)):
                yield f"it takes no statistics of a batch in {str(x.dtype).removeprefix('torch.')}"
        if max_kernel is not None and weight.shape[3] > max_kernel:
            yield f"kernel size {weight.shape[3]} is larger than {max_kernel}"
        for each in (pre_norm, norm):
            if each is not None:
                if each.process_group is not None:
                    if is_dynamo_compiling():
                        yield "a synchronised norm is not traced"
                elif each.layer is not None:
                    yield f"a norm is a {type(each.layer).__name__}, which has to be called"
                elif each.running_mean is None and not each.use_batch_stats:
                    yield "a norm has no statistics"
                elif is_grad_enabled() and gradients_needed(each.running_mean, each.running_var):
                    yield "running statistics need gradients"
        if pre_norm is not None and pre_norm.use_batch_stats and x.shape[0] * grid[0] * grid[1] < 2:
            yield "batch statistics need more than one value per channel"
        if norm is not None and norm.use_batch_stats:
            kernel = weight.shape[3]
            padding = kernel // 2 if padding is None else padding
            rows, columns = (out_size(size, kernel, stride, padding) for size in grid)
            if x.shape[0] * rows * columns < 2:
                yield "batch statistics need more than one value per channel"

    return reasons


def _unavailable_cpp(x: Tensor, named: bool) -> Sequence[str]:
    return (*_CPP_REASONS, *(() if x.is_cpu else (f"it takes tensors on the CPU, x is on {x.device}",)))


def _unavailable_cuda(x: Tensor, named: bool) -> Sequence[str]:
    if not x.is_cuda:
        return (f"it takes tensors on a CUDA device, x is on {x.device}",)
    return _CUDA_REASONS or backends.cuda_reasons(x.device)


def _unavailable_triton(x: Tensor, named: bool) -> Sequence[str]:
    reasons = backends.triton_reasons(x.device)
    return reasons if named or not x.is_cpu else [*reasons, "on the CPU it is interpreted"]


def _run_reference(call: Convolution) -> Tensor:
    x, weight, bias, *_ = call
    options = call._asdict()
    for name in ("x", "weight", "bias"):
        del options[name]
    return functional.token_depthwise_conv(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), **options)


_CPP = _reasons_of(_unavailable_cpp, _DTYPES, untrained=torch.float16, available=not _CPP_REASONS)
_CUDA = _reasons_of(_unavailable_cuda, _DTYPES, max_kernel=13)  # one output's window must fit shared memory
_TRITON = _reasons_of(_unavailable_triton, _DTYPES, max_kernel=7)

KERNELS = (
    Implementation("cpp", _runner(NATIVE), _CPP, validates=True),
    Implementation("cuda", _runner(NATIVE), _CUDA, validates=True),
    Implementation("triton", _runner(TRITON), _TRITON),
)
"""In order of preference."""

OPERATOR = Operator(_NAME, (*KERNELS, Implementation(REFERENCE, _run_reference)), _check)


def token_depthwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    grid: tuple[int, int],
    stride: int = 1,
    padding: int | None = None,
    prefix_tokens: int = 0,
    pre_norm: BatchNorm | None = None,
    pre_activation: str | None = None,
    norm: BatchNorm | None = None,
    activation: str | None = None,
    residual: bool = False,
    backend: str = AUTO,
) -> Tensor:
    """Depthwise k x k convolution of tokens laid out as (B, P + h*w, C), with what surrounds it in the models.

    t = pre_activation(pre_norm(x)) on the grid tokens; y = activation(norm(conv(t) + bias)); y += x with ``residual``.
    Prefix tokens pass through untouched.

    Args:
        x: (B, P + h*w, C), floating, row-major grid tokens behind P prefix tokens.
        weight: (C, 1, k, k), cross-correlation as in ``nn.Conv2d``; bias: (C,). On x's device.
        grid: (h, w). stride: of the convolution. padding: k // 2 zeros on each side by default (zeros of t, not of x).
        norm, pre_norm: BatchNorm over channels. activation, pre_activation: None, "gelu" (erf), "gelu_tanh",
            "quick_gelu", "silu" or "relu".
        residual: adds the grid tokens of x; needs a convolution that keeps the grid size.
        backend: "auto", "cuda", "cpp", "triton" or "reference".

    Returns:
        (B, P + h'*w', C), contiguous where a kernel ran, with h' = (h + 2 * padding - k) // stride + 1, likewise w'.

    Raises:
        ValueError: a shape, device, number or name that is not accepted, or an unknown backend.
        RuntimeError: the backend asked for cannot run this call; lists every reason.

    Source: Chu et al. 2021 (CPVT), algorithm 1; Yuan et al. 2021 (CeiT), section 3.2; Wu et al. 2021 (CvT), 3.2; the
    plain form is ``fastvit.reference.functional.token_depthwise_conv``.
    """
    # fmt: off
    call = Convolution(
        x, weight, bias, grid, stride, padding, prefix_tokens, pre_norm, pre_activation, norm, activation, residual
    )
    # fmt: on
    return OPERATOR(call, backend)
