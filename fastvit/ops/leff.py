"""CeiT's locally-enhanced feed-forward on tokens as they lie.

- ``cpp``, ``cuda``: products around ``token_depthwise_conv`` by that backend, with the first two norms and both GELUs in
  it.
- ``triton``: at inference ``kernels/leff.py``, which never brings the convolution's result into memory; in training, and
  for kernels of more than 3 x 3, as above.
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
    check_batch_norm,
    check_depthwise,
    check_grid,
    check_linear,
    check_parameter,
    check_tokens,
    fail,
)
from fastvit.ops._operator import AUTO, REFERENCE, Implementation, Operator, gradients_needed, never
from fastvit.ops._schema import NO_NORM, contiguous, define, launch, norm, unpack
from fastvit.ops.linear import cast_like, linear_dtype, product
from fastvit.ops.token_depthwise_conv import KERNELS, Convolution
from fastvit.reference import functional
from fastvit.reference.functional import LEFF_FORMS, BatchNorm

__all__ = ["leff"]

MAX_FUSED_KERNEL = 3  # more taps spill registers


class Call(NamedTuple):
    """The arguments of the public function."""

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

    def norms(self) -> tuple[BatchNorm | None, ...]:
        """Those there are, and None."""
        return self.up_norm, self.dw_norm, self.down_norm

    def layers(self) -> tuple[tuple[Tensor, Tensor | None, BatchNorm | None], ...]:
        """Weight, bias and norm of each."""
        return (
            (self.up_weight, self.up_bias, self.up_norm),
            (self.dw_weight, self.dw_bias, self.dw_norm),
            (self.down_weight, self.down_bias, self.down_norm),
        )

    def uses_batch_statistics(self) -> bool:
        """Whether one of the norms does."""
        return any(norm is not None and norm.use_batch_stats for norm in self.norms())

    def convolution(self, hidden: Tensor, prefix_tokens: int) -> Convolution:
        """The convolution of the hidden tokens, with the norms and activations around it."""
        geometry = (self.grid, 1, self.dw_weight.shape[3] // 2, prefix_tokens)
        around = (self.up_norm, "gelu", self.dw_norm, "gelu")
        return Convolution(hidden, self.dw_weight, self.dw_bias, *geometry, *around)


def _check(call: Call) -> None:
    x, prefix_tokens = call.x, call.prefix_tokens
    check_tokens(x)
    check_grid(x, call.grid, prefix_tokens)
    hidden = check_linear("up_weight", call.up_weight, x.shape[2], x)
    if check_depthwise("dw_weight", call.dw_weight, hidden, x) % 2 == 0:
        fail("dw_weight", "an odd kernel, which keeps the grid", call.dw_weight)
    channels = check_linear("down_weight", call.down_weight, hidden, x)
    if prefix_tokens and channels != x.shape[2]:
        fail("down_weight", f"({x.shape[2]}, {hidden}), as many channels as x has with prefix tokens", call.down_weight)
    for part, size in (("up", hidden), ("dw", hidden), ("down", channels)):
        check_parameter(f"{part}_bias", getattr(call, f"{part}_bias"), (size,), x)
        check_batch_norm(f"{part}_norm", getattr(call, f"{part}_norm"), size, x)
    if call.form not in LEFF_FORMS:
        fail("form", f"one of {LEFF_FORMS}", call.form)


# --- Registered operator --------------------------------------------------------------------------------------------

_EPILOGUES = ", ".join(f"Tensor? {part}_bias, {norm(f'{part}_norm')}" for part in ("up", "dw", "down"))
_fused = define(
    "leff_triton",
    f"Tensor x, Tensor up_weight, Tensor dw_weight, Tensor down_weight, {_EPILOGUES}, "
    "SymInt height, SymInt width, int prefix_tokens, bool paper",
    "Tensor",
    lambda a: a.x.new_empty((*a.x.shape[:2], a.down_weight.shape[0])),
).call
launch("leff_triton", "leff", "leff_operator")


def _fits(call: Call) -> bool:
    """Whether the fused Triton kernels take these sizes: their offsets inside an image and in a weight are 32-bit."""
    weights = (call.up_weight, call.down_weight)
    small = (call.x.shape[1] + 64) * max(weight.shape[0] for weight in weights) < 2**30
    return call.dw_weight.shape[3] <= MAX_FUSED_KERNEL and small and max(weight.numel() for weight in weights) < 2**31


def _run_fused(call: Call) -> Tensor:
    """By ``kernels/leff.py``, in the dtype that the linear layers take under autocast."""
    x, prefix_tokens = call.x.to(linear_dtype(call.x)), call.prefix_tokens
    epilogues: list[Tensor | float | None] = []
    for _, bias, after in call.layers():
        *vectors, eps = (bias, *(NO_NORM if after is None else unpack(after)))
        epilogues += (*map(contiguous, vectors), eps)
    weights = (weight.to(x.dtype).contiguous() for weight, _, _ in call.layers())
    out = _fused(x, *weights, *epilogues, *call.grid, prefix_tokens, call.form == "paper")
    if prefix_tokens and x.dtype != call.x.dtype:
        out = out.to(torch.promote_types(x.dtype, call.x.dtype))
        if call.form == "official":
            out[:, :prefix_tokens] = call.x[:, :prefix_tokens]
    return out


# --- Implementations ------------------------------------------------------------------------------------------------


def _expected_hidden(call: Call) -> Tensor:
    """A view with all of the hidden tokens but their values, to ask kernels whether they would take those."""
    channel = call.x[:, :, :1].to(linear_dtype(call.x))
    if torch.is_grad_enabled():
        for parameter in (call.up_weight, call.up_bias):
            if parameter is not None and parameter.requires_grad:
                channel = channel + parameter.flatten()[:1].to(channel.dtype)
    return channel.expand(-1, -1, call.up_weight.shape[0])


def _normalise(norm: BatchNorm | None, tokens: Tensor) -> Tensor:
    """A norm over batch and tokens alike, as one of BatchNorm2d is over batch and map."""
    return tokens if norm is None else norm(tokens.flatten(0, 1)).view_as(tokens)


def _train(call: Call, kernels: Implementation) -> Tensor:
    """By differentiable pieces, prefix tokens kept out of the statistics."""
    prefix, tokens = call.x[:, : call.prefix_tokens], call.x[:, call.prefix_tokens :]
    hidden = kernels.run(call.convolution(product(tokens, call.up_weight, call.up_bias), 0))
    out = _normalise(call.down_norm, product(hidden, call.down_weight, call.down_bias))
    if call.form == "paper":
        out, prefix = F.gelu(out), torch.zeros_like(prefix)
    return torch.cat((prefix, out), dim=1) if call.prefix_tokens else out


def _infer(call: Call, kernels: Implementation) -> Tensor:
    """With every token through every step, and the prefix tokens put right at the end."""
    x, prefix_tokens = call.x, call.prefix_tokens
    hidden = kernels.run(call.convolution(product(x, call.up_weight, call.up_bias), prefix_tokens))
    out = _normalise(call.down_norm, product(hidden, call.down_weight, call.down_bias))
    if call.form == "paper":
        out = F.gelu(out)
    if prefix_tokens:
        out = out.to(torch.promote_types(out.dtype, x.dtype))
        prefix = out[:, :prefix_tokens]
        prefix.zero_() if call.form == "paper" else prefix.copy_(x[:, :prefix_tokens])
    return out


def _by(kernels: Implementation) -> Implementation:
    """The operator with the convolution computed so."""

    def reasons(call: Call, named: bool) -> Iterator[str]:
        yield from kernels.reasons(call.convolution(_expected_hidden(call), call.prefix_tokens), named)
        norm = call.down_norm
        if norm is not None:
            if norm.layer is not None:
                yield f"down_norm is a {type(norm.layer).__name__}, which has to be called"
            elif norm.running_mean is None and not norm.use_batch_stats:
                yield "a norm has no statistics"
        if call.form not in LEFF_FORMS or call.dw_weight.shape[3] % 2 == 0:
            yield "form or dw_weight is wrong"

    def run(call: Call) -> Tensor:
        batch = call.uses_batch_statistics()
        if batch:
            _check(call)  # before running statistics move
        if batch or (torch.is_grad_enabled() and gradients_needed(*call[:7], *(t for n in call.norms() if n for t in n[:4]))):
            return _train(call, kernels)
        return _run_fused(call) if kernels.name == "triton" and _fits(call) else _infer(call, kernels)

    return Implementation(kernels.name, reasons, run, kernels.validates)


def _run_reference(call: Call) -> Tensor:
    x, *layers = call[:7]
    options = {name: getattr(call, name) for name in ("grid", "up_norm", "dw_norm", "down_norm", "prefix_tokens", "form")}
    return functional.leff(x, *cast_like(x, *layers), **options)


OPERATOR = Operator("leff", (*map(_by, KERNELS), Implementation(REFERENCE, never, _run_reference)), _check)


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
    layers = (up_weight, up_bias, dw_weight, dw_bias, down_weight, down_bias)
    return OPERATOR(Call(x, *layers, grid, up_norm, dw_norm, down_norm, prefix_tokens, form), backend)
