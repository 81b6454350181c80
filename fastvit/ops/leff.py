"""CeiT's locally-enhanced feed-forward on tokens as they lie.

- ``cpp``: at inference, where the products are ours, ``csrc/leff``: the norm in front and the first product; the
  convolution with two norms and both GELUs in it; the second product with the last norm and the residual in it.
- ``cpp`` otherwise, ``cuda``, ``triton``: products around ``token_depthwise_conv`` by that backend, with the first two
  norms and both GELUs in it. On GPUs the products are the library's: by prediction (``benchmarks/gpu_model``) kernels
  with the convolution within a product of ours take more than twice as long, as they compute it several times.
- ``reference``: ``fastvit.reference.functional.leff``.

In a composition at inference prefix tokens go through every step with the others, and are put right at the end: that
costs less than cutting them off first and concatenating them last, which copies x and the result.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit.ops._checks import (
    check_batch,
    check_batch_norm,
    check_depthwise,
    check_grid,
    check_linear,
    check_parameter,
    check_tokens,
    fail,
)
from fastvit.ops._operator import AUTO, REFERENCE, Implementation, Operator, gradients_needed, is_dynamo_compiling
from fastvit.ops._packing import packed
from fastvit.ops._schema import Registered, define, norm_arguments, unpack
from fastvit.ops.linear import (
    NO_NORM,
    Mlp,
    cast_like,
    check_norm,
    check_residual,
    linear_dtype,
    multiply,
    packed_in_graph,
    takes_mlp,
)
from fastvit.ops.token_depthwise_conv import KERNELS, Convolution
from fastvit.reference import functional
from fastvit.reference.functional import LEFF_FORMS, BatchNorm, LayerNorm

__all__ = ["leff"]


class Call(NamedTuple):
    """The arguments of the public function. ``convolution`` is that of the hidden tokens, once x in it is replaced."""

    x: Tensor
    convolution: Convolution
    up_weight: Tensor
    up_bias: Tensor | None
    down_weight: Tensor
    down_bias: Tensor | None
    down_norm: BatchNorm | None
    form: str
    norm: LayerNorm | None
    residual: Tensor | None


def _check(call: Call) -> None:
    x, c = call.x, call.convolution
    check_tokens(x)
    check_grid(x, c.grid, c.prefix_tokens)
    hidden = check_linear("up_weight", call.up_weight, x.shape[2], x)
    if check_depthwise("dw_weight", c.weight, hidden, x) % 2 == 0:
        fail("dw_weight", "an odd kernel, which keeps the grid", c.weight)
    channels = check_linear("down_weight", call.down_weight, hidden, x)
    if c.prefix_tokens and channels != x.shape[2]:
        fail("down_weight", f"({x.shape[2]}, {hidden}), as many channels as x has with prefix tokens", call.down_weight)
    parts = (
        ("up", call.up_bias, c.pre_norm, hidden),
        ("dw", c.bias, c.norm, hidden),
        ("down", call.down_bias, call.down_norm, channels),
    )
    for name, bias, norm, size in parts:
        check_parameter(f"{name}_bias", bias, (size,), x)
        check_batch_norm(f"{name}_norm", norm, size, x)
    check_norm("norm", call.norm, x.shape[2], x)
    check_residual(call.residual, x, channels)
    if call.form not in LEFF_FORMS:
        fail("form", f"one of {LEFF_FORMS}", call.form)
    for name, _, norm, _ in parts:
        check_batch(f"{name}_norm", norm, x.shape[0] * c.grid[0] * c.grid[1])


# --- Registered operators -------------------------------------------------------------------------------------------


def _define_whole(name: str, layer: str) -> Registered:
    arguments = (
        "Tensor x, bool has_norm, Tensor? norm_weight, Tensor? norm_bias, float norm_eps",
        f"{layer.format('up')}, Tensor dw_weight, Tensor? dw_bias",
        f"{norm_arguments('up_norm')}, {norm_arguments('dw_norm')}",
        f"{layer.format('down')}, {norm_arguments('down_norm')}, Tensor? residual",
        "SymInt height, SymInt width, int prefix_tokens, bool paper",
    )
    fake = lambda a: a.x.new_empty((*a.x.shape[:2], a.down_weight.shape[0]))  # noqa: E731
    return define(name, ", ".join(arguments), "Tensor", fake)


_LAYER = "Tensor {0}_weight, Tensor? {0}_bias"
_packed_leff = _define_whole("packed_leff", f"{_LAYER}, Tensor? {{0}}_packed")
# For the graphs of torch.compile, which cannot hold a packed weight.
_leff = _define_whole("leff", _LAYER)


@torch.library.impl("fastvit::leff", "cpu")
def _run_compiled(*arguments: Any) -> Tensor:
    values = _leff.Arguments(*arguments)._asdict()
    values |= {f"{name}_packed": packed(values[f"{name}_weight"]) for name in ("up", "down")}
    return _packed_leff.eager(*(values[name] for name in _packed_leff.Arguments._fields))


# --- Implementations ------------------------------------------------------------------------------------------------


def _without_bias(norm: BatchNorm | None, bias: Tensor | None) -> tuple[BatchNorm | None, Tensor | None]:
    """The norm and the bias of the linear layer in front of it, where batch statistics take the bias away again.

    It would cost 16-bit results digits, and its gradient, zero, all of them; so it is left out, but for NaN and
    infinity. The norm then moves a running mean of its own, from which :func:`_move_mean` makes the right one.
    """
    if norm is None or bias is None or not norm.use_batch_stats or norm.layer is not None:
        return norm, bias
    mean = norm.running_mean
    return norm if mean is None else norm._replace(running_mean=mean.clone()), bias * 0.0


def _move_mean(norm: BatchNorm | None, moved: BatchNorm | None, bias: Tensor | None, values: int) -> None:
    """The running mean by that of a norm that has not seen the bias, of so many values."""
    if norm is moved or norm is None or moved is None or norm.running_mean is None or bias is None or not values:
        return
    with torch.no_grad():
        assert moved.running_mean is not None
        norm.running_mean.copy_(moved.running_mean.float() + norm.momentum * bias.float())


def _train(call: Call, kernels: Implementation) -> Tensor:
    """By differentiable pieces, prefix tokens kept out of the statistics."""
    c = call.convolution
    prefix, tokens = call.x[:, : c.prefix_tokens], call.x[:, c.prefix_tokens :]
    pre_norm, up_bias = _without_bias(c.pre_norm, call.up_bias)
    norm, down_bias = _without_bias(call.down_norm, call.down_bias)
    hidden = multiply(tokens, call.up_weight, up_bias)
    out = kernels.run(c._replace(x=hidden, prefix_tokens=0, pre_norm=pre_norm))
    out = multiply(out, call.down_weight, down_bias)
    if norm is not None and torch.compiler.is_compiling():  # which takes wrong strides for the other's gradient
        out = norm(out.flatten(0, 1)).view_as(out)
    elif norm is not None:  # over batch and tokens alike: torch's sums of (B, C, N) are of double
        image = out.transpose(1, 2)
        if out.dtype.itemsize == 2:  # but it rounds between the steps of their gradients, of (B, C, h, w) not
            image = image.unflatten(2, c.grid)
        out = norm(image).flatten(2).transpose(1, 2).contiguous()
    _move_mean(c.pre_norm, pre_norm, call.up_bias, hidden.numel())
    _move_mean(call.down_norm, norm, call.down_bias, out.numel())
    if call.form == "paper":
        out, prefix = F.gelu(out), torch.zeros_like(prefix)
    return torch.cat((prefix, out), dim=1) if c.prefix_tokens else out


def _trains(call: Call) -> bool:
    """Whether it needs gradients or statistics of the batch."""
    c = call.convolution
    for norm in (c.pre_norm, c.norm, call.down_norm):
        if norm is not None and norm.use_batch_stats:
            return True
    if not torch.is_grad_enabled():
        return False
    layers = (call.up_weight, call.up_bias, call.down_weight, call.down_bias)
    around = (*(call.down_norm or ())[:4], *(call.norm or ())[:2], call.residual)
    return gradients_needed(*c.tensors(), *layers, *around)


def _takes_whole(call: Call) -> bool:
    """Whether csrc/leff takes it: at inference, where the products are ours and their parameters in x's dtype."""
    layers = call.up_weight, call.up_bias, call.down_weight, call.down_bias
    for tensor in (*layers, call.residual):
        if tensor is not None and tensor.dtype != call.x.dtype:
            return False
    return not _trains(call) and takes_mlp(Mlp(call.x, *layers, "gelu", call.norm, None, call.residual))


