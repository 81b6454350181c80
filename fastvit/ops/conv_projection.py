"""CvT's three projections of one x: the operator's schema, and who computes it.

- ``cpp``: at inference one pass over x for the three convolutions and norms (``csrc/cpu/conv_projection.cpp``); in
  training ``token_depthwise_conv`` thrice. Then the linear layers.
- ``cuda``, ``triton``: ``depthwise_separable_conv`` thrice by that backend.
- ``reference``: ``fastvit.reference.functional.conv_projection``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvit import backends
from fastvit.ops import _at_once
from fastvit.ops._composition import KERNELS, has_batch_statistics, linear, parameters_of
from fastvit.ops._convolution_checks import check_x
from fastvit.ops._dispatch import Implementation, gradients_needed, select
from fastvit.ops._measured import fastest_first
from fastvit.ops._token_depthwise_conv_native import out_size
from fastvit.ops.depthwise_separable_conv import IMPLEMENTATIONS as SEPARATE
from fastvit.ops.depthwise_separable_conv import Call as SeparateCall
from fastvit.ops.depthwise_separable_conv import checked
from fastvit.reference.functional import BatchNorm, Projection

__all__ = ["conv_projection"]

_NAME = "conv_projection"
_PART = (
    "Tensor {0}_weight, Tensor? {0}_bias, Tensor? {0}_norm_weight, Tensor? {0}_norm_bias, Tensor? {0}_norm_mean, "
    "Tensor? {0}_norm_var, float {0}_norm_eps, int {0}_stride, int {0}_padding"
)
_PARTS = ", ".join(_PART.format(name) for name in "qkv")

torch.library.define(
    f"fastvit::{_NAME}",
    f"(Tensor x, {_PARTS}, SymInt height, SymInt width, int prefix_tokens) -> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.register_fake(f"fastvit::{_NAME}")
def _fake(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    height, width, prefix_tokens = rest[-3:]
    outputs = []
    for part in (rest[0:9], rest[9:18], rest[18:27]):
        kernel, (stride, padding) = part[0].shape[-1], part[-2:]
        tokens = out_size(height, kernel, stride, padding) * out_size(width, kernel, stride, padding)
        outputs.append(x.new_empty((x.shape[0], prefix_tokens + tokens, x.shape[2])))
    return tuple(outputs)


class Call(NamedTuple):
    """The checked arguments of one call: three convolutions of one x, each with its linear layer."""

    q: SeparateCall
    k: SeparateCall
    v: SeparateCall


Projected = tuple[Tensor, Tensor, Tensor]


def _reads_once(call: Call) -> bool:
    """Whether one pass over x will do: no gradients, no batch statistics, and a kernel for it."""
    norms = [part.convolution.norm for part in call]
    parameters = [tensor for part in call for tensor in parameters_of(*part.convolution[1:3], part.convolution.norm)]
    x = call.q.convolution.x
    if has_batch_statistics(*norms) or gradients_needed(x, *parameters):
        return False
    return backends.extension().has_op(_NAME, x.device.type)


def _low_level(
    weight: Tensor, bias: Tensor | None, norm: BatchNorm | None, stride: int, padding: int
) -> tuple[Any, ...]:
    """One convolution's arguments of the operator."""
    statistics = (None,) * 4 if norm is None else (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    vectors = [None if tensor is None else tensor.contiguous() for tensor in (bias, *statistics)]
    eps = 0.0 if norm is None else norm.eps
    return weight.contiguous(), *vectors, eps, stride, padding


def _convolve_together(call: Call) -> tuple[Tensor, ...]:
    first = call.q.convolution
    x = first.x if first.x.stride(2) == 1 else first.x.contiguous()
    convolutions = [part.convolution for part in call]
    parts = [argument for c in convolutions for argument in _low_level(c.weight, c.bias, c.norm, c.stride, c.padding)]
    return torch.ops.fastvit.conv_projection(x, *parts, *first.grid, first.prefix_tokens)


def _by(kernels: Implementation, separate: Implementation) -> Implementation:
    """Three calls of ``separate``, whose convolutions are computed by ``kernels``; or one pass over x for all three."""

    def reasons(call: Call) -> list[str]:
        found = [reason for part in call for reason in kernels.reasons(part.convolution)]
        return list(dict.fromkeys(found))

    def run(call: Call) -> Projected:
        if kernels.name != "triton" and _reads_once(call):
            tokens = _convolve_together(call)
            q, k, v = (linear(each, part.pw_weight, part.pw_bias) for each, part in zip(tokens, call, strict=True))
        else:
            q, k, v = (separate.run(part) for part in call)
        return q, k, v

    return Implementation(kernels.name, reasons, run)


def _project_at_once(x: Tensor, parts: tuple[Projection, ...], grid: tuple[int, int], prefix_tokens: int) -> Projected:
    arguments: list[Any] = []
    for part in parts:
        norm = _at_once.norm_arguments(part.norm)
        _at_once.require_cpu(part.dw_weight, part.dw_bias)
        padding = part.dw_weight.shape[3] // 2 if part.padding is None else part.padding
        arguments += (part.dw_weight, part.dw_bias, *norm, part.stride, padding)
    q, k, v = torch.ops.fastvit.conv_projection.default(x, *arguments, *grid, prefix_tokens)
    q, k, v = (
        _at_once.product(each, part.pw_weight, part.pw_bias) for each, part in zip((q, k, v), parts, strict=True)
    )
    return q, k, v


def _run_reference(call: Call) -> Projected:
    q, k, v = (SEPARATE[-1].run(part) for part in call)
    return q, k, v


IMPLEMENTATIONS = (*map(_by, KERNELS, SEPARATE), Implementation("reference", lambda call: [], _run_reference))
"""In order of preference."""


def conv_projection(
    x: Tensor,
    q: Projection,
    k: Projection,
    v: Projection,
    *,
    grid: tuple[int, int],
    prefix_tokens: int = 0,
    backend: str = "auto",
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
    found = _at_once.tried(backend, _project_at_once, x, (q, k, v), grid, prefix_tokens)
    if found is not None:
        return found
    check_x(x)
    calls = []
    for name, part in (("q", q), ("k", k), ("v", v)):
        if not isinstance(part, Projection):
            raise ValueError(f"{name}: got {type(part).__name__}, accepted is a Projection")
        calls.append(checked(x, *part, grid, prefix_tokens, f"{name}."))
    call = Call(*calls)
    return select(_NAME, fastest_first(_NAME, IMPLEMENTATIONS, backend, x, call), backend, (call,), {}).run(call)
