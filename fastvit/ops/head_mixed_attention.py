"""Attention mixed across heads: talking heads (CaiT), re-attention (DeepViT), and both.

- ``cpp``: ``csrc/head_mixed_attention``: all heads of a few queries at a time, so that their maps stay in the caches;
  float16 at inference alone.
- ``triton``: ``kernels/head_mixed_attention*.py``, the same on a GPU.
- ``reference``: ``fastvit.reference.functional.head_mixed_attention``; attention dropout is left to it.

Kernels mix maps by H x H matrices, and gather two sums over the maps, which they compute anew. A BatchNorm over heads
is folded into the mix in front of it: A and b with norm(W P + c) = A (P - m) + b, where m is 0 or 1 / Nk.

    by running statistics:  f_h = gamma_h / sqrt(var_h + eps);  A = diag(f) W;  b = beta + f (c - mean);  m = 0
    by the batch's:         the same with mean = W e + c and var_h = w_h^T C w_h, where e_g is the mean of map g over
                            the batch, queries and keys, and C the H x H covariance of the maps; m = 1 / Nk, which e is
                            without a mask, so that neither M nor the gradient of A is a difference of large numbers;
                            b = beta - f W (e - m)

That is arithmetic on H x H numbers, in float64, which costs nothing and which autocast leaves alone. So the backward of
batch statistics is two backward passes of the kernels, with H x H numbers between them. On a GPU, where each of these
small operations is a launch, a step in half precision is one operator forward and one backward: :class:`_Train`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvit import backends
from fastvit.ops._checks import (
    check_attention,
    check_batch_norm,
    check_number,
    check_parameter,
    check_probability,
    fail,
    four_axes,
)
from fastvit.ops._operator import (
    AUTO,
    REFERENCE,
    Implementation,
    Operator,
    any_autocast,
    compute_dtype,
    differentiable_backward,
    distinct,
    gradients_needed,
)
from fastvit.ops._schema import adjacent_channels, define, heads_last, launch
from fastvit.reference import functional
from fastvit.reference.functional import BatchNorm, LayerNorm, sums_over_processes

__all__ = ["head_mixed_attention", "re_attention", "talking_heads_attention"]

CPP_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TRAINED_DTYPES = (torch.float16, torch.bfloat16)
TRAINED_HEADS = 16
MAX_HEADS = 32
MAX_HEAD_DIM = 128
_CPP_REASONS = tuple(backends.cpp_reasons())


class Call(NamedTuple):
    """The arguments of the public functions.

    ``post_names`` is what the function called names the weight and bias of the mix after the softmax.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    pre_weight: Tensor | None
    pre_bias: Tensor | None
    post_weight: Tensor | None
    post_bias: Tensor | None
    norm: BatchNorm | LayerNorm | None
    output_scale: float
    mask: Tensor | None
    scale: float | None
    dropout_p: float
    dropout_after_mix: bool
    post_names: tuple[str, str] = ("post_weight", "post_bias")


def _check(call: Call) -> None:
    q, norm = call.q, call.norm
    check_attention(q, call.k, call.v, call.mask, call.scale)
    heads = q.shape[1]
    mixes = ("pre_weight", "pre_bias", call.pre_weight, call.pre_bias)
    for weight_name, bias_name, weight, bias in (mixes, (*call.post_names, call.post_weight, call.post_bias)):
        if weight is None and bias is not None:
            fail(bias_name, f"None without {weight_name}", bias)
        check_parameter(weight_name, weight, (heads, heads), q)
        check_parameter(bias_name, bias, (heads,), q)
    if isinstance(norm, LayerNorm):
        check_parameter("norm.weight", norm.weight, (heads,), q)
        check_parameter("norm.bias", norm.bias, (heads,), q)
        check_number("norm.eps", norm.eps)
    elif norm is not None and not isinstance(norm, BatchNorm):
        fail("norm", "BatchNorm.of(module), LayerNorm.of(module) or None", norm)
    elif norm is not None and norm.layer is None:
        check_batch_norm("norm", norm, heads, q)
    check_number("output_scale", call.output_scale)
    check_probability("dropout_p", call.dropout_p)


# --- Registered operators -------------------------------------------------------------------------------------------

_PRE = "Tensor? pre_weight, Tensor? pre_bias"
_MIXES = f"{_PRE}, Tensor? post_weight, Tensor? post_bias"
_AFFINE = "Tensor? norm_weight, Tensor? norm_bias"
_SETTINGS = "float norm_eps, bool layer_norm, float output_scale, bool centred, Tensor? mask, float scale"
_TENSORS = f"Tensor q, Tensor k, Tensor v, {_MIXES}, {_AFFINE}"