def _run_whole(call: Call) -> Tensor:
    """By ``csrc/leff``."""
    c, (up, down) = call.convolution, (call.up_weight, call.down_weight)
    height, width = c.grid
    if call.form not in LEFF_FORMS or not (type(height) is type(width) is type(c.prefix_tokens) is int):
        _check(call)  # a schema takes True for 1, and a tensor of one number
    norm = NO_NORM if call.norm is None else (True, *call.norm)
    convolution = (c.weight, c.bias, *unpack(c.pre_norm), *unpack(c.norm))
    behind = (*unpack(call.down_norm), call.residual, height, width, c.prefix_tokens, call.form == "paper")
    if torch.compiler._is_exporting_flag:
        first, second = packed_in_graph(up, call.up_bias), packed_in_graph(down, call.down_bias)
        return _packed_leff.call(call.x, *norm, *first, *convolution, *second, *behind)
    if is_dynamo_compiling():
        return _leff.call(call.x, *norm, up, call.up_bias, *convolution, down, call.down_bias, *behind)
    layers = (up, call.up_bias, packed(up)), (down, call.down_bias, packed(down))
    return _packed_leff.eager(call.x, *norm, *layers[0], *convolution, *layers[1], *behind)


def _by(kernels: Implementation) -> Implementation:
    """The operator with the convolution computed so."""
    assert kernels.reasons is not None
    convolution_reasons = kernels.reasons

    def reasons(call: Call, named: bool) -> Iterator[str]:
        x, norm, convolution = call.x, call.down_norm, call.convolution
        if torch.is_autocast_enabled("cpu" if x.is_cpu else "cuda"):  # the hidden tokens may have another dtype than x
            convolution = convolution._replace(x=x[:, :, :1].to(linear_dtype(x)))
        yield from convolution_reasons(convolution, named)
        if kernels.name == "cpp" and convolution.x.dtype == torch.float16 and _trains(call):
            yield "it takes neither gradients nor statistics of a batch in float16"
        if norm is not None:
            if norm.process_group is not None:
                if is_dynamo_compiling():
                    yield "a synchronised norm is not traced"
            elif norm.layer is not None:
                yield f"down_norm is a {type(norm.layer).__name__}, which has to be called"
            elif norm.running_mean is None and not norm.use_batch_stats:
                yield "a norm has no statistics"

    def run(call: Call) -> Tensor:
        if kernels.name == "cpp" and _takes_whole(call):
            return _run_whole(call)
        norm, residual = call.norm, call.residual
        if norm is None and residual is None:
            return compose(call)
        _check(call)
        x = call.x if norm is None else norm.over_last(call.x)
        out = compose(call._replace(x=x, convolution=call.convolution._replace(x=x), norm=None, residual=None))
        return functional.add_scaled(out, None, residual)

    def compose(call: Call) -> Tensor:
        x, convolution, up_weight, up_bias, down_weight, down_bias, down_norm, form, _, _ = call
        if _trains(call):
            _check(call)  # before running statistics move
            return _train(call, kernels)
        if form not in LEFF_FORMS or convolution.weight.shape[3] % 2 == 0:
            raise ValueError("form or dw_weight")
        # Every token goes through every step, and the prefix tokens are put right at the end.
        hidden = kernels.run(Convolution(multiply(x, up_weight, up_bias), *convolution[1:]))
        out = multiply(hidden, down_weight, down_bias)
        if down_norm is not None:
            out = down_norm(out.flatten(0, 1)).view_as(out)
        if form == "paper":
            out = F.gelu(out)
        prefix_tokens = convolution.prefix_tokens
        if prefix_tokens:
            if out.dtype != x.dtype:
                out = out.to(torch.promote_types(out.dtype, x.dtype))
            prefix = out[:, :prefix_tokens]
            prefix.zero_() if form == "paper" else prefix.copy_(x[:, :prefix_tokens])
        return out

    return Implementation(kernels.name, run, reasons, kernels.validates)


