"""CeiT's locally-enhanced feed-forward on tokens as they lie: the checks, and who computes it.

- ``cuda``, ``cpp``: the library's products around ``token_depthwise_conv`` by that backend, which takes the first two
  norms and both GELUs along.
- ``triton``: at inference ``kernels/leff.py``, which never brings the convolution's result into memory; in training,
  and for kernels of more than 3 x 3, as above.
- ``reference``: ``fastvit.reference.functional.leff``.

In a composition at inference prefix tokens go through every step with the others, and are put right at the end: that
costs less than taking them off in front and joining them again, which copies x and the result.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit.ops import _at_once, _convolved_products
from fastvit.ops._composition import (
    KERNELS,
    as_dtype_of,
    has_batch_statistics,
    linear,
    linear_dtype,
    parameters_of,
)
from fastvit.ops._convolution_checks import (
    check_bias,
    check_depthwise,
    check_grid,
    check_linear,
    check_norm,
    check_x,
)
from fastvit.ops._dispatch import Implementation, gradients_needed, select
from fastvit.ops._measured import fastest_first
from fastvit.ops._token_depthwise_conv_native import Call as Convolution
from fastvit.reference import functional
from fastvit.reference.functional import LEFF_FORMS, BatchNorm

__all__ = ["leff"]

_NAME = "leff"


class Call(NamedTuple):
    """The checked arguments of one call."""

    x: Tensor
    up_weight: Tensor
    up_bias: Tensor | None
    dw_weight: Tensor
    dw_bias: Tensor | None
    down_weight: Tensor
    down_bias: Tensor | None
    grid: tuple[int, int]
    up_norm: BatchNorm | None
    dw_norm: BatchNorm | None
    down_norm: BatchNorm | None
    prefix_tokens: int
    form: str

    def layers(self) -> tuple[tuple[Tensor, Tensor | None, BatchNorm | None], ...]:
        """Weight, bias and norm of each."""
        return (
            (self.up_weight, self.up_bias, self.up_norm),
            (self.dw_weight, self.dw_bias, self.dw_norm),
            (self.down_weight, self.down_bias, self.down_norm),
        )

    def norms(self) -> tuple[BatchNorm | None, ...]:
        """Those there are, and None."""
        return self.up_norm, self.dw_norm, self.down_norm


def _middle(call: Call, hidden: Tensor, prefix_tokens: int) -> Convolution:
    """The convolution with what surrounds it, of hidden tokens behind so many prefix tokens."""
    padding = call.dw_weight.shape[-1] // 2
    geometry = (call.grid, 1, padding, prefix_tokens)
    around = (call.up_norm, "gelu", call.dw_norm, "gelu")
    return Convolution(hidden, call.dw_weight, call.dw_bias, *geometry, *around, False)


def _expected_hidden(call: Call) -> Tensor:
    """A view with all of the hidden tokens but their values, to ask kernels whether they would take those."""
    channel = call.x[:, :, :1].to(linear_dtype(call.x))
    for parameter in (call.up_weight, call.up_bias):
        if parameter is not None and gradients_needed(parameter):
            channel = channel + parameter.flatten()[:1].to(channel.dtype)
    return channel.expand(-1, -1, call.up_weight.shape[0])


def _trains(call: Call) -> bool:
    parameters = parameters_of(*call[1:7], *call.norms())
    return has_batch_statistics(*call.norms()) or gradients_needed(call.x, *parameters)


def _normalise(norm: BatchNorm | None, tokens: Tensor) -> Tensor:
    """A norm over batch and tokens alike, as one of BatchNorm2d is over batch and map."""
    return tokens if norm is None else norm(tokens.flatten(0, 1)).view_as(tokens)


def _train(call: Call, kernels: Implementation) -> Tensor:
    """By differentiable pieces, prefix tokens kept out of the statistics."""
    prefix, tokens = call.x[:, : call.prefix_tokens], call.x[:, call.prefix_tokens :]
    hidden = kernels.run(_middle(call, linear(tokens, call.up_weight, call.up_bias), 0))
    out = _normalise(call.down_norm, linear(hidden, call.down_weight, call.down_bias))
    if call.form == "paper":
        out, prefix = F.gelu(out), torch.zeros_like(prefix)
    return torch.cat((prefix, out), dim=1) if call.prefix_tokens else out


def _infer(call: Call, kernels: Implementation) -> Tensor:
    """With every token through every step, and the prefix tokens put right at the end."""
    hidden = kernels.run(_middle(call, linear(call.x, call.up_weight, call.up_bias), call.prefix_tokens))
    return _finish(call, _normalise(call.down_norm, linear(hidden, call.down_weight, call.down_bias)))


def _feed_forward_at_once(x: Tensor, call: Call) -> Tensor:
    if call.form not in LEFF_FORMS or call.dw_weight.shape[-1] % 2 == 0:
        raise _at_once.NotAtOnceError
    hidden = _at_once.product(x, call.up_weight, call.up_bias)
    hidden = _at_once.convolution(hidden, call.dw_weight, call.dw_bias, *_middle(call, hidden, call.prefix_tokens)[3:])
    out = _at_once.product(hidden, call.down_weight, call.down_bias)
    return _finish(call, _at_once.normalise(out, call.down_norm))


def _finish(call: Call, out: Tensor) -> Tensor:
    """What is behind the last norm, with the prefix tokens put right."""
    if call.form == "paper":
        out = F.gelu(out)
    if call.prefix_tokens:
        out = out.to(torch.promote_types(out.dtype, call.x.dtype))
        prefix = out[:, : call.prefix_tokens]
        prefix.zero_() if call.form == "paper" else prefix.copy_(call.x[:, : call.prefix_tokens])
    return out


def _infer_by_triton(call: Call) -> Tensor:
    """By ``kernels/leff.py``, in the dtype that the linear layers take under autocast."""
    x, prefix_tokens = call.x.to(linear_dtype(call.x)), call.prefix_tokens
    layers = tuple((weight.to(x.dtype), bias, norm) for weight, bias, norm in call.layers())
    out = _convolved_products.leff(x, layers, call.grid, prefix_tokens, call.form == "paper")
    if prefix_tokens and x.dtype != call.x.dtype:
        out = out.to(torch.promote_types(x.dtype, call.x.dtype))
        if call.form == "official":
            out[:, :prefix_tokens] = call.x[:, :prefix_tokens]
    return out


def _by(kernels: Implementation) -> Implementation:
    """The composition whose convolution is computed so."""

    def reasons(call: Call) -> list[str]:
        found = kernels.reasons(_middle(call, _expected_hidden(call), call.prefix_tokens))
        if call.down_norm is not None and call.down_norm.layer is not None:
            layer = type(call.down_norm.layer).__name__
            found.append(f"down_norm is a {layer}, of which only the layer itself knows what it does")
        return found

    def run(call: Call) -> Tensor:
        if _trains(call):
            return _train(call, kernels)
        if kernels.name == "triton" and _convolved_products.leff_fits(
            call.x, *(weight for weight, _, _ in call.layers())
        ):
            return _infer_by_triton(call)
        return _infer(call, kernels)

    return Implementation(kernels.name, reasons, run)


def _run_reference(call: Call) -> Tensor:
    return functional.leff(
        call.x,
        *as_dtype_of(call.x, *call[1:7]),
        grid=call.grid,
        up_norm=call.up_norm,
        dw_norm=call.dw_norm,
        down_norm=call.down_norm,
        prefix_tokens=call.prefix_tokens,
        form=call.form,
    )


IMPLEMENTATIONS = (*map(_by, KERNELS), Implementation("reference", lambda call: [], _run_reference))
"""In order of preference."""


def _check(call: Call) -> None:
    x, prefix_tokens = call.x, call.prefix_tokens
    check_x(x)
    check_grid(x, call.grid, prefix_tokens)
    hidden = check_linear("up_weight", call.up_weight, x.shape[2], x)
    kernel = check_depthwise("dw_weight", call.dw_weight, hidden, x)
    if kernel % 2 == 0:
        raise ValueError(f"dw_weight: got a kernel of {kernel}, accepted are odd ones, which keep the grid")
    channels = check_linear("down_weight", call.down_weight, hidden, x)
    if prefix_tokens and channels != x.shape[2]:
        raise ValueError(
            f"down_weight: gives {channels} channels, accepted with prefix tokens are as many as x has, {x.shape[2]}"
        )
    for part, size in (("up", hidden), ("dw", hidden), ("down", channels)):
        check_bias(f"{part}_bias", getattr(call, f"{part}_bias"), size, x)
        check_norm(f"{part}_norm", getattr(call, f"{part}_norm"), size, x)
    if call.form not in LEFF_FORMS:
        raise ValueError(f"form: got {call.form!r}, accepted are {LEFF_FORMS}")


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
    backend: str = "auto",
) -> Tensor:
    """CeiT's locally-enhanced feed-forward, as what a residual adds to its input.

    On grid tokens: linear, norm, GELU, depthwise k x k convolution, norm, GELU, linear, norm. Prefix tokens pass by.

    Args:
        x: (B, P + h*w, C), floating, row-major grid tokens behind P prefix tokens.
        up_weight: (E, C), dw_weight: (E, 1, k, k) with k odd, down_weight: (O, E); O = C where there are prefix tokens.
            Biases: (E,), (E,) and (O,), or None. All on x's device.
        up_norm, dw_norm, down_norm: BatchNorm over channels behind each, or None.
        grid: (h, w).
        form: "official" gives prefix tokens as they came, so that a residual doubles them, and has no GELU at the end;
            "paper" gives zeros for them, so that a residual leaves them be, and has a GELU behind the last norm.
        backend: "auto", "cuda", "cpp", "triton" or "reference".

    Returns:
        (B, P + h*w, O).

    Raises:
        ValueError: a shape, device, number or name that is not accepted, or an unknown backend.
        RuntimeError: the backend asked for cannot run this call; lists every reason.

    Source: Yuan et al. 2021 (CeiT), section 3.2; the plain form is ``fastvit.reference.functional.leff``.
    """
    weights = (up_weight, up_bias, dw_weight, dw_bias, down_weight, down_bias)
    call = Call(x, *weights, grid, up_norm, dw_norm, down_norm, prefix_tokens, form)
    found = _at_once.tried(backend, _feed_forward_at_once, x, call)
    if found is not None:
        return found
    _check(call)
    return select(_NAME, fastest_first(_NAME, IMPLEMENTATIONS, backend, x, call), backend, (call,), {}).run(call)