def _gradients(a: Any, names: str) -> Iterator[Tensor]:
    """Of small tensors, in float32; size 0 for what is absent."""
    for name in names.split():
        tensor = getattr(a, name)
        yield a.q.new_empty((0,) if tensor is None else tensor.shape, dtype=torch.float32)


def _fake_backward(a: Any) -> tuple[Tensor, ...]:
    small = "pre_weight pre_bias post_weight post_bias norm_weight norm_bias"
    return *map(heads_last, (a.q, a.k, a.v)), *_gradients(a, small)


def _fake_moments(a: Any) -> tuple[Tensor, Tensor]:
    heads = a.q.shape[1]
    return a.q.new_empty((heads,), dtype=torch.float32), a.q.new_empty((heads, heads), dtype=torch.float64)


class Kernels(NamedTuple):
    """The registered operators of one kind of kernel; mixes and norms in float32, mask with four axes.

    - ``forward(q, k, v, pre_weight, pre_bias, post_weight, post_bias, norm_weight, norm_bias, norm_eps, layer_norm,
      output_scale, centred, mask, scale)``: the result, (B, H, Nq, D) in the memory order of (B, Nq, H, D), in q's
      dtype; post_weight mixes the maps, less 1 / Nk if ``centred``; with ``layer_norm`` over heads, to which alone
      norm_weight and norm_bias belong.
    - ``backward(grad, *the same)``: the gradients of q, k, v in their dtype and in the memory order of (B, N, H, D),
      and of the six small tensors in float32, of size 0 for what is absent.
    - ``moments(q, k, pre_weight, pre_bias, mask, scale, weight)``: sums over b, i, j of P_g - 1/Nk (H,), and of the
      products (P_g - 1/Nk) (P_g' - 1/Nk) (H, H), in float64; P is zero where masked. Where the terms of the variance of
      a mix by ``weight`` cancel, the products are added up in float64, too (C++ only).
    - ``moments_backward(dsums, dmoments, q, k, pre_weight, pre_bias, mask, scale)``: the gradients of q, k, pre_weight
      and pre_bias, of float32.
    - ``train`` and ``train_backward``, or None: a training step, see
      :func:`fastvit.kernels.head_mixed_attention_training.head_mixed_attention_training`.
    """

    forward: Callable[..., Tensor]
    backward: Callable[..., tuple[Tensor, ...]]
    moments: Callable[..., tuple[Tensor, Tensor]]
    moments_backward: Callable[..., tuple[Tensor, ...]]
    train: Callable[..., tuple[Tensor, ...]] | None = None
    train_backward: Callable[..., tuple[Tensor, ...]] | None = None


def _define(suffix: str = "") -> Kernels:
    """The four operators. The first takes norm_mean and norm_var as well, running statistics that it folds itself."""
    running = "Tensor? norm_mean, Tensor? norm_var"
    forward = define(
        f"head_mixed_attention{suffix}", f"{_TENSORS}, {running}, {_SETTINGS}", "Tensor", lambda a: heads_last(a.q)
    )
    backward = define(
        f"head_mixed_attention{suffix}_backward",
        f"Tensor grad, {_TENSORS}, {_SETTINGS}",
        f"({', '.join(['Tensor'] * 9)})",
        _fake_backward,
    )
    inputs = f"Tensor q, Tensor k, {_PRE}, Tensor? mask, float scale"
    moments = define(f"head_map_moments{suffix}", f"{inputs}, Tensor weight", "(Tensor, Tensor)", _fake_moments)
    moments_backward = define(
        f"head_map_moments{suffix}_backward",
        f"Tensor dsums, Tensor dmoments, {inputs}",
        "(Tensor, Tensor, Tensor, Tensor)",
        lambda a: (heads_last(a.q), heads_last(a.k), *_gradients(a, "pre_weight pre_bias")),
    )
    return Kernels(forward.call, backward.call, moments.call, moments_backward.call)


def _like(a: Any, names: str) -> Iterator[Tensor]:
    """In the tensors' own dtypes; size 0 for what is absent."""
    for name in names.split():
        tensor = getattr(a, name)
        yield a.q.new_empty((0,)) if tensor is None else a.q.new_empty(tensor.shape, dtype=tensor.dtype)


def _fake_train(a: Any) -> tuple[Tensor, ...]:
    kept = a.q.new_empty((2 * a.q.shape[1] + 1, a.q.shape[1]) if a.batch_statistics else (0,), dtype=torch.float32)
    lse = a.q.new_empty(a.q.shape[:3], dtype=torch.float32)
    return heads_last(a.q), lse, kept, *_like(a, "norm_mean norm_var")


def _fake_train_backward(a: Any) -> tuple[Tensor, ...]:
    names = "pre_weight pre_bias post_weight post_bias norm_weight norm_bias"
    return *map(heads_last, (a.q, a.k, a.v)), *_like(a, names)