def _run_reference(call: Call) -> Tensor:
    x, c = call.x, call.convolution
    layers = (call.up_weight, call.up_bias, c.weight, c.bias, call.down_weight, call.down_bias)
    return functional.leff(
        x,
        *cast_like(x, *layers),
        grid=c.grid,
        norm=call.norm,
        residual=call.residual,
        up_norm=c.pre_norm,
        dw_norm=c.norm,
        down_norm=call.down_norm,
        prefix_tokens=c.prefix_tokens,
        form=call.form,
    )


OPERATOR = Operator("leff", (*map(_by, KERNELS), Implementation(REFERENCE, _run_reference)), _check)


def leff(
    x: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    dw_weight: Tensor,
    dw_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    *,
    grid: tuple[int, int],
    up_norm: BatchNorm | None = None,
    dw_norm: BatchNorm | None = None,
    down_norm: BatchNorm | None = None,
    prefix_tokens: int = 1,
    form: str = "official",
    norm: LayerNorm | None = None,
    residual: Tensor | None = None,
    backend: str = AUTO,
) -> Tensor:
    """CeiT's locally-enhanced feed-forward, as what a residual adds to its input; with that, and a norm in front.

    On grid tokens: linear, norm, GELU, depthwise k x k convolution, norm, GELU, linear, norm. Prefix tokens pass by.

    Args:
        x: (B, P + h*w, C), floating, row-major grid tokens behind P prefix tokens.
        up_weight: (E, C), dw_weight: (E, 1, k, k) with k odd, down_weight: (O, E); O = C where there are prefix tokens.
            Biases: (E,), (E,) and (O,), or None. All on x's device.
        up_norm, dw_norm, down_norm: BatchNorm over channels after each, or None.
        grid: (h, w).
        form: "official" gives prefix tokens as they came, so that a residual doubles them, and has no GELU at the end;
            "paper" gives zeros for them, so that a residual leaves them be, and has a GELU after the last norm.
        norm: LayerNorm over C of all tokens, in front, in x's dtype or float32. residual: (B, P + h*w, O) in x's dtype,
            added at the end.
        backend: "auto", "cuda", "cpp", "triton" or "reference".

    Returns:
        (B, P + h*w, O).

    Raises:
        ValueError: a shape, device, number or name that is not accepted, or an unknown backend.
        RuntimeError: the backend asked for cannot run this call; lists every reason.

    Source: Yuan et al. 2021 (CeiT), section 3.2; the plain form is ``fastvit.reference.functional.leff``.
    """
    geometry = (grid, 1, None, prefix_tokens)  # None: the padding that keeps the grid
    convolution = Convolution(x, dw_weight, dw_bias, *geometry, up_norm, "gelu", dw_norm, "gelu")
    products = (up_weight, up_bias, down_weight, down_bias)
    return OPERATOR(Call(x, convolution, *products, down_norm, form, norm, residual), backend)
