"""CvT's projections: a depthwise convolution of tokens, BatchNorm and a linear layer; one of them, or q, k and v of one x.

- ``cpp``, ``cuda``: ``token_depthwise_conv`` by that backend with the norm in it, then a product. For q, k and v at
  inference ``cpp`` reads x once (``csrc/conv_projection``).
- ``triton``: the same; at inference, with kernels up to 3 x 3, ``kernels/conv_projection.py``, which never brings the
  convolution's result into memory.
- ``reference``: the functions of the same names in ``fastvit.reference.functional``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvit import backends
from fastvit.ops._checks import (
    check_batch_norm,
    check_depthwise,
    check_geometry,
    check_grid,
    check_linear,
    check_parameter,
    check_tokens,
    fail,
)
from fastvit.ops._operator import AUTO, REFERENCE, Implementation, Operator, gradients_needed, never
from fastvit.ops._schema import NO_NORM, contiguous, define, launch, norm, unpack
from fastvit.ops.linear import cast_like, linear_dtype, product
from fastvit.ops.token_depthwise_conv import KERNELS, Convolution, convolved
from fastvit.reference import functional
from fastvit.reference.functional import BatchNorm, Projection

__all__ = ["conv_projection", "depthwise_separable_conv"]

MAX_FUSED_KERNEL = 3  # more taps spill registers


class Separable(NamedTuple):
    """The arguments of :func:`depthwise_separable_conv`; ``part`` prefixes their names in errors."""

    x: Tensor
    dw_weight: Tensor
    norm: BatchNorm | None
    pw_weight: Tensor
    pw_bias: Tensor | None
    stride: int
    padding: int | None
    dw_bias: Tensor | None
    grid: tuple[int, int]
    prefix_tokens: int
    part: str = ""

    def convolution(self) -> Convolution:
        """The convolution with its norm."""
        geometry = (self.grid, self.stride, self.padding, self.prefix_tokens)
        return Convolution(self.x, self.dw_weight, self.dw_bias, *geometry, norm=self.norm)

    def trains(self) -> bool:
        """Whether it needs gradients or statistics of the batch."""
        if self.norm is not None and self.norm.use_batch_stats:
            return True
        return torch.is_grad_enabled() and gradients_needed(
            *self.convolution().tensors(), self.pw_weight, self.pw_bias
        )


class Projections(NamedTuple):
    """The arguments of :func:`conv_projection`."""

    x: Tensor
    q: Projection
    k: Projection
    v: Projection
    grid: tuple[int, int]
    prefix_tokens: int

    def separate(self) -> list[Separable]:
        """The three convolutions with their linear layers."""
        parts = zip("qkv", (self.q, self.k, self.v), strict=True)
        return [Separable(self.x, *part, self.grid, self.prefix_tokens, f"{name}.") for name, part in parts]


Projected = tuple[Tensor, Tensor, Tensor]


def _check_part(call: Separable) -> None:
    x, part = call.x, call.part
    channels = x.shape[2]
    kernel = check_depthwise(f"{part}dw_weight", call.dw_weight, channels, x)
    check_parameter(f"{part}dw_bias", call.dw_bias, (channels,), x)
    check_batch_norm(f"{part}norm", call.norm, channels, x)
    outputs = check_linear(f"{part}pw_weight", call.pw_weight, channels, x)
    check_parameter(f"{part}pw_bias", call.pw_bias, (outputs,), x)
    check_geometry(call.grid, kernel, call.stride, call.padding, part)


def _check_separable(call: Separable) -> None:
    check_tokens(call.x)
    check_grid(call.x, call.grid, call.prefix_tokens)
    _check_part(call)


def _check_projections(call: Projections) -> None:
    check_tokens(call.x)
    check_grid(call.x, call.grid, call.prefix_tokens)
    for name, part in (("q", call.q), ("k", call.k), ("v", call.v)):
        if not isinstance(part, Projection):
            fail(name, "a Projection", part)
    for part in call.separate():
        _check_part(part)


# --- Registered operators -------------------------------------------------------------------------------------------


def _part(name: str) -> str:
    tensors = f"Tensor {name}_weight, Tensor? {name}_bias"
    return f"{tensors}, {norm(f'{name}_norm')}, int {name}_stride, int {name}_padding"


class _Geometry(NamedTuple):
    height: int
    width: int
    stride: int
    padding: int
    prefix_tokens: int


def _fake_together(a: Any) -> tuple[Tensor, ...]:
    outputs = []
    for name in "qkv":
        stride, padding = getattr(a, f"{name}_stride"), getattr(a, f"{name}_padding")
        geometry = _Geometry(a.height, a.width, stride, padding, a.prefix_tokens)
        outputs.append(convolved(a.x, getattr(a, f"{name}_weight"), geometry))
    return tuple(outputs)


_together = define(
    "conv_projection",
    f"Tensor x, {', '.join(map(_part, 'qkv'))}, SymInt height, SymInt width, int prefix_tokens",
    "(Tensor, Tensor, Tensor)",
    _fake_together,
).call
_HAS_TOGETHER = {device: backends.extension().has_op("conv_projection", device) for device in ("cpu", "cuda")}


def _fake_fused(a: Any) -> Tensor:
    batch, tokens, _ = convolved(a.x, a.dw_weight, a).shape
    return a.x.new_empty((batch, tokens, a.pw_weight.shape[0]))


_fused = define(
    "depthwise_separable_conv_triton",
    f"Tensor x, Tensor dw_weight, Tensor pw_weight, Tensor? pw_bias, Tensor? dw_bias, {norm('dw_norm')}, "
    "SymInt height, SymInt width, int stride, int padding, int prefix_tokens",
    "Tensor",
    _fake_fused,
).call
launch("depthwise_separable_conv_triton", "conv_projection", "depthwise_separable_conv_operator")


def _fits(call: Separable) -> bool:
    """Whether the fused Triton kernel takes these sizes: its offsets inside an image and in a weight are 32-bit."""
    kernel, (outputs, _) = call.dw_weight.shape[3], call.pw_weight.shape
    padding = kernel // 2 if call.padding is None else call.padding
    small = (call.x.shape[1] + 64) * outputs < 2**30 and call.pw_weight.numel() < 2**31
    return kernel <= MAX_FUSED_KERNEL and padding <= kernel // 2 and small


# --- Implementations ------------------------------------------------------------------------------------------------


def _run_fused(call: Separable) -> Tensor:
    """By ``kernels/conv_projection.py``, in the dtype that the linear layer takes under autocast."""
    dtype, kernel = linear_dtype(call.x), call.dw_weight.shape[3]
    return _fused(
        call.x.to(dtype),
        call.dw_weight.contiguous(),
        call.pw_weight.to(dtype).contiguous(),
        contiguous(call.pw_bias),
        contiguous(call.dw_bias),
        *(NO_NORM if call.norm is None else (*map(contiguous, unpack(call.norm)[:4]), call.norm.eps)),
        *call.grid,
        call.stride,
        kernel // 2 if call.padding is None else call.padding,
        call.prefix_tokens,
    )


def _by(kernels: Implementation) -> tuple[Implementation, Implementation]:
    """The two operators with the convolution computed so."""

    def reasons(call: Separable, named: bool) -> Iterator[str]:
        return kernels.reasons(call.convolution(), named)

    def run(call: Separable) -> Tensor:
        if kernels.name == "triton" and not call.trains() and _fits(call):
            return _run_fused(call)
        if call.norm is not None and call.norm.use_batch_stats:
            _check_part(call)  # before running statistics move
        return product(kernels.run(call.convolution()), call.pw_weight, call.pw_bias)

    def reasons_together(call: Projections, named: bool) -> Iterator[str]:
        for part in call.separate():
            yield from kernels.reasons(part.convolution(), named)

    def run_together(call: Projections) -> Projected:
        parts = call.separate()
        if kernels.name != "triton" and _HAS_TOGETHER[call.x.device.type] and not any(part.trains() for part in parts):
            tokens = _convolve_together(call)
            q, k, v = (product(each, part.pw_weight, part.pw_bias) for each, part in zip(tokens, parts, strict=True))
        else:
            _check_projections(call)  # before running statistics move
            q, k, v = map(run, parts)
        return q, k, v

    return Implementation(kernels.name, reasons, run, kernels.validates), Implementation(
        kernels.name, reasons_together, run_together, kernels.validates
    )


def _convolve_together(call: Projections) -> Projected:
    x = call.x if call.x.stride(2) == 1 else call.x.clone(memory_format=torch.contiguous_format)
    arguments: list[Any] = []
    for part in (call.q, call.k, call.v):
        weight = part.dw_weight
        given = NO_NORM if part.norm is None else unpack(part.norm)
        *vectors, eps = (part.dw_bias, *given)
        vectors = [each if each is None or each.is_contiguous() else each.contiguous() for each in vectors]
        padding = weight.shape[3] // 2 if part.padding is None else part.padding
        arguments += (weight if weight.is_contiguous() else weight.contiguous(), *vectors, eps, part.stride, padding)
    return _together(x, *arguments, *call.grid, call.prefix_tokens)


def _run_reference(call: Separable) -> Tensor:
    x, dw_weight, norm, pw_weight, pw_bias, stride, padding, dw_bias, grid, prefix_tokens, _ = call
    dw_weight, dw_bias, pw_weight, pw_bias = cast_like(x, dw_weight, dw_bias, pw_weight, pw_bias)
    return functional.depthwise_separable_conv(
        x,
        dw_weight,
        norm,
        pw_weight,
        pw_bias,
        grid=grid,
        stride=stride,
        padding=padding,
        prefix_tokens=prefix_tokens,
        dw_bias=dw_bias,
    )


def _run_reference_together(call: Projections) -> Projected:
    q, k, v = map(_run_reference, call.separate())
    return q, k, v


_SEPARABLE, _TOGETHER = zip(*map(_by, KERNELS), strict=True)
SEPARABLE = Operator(
    "depthwise_separable_conv", (*_SEPARABLE, Implementation(REFERENCE, never, _run_reference)), _check_separable
)
PROJECTION = Operator(
    "conv_projection", (*_TOGETHER, Implementation(REFERENCE, never, _run_reference_together)), _check_projections
)


def depthwise_separable_conv(
    x: Tensor,
    dw_weight: Tensor,
    norm: BatchNorm | None,
    pw_weight: Tensor,
    pw_bias: Tensor | None = None,
    *,
    grid: tuple[int, int],
    stride: int = 1,
    padding: int | None = None,
    prefix_tokens: int = 0,
    dw_bias: Tensor | None = None,
    backend: str = AUTO,
) -> Tensor:
    """Depthwise k x k convolution of tokens, BatchNorm, then a linear layer: one of CvT's projections.

    Prefix tokens skip the convolution and the norm, and join at the linear layer.

    Args:
        x: (B, P + h*w, C), floating, row-major grid tokens behind P prefix tokens.
        dw_weight: (C, 1, k, k), dw_bias: (C,). pw_weight: (O, C), pw_bias: (O,). On x's device.
        norm: BatchNorm over channels, between the two, or None.
        grid: (h, w). stride: of the convolution. padding: k // 2 zeros on each side by default.
        backend: "auto", "cuda", "cpp", "triton" or "reference".

    Returns:
        (B, P + h'*w', O) with h' = (h + 2 * padding - k) // stride + 1, likewise w'.

    Raises:
        ValueError: a shape, device, number or name that is not accepted, or an unknown backend.
        RuntimeError: the backend asked for cannot run this call; lists every reason.

    Source: Wu et al. 2021 (CvT), section 3.2; the plain form is
    ``fastvit.reference.functional.depthwise_separable_conv``.
    """
    parameters = (dw_weight, norm, pw_weight, pw_bias, stride, padding, dw_bias)
    return SEPARABLE(Separable(x, *parameters, grid, prefix_tokens), backend)


def conv_projection(
    x: Tensor,
    q: Projection,
    k: Projection,
    v: Projection,
    *,
    grid: tuple[int, int],
    prefix_tokens: int = 0,
    backend: str = AUTO,
) -> Projected:
    """CvT's queries, keys and values: three depthwise-separable convolutions of the same tokens.

    Prefix tokens skip the convolutions and the norms, and join at the linear layers.

    Args:
        x: (B, P + h*w, C), floating, row-major grid tokens behind P prefix tokens.
        q, k, v: the parameters and the stride of each, as :func:`depthwise_separable_conv` takes them.
        grid: (h, w).
        backend: "auto", "cuda", "cpp", "triton" or "reference".

    Returns:
        Queries, keys and values (B, P + h'*w', O), each of the size its own stride and weight give.

    Raises:
        ValueError: a shape, device, number or name that is not accepted, or an unknown backend.
        RuntimeError: the backend asked for cannot run this call; lists every reason.

    Source: Wu et al. 2021 (CvT), section 3.2; the plain form is ``fastvit.reference.functional.conv_projection``.
    """
    return PROJECTION(Projections(x, q, k, v, grid, prefix_tokens), backend)