def _define_training(infer: Kernels) -> Kernels:
    """Add the training step, in Triton alone."""
    tensors = f"Tensor q, Tensor k, Tensor v, {_PRE}, Tensor post_weight, Tensor? post_bias, {_AFFINE}"
    running = "Tensor? norm_mean, Tensor? norm_var, float norm_eps, float momentum, bool batch_statistics"
    train = define(
        "head_mixed_attention_triton_training",
        f"{tensors}, {running}, float output_scale, float scale",
        f"({', '.join(['Tensor'] * 5)})",
        _fake_train,
    )
    backward = define(
        "head_mixed_attention_triton_training_backward",
        f"Tensor grad, {tensors}, Tensor lse, Tensor kept, float output_scale, float scale",
        f"({', '.join(['Tensor'] * 9)})",
        _fake_train_backward,
    )
    return infer._replace(train=train.call, train_backward=backward.call)


_INFER = _define()
_INFER_TRITON = _define_training(_define("_triton"))
launch("head_mixed_attention_triton", "head_mixed_attention", "head_mixed_attention_forward")
launch("head_mixed_attention_triton_backward", "head_mixed_attention_backward", "head_mixed_attention_backward")
launch("head_map_moments_triton", "head_mixed_attention_moments", "head_map_moments")
launch("head_map_moments_triton_backward", "head_mixed_attention_moments", "head_map_moments_backward")
for _end in ("", "_backward"):
    _name = f"head_mixed_attention_training{_end}"
    launch(f"head_mixed_attention_triton_training{_end}", "head_mixed_attention_training", _name)


def _without_statistics(infer: Kernels) -> Kernels:
    """Where gradients are needed, running statistics are folded by differentiable arithmetic."""

    def forward(*arguments: Any) -> Tensor:
        tensors, settings = arguments[:9], arguments[9:]
        return infer.forward(*tensors, None, None, *settings)

    return infer._replace(forward=forward)


CPP = _without_statistics(_INFER)
TRITON = _without_statistics(_INFER_TRITON)


# --- Autograd -------------------------------------------------------------------------------------------------------


