"""CeiT's locally-enhanced feed-forward on tokens as they lie.

- ``cpp``, ``cuda``: products around ``token_depthwise_conv`` by that backend, with the first two norms and both GELUs
  in it.
- ``triton``: at inference ``kernels/leff.py``, which never brings the convolution's result into memory; in training,
  and for kernels of more than 3 x 3, as above.
- ``reference``: ``fastvit.reference.functional.leff``.

In a composition at inference prefix tokens go through every step with the others, and are put right at the end: that
costs less than cutting them off first and concatenating them last, which copies x and the result.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

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
from fastvit.ops._operator import AUTO, REFERENCE, Implementation, Operator, gradients_needed
from fastvit.ops._schema import define, launch, norm_arguments, unpack
from fastvit.ops.linear import cast_like, linear_dtype, multiply
from fastvit.ops.token_depthwise_conv import KERNELS, Convolution
from fastvit.reference import functional
from fastvit.reference.functional import LEFF_FORMS, BatchNorm

__all__ = ["leff"]

MAX_FUSED_KERNEL = 3  # more taps spill registers


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
    if call.form not in LEFF_FORMS:
        fail("form", f"one of {LEFF_FORMS}", call.form)
    for name, _, norm, _ in parts:
        check_batch(f"{name}_norm", norm, x.shape[0] * c.grid[0] * c.grid[1])


# --- Registered operator --------------------------------------------------------------------------------------------

_EPILOGUES = ", ".join(f"Tensor? {part}_bias, {norm_arguments(f'{part}_norm')}" for part in ("up", "dw", "down"))
_fused = define(
    "leff_triton",
    f"Tensor x, Tensor up_weight, Tensor dw_weight, Tensor down_weight, {_EPILOGUES}, "
    "SymInt height, SymInt width, int prefix_tokens, bool paper",
    "Tensor",
    lambda a: a.x.new_empty((*a.x.shape[:2], a.down_weight.shape[0])),
).call
launch("leff_triton", "leff", "leff_operator", dense_parameters=True)


def _fits(call: Call) -> bool:
    """Whether the fused Triton kernels take these sizes: their offsets inside an image and in a weight are 32-bit."""
    weights = (call.up_weight, call.down_weight)
    small = (call.x.shape[1] + 64) * max(weight.shape[0] for weight in weights) < 2**30
    kernel = call.convolution.weight.shape[3]
    return kernel <= MAX_FUSED_KERNEL and small and max(weight.numel() for weight in weights) < 2**31


def _run_fused(call: Call) -> Tensor:
    """By ``kernels/leff.py``, in the dtype that the linear layers take under autocast."""
    x, c = call.x.to(linear_dtype(call.x)), call.convolution
    epilogues: list[Tensor | float | None] = []
    for bias, norm in ((call.up_bias, c.pre_norm), (c.bias, c.norm), (call.down_bias, call.down_norm)):
        epilogues += (bias, *unpack(norm))
    weights = (weight.to(x.dtype) for weight in (call.up_weight, c.weight, call.down_weight))
    out = _fused(x, *weights, *epilogues, *c.grid, c.prefix_tokens, call.form == "paper")
    if c.prefix_tokens and x.dtype != call.x.dtype:
        out = out.to(torch.promote_types(x.dtype, call.x.dtype))
        if call.form == "official":
            out[:, : c.prefix_tokens] = call.x[:, : c.prefix_tokens]
    return out


# --- Implementations ------------------------------------------------------------------------------------------------


def _train(call: Call, kernels: Implementation) -> Tensor:
    """By differentiable pieces, prefix tokens kept out of the statistics."""
    c, norm = call.convolution, call.down_norm
    prefix, tokens = call.x[:, : c.prefix_tokens], call.x[:, c.prefix_tokens :]
    hidden = multiply(tokens, call.up_weight, call.up_bias)
    out = multiply(kernels.run(c._replace(x=hidden, prefix_tokens=0)), call.down_weight, call.down_bias)
    if norm is not None and torch.compiler.is_compiling():  # which takes wrong strides for the other's gradient
        out = norm(out.flatten(0, 1)).view_as(out)
    elif norm is not None:  # over batch and tokens alike: torch's sums of (B, C, N) are of double
        image = out.transpose(1, 2)
        if out.dtype.itemsize == 2:  # but it rounds between the steps of their gradients, of (B, C, h, w) not
            image = image.unflatten(2, c.grid)
        out = norm(image).flatten(2).transpose(1, 2).contiguous()
    if call.form == "paper":
        out, prefix = F.gelu(out), torch.zeros_like(prefix)
    return torch.cat((prefix, out), dim=1) if c.prefix_tokens else out


def _trains(call: Call) -> bool:
    """Whether it needs gradients; under statistics of the batch it counts as training anyhow."""
    tensors = (call.up_weight, call.up_bias, call.down_weight, call.down_bias, *(call.down_norm or ())[:4])
    return gradients_needed(*call.convolution.tensors(), *tensors)


def _by(kernels: Implementation) -> Implementation:
    """The operator with the convolution computed so."""
    assert kernels.reasons is not None
    convolution_reasons = kernels.reasons

    def reasons(call: Call, named: bool) -> Iterator[str]:
        x, norm, convolution = call.x, call.down_norm, call.convolution
        if torch.is_autocast_enabled("cpu" if x.is_cpu else "cuda"):  # the hidden tokens may have another dtype than x
            convolution = convolution._replace(x=x[:, :, :1].to(linear_dtype(x)))
        yield from convolution_reasons(convolution, named)
        if norm is not None:
            if norm.layer is not None:
                yield f"down_norm is a {type(norm.layer).__name__}, which has to be called"
            elif norm.running_mean is None and not norm.use_batch_stats:
                yield "a norm has no statistics"

    def run(call: Call) -> Tensor:
        x, convolution, up_weight, up_bias, down_weight, down_bias, down_norm, form = call
        for norm in (convolution.pre_norm, convolution.norm, down_norm):
            if norm is not None and norm.use_batch_stats:
                _check(call)  # before running statistics move
                return _train(call, kernels)
        if torch.is_grad_enabled() and _trains(call):
            _check(call)
            return _train(call, kernels)
        if form not in LEFF_FORMS or convolution.weight.shape[3] % 2 == 0:
            raise ValueError("form or dw_weight")
        if kernels.name == "triton" and _fits(call):
            return _run_fused(call)
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
    backend: str = AUTO,
) -> Tensor:
    """CeiT's locally-enhanced feed-forward, as what a residual adds to its input.

    On grid tokens: linear, norm, GELU, depthwise k x k convolution, norm, GELU, linear, norm. Prefix tokens pass by.

    Args:
        x: (B, P + h*w, C), floating, row-major grid tokens behind P prefix tokens.
        up_weight: (E, C), dw_weight: (E, 1, k, k) with k odd, down_weight: (O, E); O = C where there are prefix tokens.
            Biases: (E,), (E,) and (O,), or None. All on x's device.
        up_norm, dw_norm, down_norm: BatchNorm over channels after each, or None.
        grid: (h, w).
        form: "official" gives prefix tokens as they came, so that a residual doubles them, and has no GELU at the end;
            "paper" gives zeros for them, so that a residual leaves them be, and has a GELU after the last norm.
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
    return OPERATOR(Call(x, convolution, *products, down_norm, form), backend)