def _present(gradients: tuple[Tensor, ...], tensors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(None if tensor is None else grad for grad, tensor in zip(gradients, tensors, strict=True))


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernels: Kernels,
        settings: tuple[float, bool, float, bool],  # norm_eps, layer_norm, output_scale, centred
        mask: Tensor | None,
        scale: float,
        *tensors: Tensor | None,  # q, k, v, pre_weight, pre_bias, post_weight, post_bias, norm_weight, norm_bias
    ) -> Tensor:
        ctx.save_for_backward(mask, *tensors)
        ctx.kernels, ctx.settings, ctx.scale = kernels, settings, scale
        return kernels.forward(*tensors, *settings, mask, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mask, *tensors = ctx.saved_tensors
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():  # create_graph=True
            _, _, _, _, *needed = ctx.needs_input_grad
            norm_eps, layer_norm, output_scale, centred = ctx.settings

            def plain(q, k, v, pre_weight, pre_bias, post_weight, post_bias, *affine):  # type: ignore[no-untyped-def]
                wide = torch.promote_types(q.dtype, torch.float32)
                if centred:
                    post_bias = post_bias - post_weight.sum(1) / k.shape[2]
                out = functional.head_mixed_attention(
                    *(tensor.to(wide) for tensor in (q, k, v)),
                    pre_weight=pre_weight,
                    pre_bias=pre_bias,
                    post_weight=post_weight,
                    post_bias=post_bias,
                    norm=LayerNorm(affine[0], affine[1], norm_eps) if layer_norm else None,
                    output_scale=output_scale,
                    mask=mask,
                    scale=ctx.scale,
                )
                return out.to(q.dtype)

            return None, None, None, None, *differentiable_backward(plain, tensors, needed, grad)
        gradients = ctx.kernels.backward(adjacent_channels(grad, grad.dtype), *tensors, *ctx.settings, mask, ctx.scale)
        return None, None, None, None, *_present(gradients, tensors)


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernels: Kernels,
        mask: Tensor | None,
        scale: float,
        weight: Tensor,  # of the mix whose variance is wanted; the moments are not a function of it
        *tensors: Tensor | None,  # q, k, pre_weight, pre_bias
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(mask, *tensors)
        ctx.kernels, ctx.scale = kernels, scale
        return kernels.moments(*tensors, mask, scale, weight)

    @staticmethod
    def backward(ctx: Any, dsums: Tensor, dmoments: Tensor) -> tuple[Tensor | None, ...]:
        mask, *tensors = ctx.saved_tensors
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():  # create_graph=True
            _, _, _, _, *needed = ctx.needs_input_grad

            def plain(q, k, pre_weight, pre_bias):  # type: ignore[no-untyped-def]
                wide = torch.promote_types(q.dtype, torch.float32)
                maps = (q.to(wide) * ctx.scale) @ k.to(wide).mT
                if pre_weight is not None:
                    maps = torch.einsum("hg,bgij->bhij", pre_weight, maps)
                if pre_bias is not None:
                    maps = maps + pre_bias[:, None, None]
                maps = functional.attention_probabilities(maps, mask) - 1.0 / k.shape[2]
                centred = maps.transpose(0, 1).flatten(1)
                return centred.sum(1), (centred @ centred.t()).double()

            return None, None, None, None, *differentiable_backward(plain, tensors, needed, (dsums, dmoments))
        gradients = ctx.kernels.moments_backward(dsums, dmoments.to(dsums.dtype), *tensors, mask, ctx.scale)
        return None, None, None, None, *_present(gradients, tensors)


class _Train(torch.autograd.Function):
    """A step in half precision, without a mask; a BatchNorm with batch statistics, or none."""

    @staticmethod
    def forward(
        ctx: Any,
        kernels: Kernels,
        settings: tuple[float, float, bool, float, float],  # eps, momentum, batch_statistics, output_scale, scale
        *tensors: Tensor | None,  # q, k, v, pre_weight, pre_bias, post_weight, post_bias, norm_weight, norm_bias,
        # norm_mean, norm_var
    ) -> tuple[Tensor, ...]:
        assert kernels.train is not None
        out, lse, kept, mean, var = kernels.train(*tensors, *settings)
        ctx.save_for_backward(lse, kept, *tensors[:-2])
        ctx.kernels, ctx.settings = kernels, settings
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        return out, mean, var

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        lse, kept, *tensors = ctx.saved_tensors
        eps, _momentum, batch_statistics, output_scale, scale = ctx.settings
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():  # create_graph=True
            _, _, *needed, _, _ = ctx.needs_input_grad

            def plain(q, k, v, pre_weight, pre_bias, post_weight, post_bias, *affine):  # type: ignore[no-untyped-def]
                gamma, beta = (_as(torch.float32, tensor) for tensor in affine)
                norm = BatchNorm(None, None, gamma, beta, use_batch_stats=True, eps=eps) if batch_statistics else None
                out = functional.head_mixed_attention(
                    *(tensor.float() for tensor in (q, k, v)),
                    pre_weight=_as(torch.float32, pre_weight),
                    pre_bias=_as(torch.float32, pre_bias),
                    post_weight=_as(torch.float32, post_weight),
                    post_bias=_as(torch.float32, post_bias),
                    norm=norm,
                    output_scale=output_scale,
                    scale=scale,
                )
                return out.to(q.dtype)

            return None, None, *differentiable_backward(plain, tensors, needed, grad), None, None
        grad = adjacent_channels(grad, grad.dtype)
        gradients = ctx.kernels.train_backward(grad, *tensors, lse, kept, output_scale, scale)
        return None, None, *_present(gradients, tensors), None, None


# --- BatchNorm over heads, folded -----------------------------------------------------------------------------------

Folded = tuple[Tensor, Tensor]
"""A (H, H) and b (H,), float64."""


def fold_running(norm: BatchNorm, weight: Tensor, bias: Tensor | None) -> Folded:
    """The mix followed by a norm with running statistics."""
    assert norm.running_mean is not None and norm.running_var is not None  # checked with the arguments
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight.double()
    mean = norm.running_mean.double()
    shift = factor * (-mean if bias is None else bias.double() - mean)
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    return factor[:, None] * weight.double(), shift


def fold_batch(
    norm: BatchNorm, weight: Tensor, bias: Tensor | None, sums: Tensor, moments: Tensor, keys: int, values: int
) -> Folded:
    """The mix followed by a norm with the batch's statistics; moves the running ones.

    Args:
        weight, bias: (H, H), and (H,) or None.
        sums, moments: (H,) and (H, H), of the maps less 1 / keys, as what is returned is to be applied to them.
        values: numbers in a map over the whole batch. Like the sums, those of this process.
    """
    wide = [_as(torch.float64, tensor) for tensor in (sums, moments, weight, bias, norm.weight, norm.bias)]
    settings = (norm.eps, norm.process_group, 1.0 / max(keys, 1), values)
    mix, shift, mean, variance, count = _FoldBatch.apply(settings, *wide)
    _track(norm, mean, variance, count)
    return mix, shift


class _FoldBatch(torch.autograd.Function):
    """By hand, since autograd makes some sixty small operations of it, which a step of a small batch feels."""

    @staticmethod
    def forward(
        ctx: Any,
        settings: tuple[float, Any, float, int],
        sums: Tensor,
        moments: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
    ) -> tuple[Tensor, ...]:
        _, group, centre, values = settings
        # About zero rather than about 1 / Nk, which is not every process's; float64 has the digits for that.
        totals = sums + values * centre
        products = moments + centre * (sums[:, None] + sums) + values * centre**2
        count, totals, products = sums_over_processes(group, sums.new_full((1,), values), totals, products)
        mix, shift, mean, variance, saved = _fold(settings, sums, count, totals, products, weight, bias, gamma, beta)
        ctx.save_for_backward(sums, moments, weight, bias, gamma, beta, count, *saved)
        ctx.settings = settings
        ctx.mark_non_differentiable(mean, variance, count)
        return mix, shift, mean, variance, count

    @staticmethod
    def backward(ctx: Any, dmix: Tensor, dshift: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        sums, moments, weight, bias, gamma, beta, count, each, apart, moved, inverse, factor = ctx.saved_tensors
        _, group, centre, values = ctx.settings
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():  # create_graph=True
            if group is not None:
                raise RuntimeError("norm: double backward through statistics of several processes is not implemented")

            def plain(sums, moments, weight, bias, gamma, beta):  # type: ignore[no-untyped-def]
                totals = sums + values * centre
                products = moments + centre * (sums[:, None] + sums) + values * centre**2
                return _fold(ctx.settings, sums, count, totals, products, weight, bias, gamma, beta)[:2]

            _, *needed = ctx.needs_input_grad
            tensors = (sums, moments, weight, bias, gamma, beta)
            return None, *differentiable_backward(plain, tensors, needed, (dmix, dshift))
        dfactor = (dmix * weight).sum(1) - dshift * (weight @ apart)
        dmean = -factor * dshift
        dvariance = -0.5 * dfactor * factor * inverse.square()
        dcovariance = weight.t() @ (dvariance[:, None] * weight)
        deach = weight.t() @ dmean - 2.0 * (dcovariance @ each)
        # Every process's result depends on every one's sums.
        dtotals, dproducts = sums_over_processes(group, deach / count, dcovariance / count)
        dsums = dtotals + 2.0 * centre * dproducts.sum(1)
        dweight = factor[:, None] * dmix + dmean[:, None] * apart + 2.0 * dvariance[:, None] * moved
        return (
            None,
            dsums,
            dproducts,
            dweight,
            None if bias is None else (dmean + dvariance) * 0.0,  # the mean takes a bias away again; NaN stays NaN
            None if gamma is None else dfactor * inverse,
            None if beta is None else dshift,
        )


def _fold(settings, sums, count, totals, products, weight, bias, gamma, beta):  # type: ignore[no-untyped-def]
    """(A, b, mean, variance, what the backward needs) from sums over the batch; differentiable."""
    eps, group, centre, values = settings
    each = totals / count
    apart = sums / values if group is None else each - centre  # the former whatever the kernels round the centre to
    covariance = products / count - each[:, None] * each
    moved = weight @ covariance
    variance = (moved * weight).sum(1)
    if bias is not None:
        variance = variance + bias * 0.0  # the mean takes a bias away again, but not a NaN or inf
    mean = weight @ each
    inverse = (variance + eps).rsqrt()
    factor = inverse if gamma is None else inverse * gamma
    shift = -factor * (weight @ apart)
    saved = (each, apart, moved, inverse, factor)
    return (
        factor[:, None] * weight,
        shift if beta is None else shift + beta,
        mean if bias is None else mean + bias,
        variance,
        saved,
    )


def _track(norm: BatchNorm, mean: Tensor, variance: Tensor, count: Tensor) -> None:
    """Move the running statistics, in place, as ``nn.BatchNorm2d`` does: the variance without bias."""
    if norm.running_mean is None or norm.running_var is None:
        return
    with torch.no_grad():
        unbiased = variance * (count / (count - 1.0))
        for running, new in ((norm.running_mean, mean), (norm.running_var, unbiased)):
            running.copy_(torch.lerp(running.double(), new, norm.momentum))


# --- Implementations ------------------------------------------------------------------------------------------------


def _parameters(call: Call) -> tuple[Tensor | None, ...]:
    """Every small tensor that a gradient may be asked for."""
    norm = call.norm
    affine = (None, None) if norm is None else (norm.weight, norm.bias)
    return call.pre_weight, call.pre_bias, call.post_weight, call.post_bias, *affine


def attend(kernels: Kernels, call: Call) -> Tensor:
    """The call by these kernels, differentiable but for dropout; moves the running statistics of a BatchNorm."""
    dtype = compute_dtype(call.q)
    small = torch.promote_types(dtype, torch.float32)
    q, k, v = (adjacent_channels(tensor, dtype) for tensor in call[:3])
    if torch.compiler.is_dynamo_compiling():
        q, k, v = distinct(q, k, v)
    mask = None if call.mask is None else four_axes(call.mask, key_padding=True)
    scale = q.shape[3] ** -0.5 if call.scale is None else call.scale
    weight, bias, norm = call.post_weight, call.post_bias, call.norm
    affine: tuple[Tensor | None, Tensor | None] = None, None
    eps, layer_norm, centred = 0.0, isinstance(norm, LayerNorm), False
    if isinstance(norm, LayerNorm):
        affine, eps = (_as(small, norm.weight), _as(small, norm.bias)), norm.eps
    elif norm is not None and not norm.use_batch_stats:
        assert weight is not None
        if 0 in (q.shape[0], q.shape[2], k.shape[2]):  # gradients of zero, which folding would multiply by a NaN
            nothing = sum(t.flatten()[:0].sum() for t in (q, k, v, *_parameters(call)) if t is not None)
            return (torch.zeros_like(q) + nothing).to(dtype)
        weight, bias = (_as(small, tensor) for tensor in fold_running(norm, weight, bias))
        norm = None
    call = call._replace(post_weight=weight, post_bias=bias, norm=norm)
    if _trains(kernels, call, dtype, scale):
        return _train(kernels, call, q, k, v, scale)
    pre = _as(small, call.pre_weight), _as(small, call.pre_bias)
    if isinstance(norm, BatchNorm):
        assert weight is not None
        sums, moments = _Moments.apply(kernels, mask, scale, _as(small, weight.detach()), q, k, *pre)
        keys, centred = k.shape[2], True
        weight, bias = fold_batch(norm.opened(), weight, bias, sums, moments, keys, q.shape[0] * q.shape[2] * keys)
    post = _as(small, weight), _as(small, bias)
    settings = (eps, layer_norm, call.output_scale, centred)
    return _Mix.apply(kernels, settings, mask, scale, q, k, v, *pre, *post, *affine)


def _trains(kernels: Kernels, call: Call, dtype: torch.dtype, scale: float) -> bool:
    """Whether a step is one operator."""
    norm, size = call.norm, call.q.shape
    norm_fits = norm is None or (
        isinstance(norm, BatchNorm) and norm.use_batch_stats and norm.layer is None and norm.process_group is None
    )
    fits = kernels.train is not None and dtype in TRAINED_DTYPES and size[1] <= TRAINED_HEADS and norm_fits
    return (
        fits and call.mask is None and call.post_weight is not None and scale > 0 and 0 not in (*size, call.k.shape[2])
    )


def _train(kernels: Kernels, call: Call, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The step; moves the running statistics."""
    norm = call.norm
    batch_statistics = isinstance(norm, BatchNorm)
    eps, momentum = (norm.eps, norm.momentum) if isinstance(norm, BatchNorm) else (0.0, 0.0)
    running = (norm.running_mean, norm.running_var) if isinstance(norm, BatchNorm) else (None, None)
    settings = (eps, momentum, batch_statistics, float(call.output_scale), float(scale))
    tensors = [q, k, v, *_parameters(call), *running]
    if torch.compiler.is_dynamo_compiling():
        tensors = distinct(*tensors)
    out, *moved = _Train.apply(kernels, settings, *tensors)
    tracked = [tensor for tensor in running if tensor is not None]
    if tracked:
        with torch.no_grad():
            torch._foreach_copy_(tracked, moved)
    return out


def _as(dtype: torch.dtype, tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _run(infer: Kernels, kernels: Kernels, call: Call) -> Tensor:
    """Inference in one call, a BatchNorm with running statistics folded there; the rest by :func:`attend`."""
    q, k, v, pre_weight, pre_bias, post_weight, post_bias, norm, output_scale, mask, scale, *_ = call
    layer_norm = isinstance(norm, LayerNorm)
    batch_stats = norm is not None and not isinstance(norm, LayerNorm) and norm.use_batch_stats
    if batch_stats or (torch.is_grad_enabled() and gradients_needed(q, k, v, *_parameters(call))):
        _check(call)  # before running statistics move, and before H x H arithmetic could broadcast
        return attend(kernels, call)
    if type(output_scale) is not float or not (scale is None or type(scale) is float):
        _check(call)  # a schema takes a tensor of one number
    if any_autocast():
        dtype = compute_dtype(q)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if not q.stride()[3] == k.stride()[3] == v.stride()[3] == 1:
        q, k, v = (adjacent_channels(tensor, tensor.dtype) for tensor in (q, k, v))
    if mask is not None and mask.dim() != 4:
        mask = four_axes(mask, key_padding=True)
    normed: tuple[Any, ...] = (None, None, None, None, 0.0)
    if isinstance(norm, LayerNorm):
        normed = norm.weight, norm.bias, None, None, norm.eps
    elif norm is not None:
        normed = norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps
    scale = q.shape[3] ** -0.5 if scale is None else scale
    mixes = (pre_weight, pre_bias, post_weight, post_bias)
    return infer.forward(q, k, v, *mixes, *normed, layer_norm, output_scale, False, mask, scale)


def _reasons_of(
    unavailable: Callable[[Tensor, bool], Sequence[str]],
    dtypes: tuple[torch.dtype, ...],
    untrained: torch.dtype | None = None,
    available: bool = False,
    folds: bool = False,
) -> Callable[[Call, bool], Iterator[str]]:
    """``reasons`` of an implementation.

    Args:
        unavailable: ``unavailable(q, named)`` says why it cannot run where q is.
        untrained: one of the dtypes, in which it computes neither gradients nor statistics of a batch.
        available: whether that is nothing on the CPU, so that it need not be asked.
        folds: whether its kernels take running statistics, so that inference needs no matrix to fold them into.
    """

    def reasons(call: Call, named: bool) -> Iterator[str]:
        q, norm = call.q, call.norm
        if not (available and q.is_cpu):
            yield from unavailable(q, named)
        dtype = compute_dtype(q) if any_autocast() else q.dtype
        if dtype not in dtypes:
            yield f"dtype {dtype} is not one of {', '.join(map(str, dtypes))}"
        if dtype is untrained:
            if torch.is_grad_enabled() and gradients_needed(q, call.k, call.v, *_parameters(call)):
                yield f"it has no backward in {str(dtype).removeprefix('torch.')}"
            if isinstance(norm, BatchNorm) and norm.use_batch_stats:
                yield f"it takes no statistics of a batch in {str(dtype).removeprefix('torch.')}"
        if q.shape[1] > MAX_HEADS:
            yield f"{q.shape[1]} heads are more than {MAX_HEADS}"
        if q.shape[3] > MAX_HEAD_DIM:
            yield f"head dimension {q.shape[3]} is larger than {MAX_HEAD_DIM}"
        if call.dropout_p != 0.0:
            yield "attention dropout is not implemented"
        small: tuple[Tensor | None, ...] = (call.pre_weight, call.pre_bias, call.post_weight, call.post_bias)
        if norm is not None:
            small += norm[:2] if isinstance(norm, LayerNorm) else norm[:4]
        for tensor in small:
            if tensor is not None and tensor.dtype not in dtypes:
                yield f"a parameter has dtype {tensor.dtype}"
        for weight, bias in ((call.pre_weight, call.pre_bias), (call.post_weight, call.post_bias)):
            if weight is None and bias is not None:
                yield "a mix has a bias and no weight"
        if norm is None or isinstance(norm, LayerNorm):
            return
        if call.post_weight is None and not (
            folds and not norm.use_batch_stats and not gradients_needed(q, call.k, call.v, *_parameters(call))
        ):
            yield "a BatchNorm has no mix in front of it"  # the matrix to fold it into has zeros, and 0 * NaN is NaN
        if norm.layer is not None:
            if norm.process_group is None:
                yield f"the norm is {type(norm.layer).__name__}, which has to be called"
            elif torch.compiler.is_compiling():
                yield "a synchronised norm is not traced"
        elif norm.running_mean is None and not norm.use_batch_stats:
            yield "the norm has no statistics"
        elif norm.use_batch_stats and q.shape[0] * q.shape[2] * call.k.shape[2] <= 1:
            yield "batch statistics need more than one value per head"

    return reasons


def _unavailable_cpp(q: Tensor, named: bool) -> Sequence[str]:
    return (*_CPP_REASONS, *(() if q.is_cpu else (f"it takes tensors on the CPU, q is on {q.device}",)))


def _unavailable_triton(q: Tensor, named: bool) -> Sequence[str]:
    reasons = list(backends.triton_reasons(q.device))
    if q.is_cpu and compute_dtype(q) == torch.bfloat16:
        reasons.append("Triton's interpreter multiplies bfloat16 as integers")
    return reasons if named or not q.is_cpu else [*reasons, "on the CPU it is interpreted"]


_cpp_reasons = _reasons_of(
    _unavailable_cpp, CPP_DTYPES, untrained=torch.float16, available=not _CPP_REASONS, folds=True
)
_triton_reasons = _reasons_of(_unavailable_triton, TRITON_DTYPES)


def _run_reference(call: Call) -> Tensor:
    # torch's convolution wants the maps' dtype, which autocast sees to itself.
    mixes = (call.pre_weight, call.pre_bias, call.post_weight, call.post_bias)
    dtype, norm = call.q.dtype, call.norm
    pre_weight, pre_bias, post_weight, post_bias = (_as(dtype, tensor) for tensor in mixes)
    if isinstance(norm, LayerNorm):
        norm = norm._replace(weight=_as(dtype, norm.weight), bias=_as(dtype, norm.bias))
    return functional.head_mixed_attention(
        call.q,
        call.k,
        call.v,
        pre_weight=pre_weight,
        pre_bias=pre_bias,
        post_weight=post_weight,
        post_bias=post_bias,
        norm=norm,
        output_scale=call.output_scale,
        mask=call.mask,
        scale=call.scale,
        dropout_p=call.dropout_p,
        dropout_after_mix=call.dropout_after_mix,
    )


OPERATOR = Operator(
    "head_mixed_attention",
    (
        Implementation("cpp", functools.partial(_run, _INFER, CPP), _cpp_reasons, validates=True),
        Implementation("triton", functools.partial(_run, _INFER_TRITON, TRITON), _triton_reasons),
        Implementation(REFERENCE, _run_reference),
    ),
    _check,
)


def head_mixed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    pre_weight: Tensor | None = None,
    pre_bias: Tensor | None = None,
    post_weight: Tensor | None = None,
    post_bias: Tensor | None = None,
    norm: BatchNorm | LayerNorm | None = None,
    output_scale: float = 1.0,
    mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_after_mix: bool = False,
    backend: str = AUTO,
) -> Tensor:
    """Attention whose maps are mixed linearly across heads before and/or after the softmax; no map is written.

    S_g = scale * q_g k_g^T;  S'_h = sum_g pre_weight[h, g] S_g + pre_bias[h];  P_h = softmax(S'_h);
    M_h = output_scale * norm(sum_g post_weight[h, g] P_g + post_bias[h]);  out_h = M_h v_h.

    Args:
        q: (B, H, Nq, D), floating, any strides.
        k, v: (B, H, Nk, D), dtype and device of q (under autocast dtypes may differ).
        pre_weight, post_weight: (H, H), row h makes output head h; None leaves that mix out. pre_bias, post_bias: (H,).
        norm: BatchNorm or LayerNorm over heads on the mixed map, or None. A BatchNorm that uses the batch's statistics
            has its running statistics updated in place; a synchronised one sums over its processes.
        output_scale: factor on the finished map.
        mask: bool, True = attend; (B, Nk) key padding, or broadcastable to (B, H, Nq, Nk). Applied to the mixed logits;
            the finished map is zero at masked positions too. A row with no key left gives zeros.
        scale: D ** -0.5 by default.
        dropout_p: on the softmaxed maps, or on the finished map with ``dropout_after_mix``; pass 0 outside training.
        backend: "auto", "cpp", "triton" or "reference".

    Returns:
        (B, H, Nq, D) in q's dtype, or autocast's.

    Raises:
        ValueError: a shape, dtype, device or probability that is not accepted, or an unknown backend.
        RuntimeError: the backend asked for cannot run this call; lists every reason.

    Source: Zhou et al. 2021 (DeepViT), section 4; Touvron et al. 2021 (CaiT); Shazeer et al. 2020 (talking heads). The
    plain form is ``fastvit.reference.functional.head_mixed_attention``.
    """
    mixes = (pre_weight, pre_bias, post_weight, post_bias)
    return OPERATOR(Call(q, k, v, *mixes, norm, output_scale, mask, scale, dropout_p, dropout_after_mix), backend)


def talking_heads_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pre_weight: Tensor,
    pre_bias: Tensor | None,
    post_weight: Tensor,
    post_bias: Tensor | None,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str = AUTO,
) -> Tensor:
    """CaiT's talking heads: heads mixed before and after the softmax, dropout on the finished map.

    Arguments, result and errors as in :func:`head_mixed_attention`. Source: facebookresearch/deit ``cait_models.py``.
    """
    if pre_weight is None or post_weight is None:
        fail("pre_weight" if pre_weight is None else "post_weight", "a floating tensor (H, H)", None)
    mixes = (pre_weight, pre_bias, post_weight, post_bias)
    return OPERATOR(Call(q, k, v, *mixes, None, 1.0, mask, scale, dropout_p, True), backend)


def re_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: BatchNorm | LayerNorm | None,
    *,
    output_scale: float = 1.0,
    mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str = AUTO,
) -> Tensor:
    """DeepViT's re-attention: softmax, dropout, linear mix across heads, norm over heads, output scale.

    Arguments, result and errors as in :func:`head_mixed_attention`; ``weight`` (H, H) is the 1x1 convolution's. Source:
    Zhou et al. 2021, equation 3, and zhoudaquan/dvit_repo ``layers.py``; with a LayerNorm and no bias it is
    lucidrains/vit-pytorch's.
    """
    if weight is None:
        fail("weight", "a floating tensor (H, H)", None)
    names = ("weight", "bias")
    return OPERATOR(
        Call(q, k, v, None, None, weight, bias, norm, output_scale, mask, scale, dropout_p, False, names), backend
    )
