"""Which backend a fused block takes for tensors of a dtype, as far as that can be said without an input.

The choice is the operator's own, made for a small call at inference; :func:`fastvit.explain` tells what a given input
gets.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fastvit import autotune, backends, ops
from fastvit.ops import _operator
from fastvit.reference.functional import BatchNorm, Projection

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What a report tells the backends of."""


def _heads(like: Tensor) -> Tensor:
    return like.new_zeros(1, 2, 16, 16)


def _masked_attention(like: Tensor, backend: str) -> None:
    q = _heads(like)
    ops.masked_attention(q, q, q, backend=backend)


def _class_attention(like: Tensor, backend: str) -> None:
    k = _heads(like)
    ops.class_attention(k[:, :, :1], k, k, backend=backend)


def _head_mixed_attention(like: Tensor, backend: str) -> None:
    q = _heads(like)
    ops.head_mixed_attention(q, q, q, post_weight=like.new_zeros(2, 2), backend=backend)


def _token_depthwise_conv(like: Tensor, backend: str) -> None:
    x, weight = like.new_zeros(1, 4, 16), like.new_zeros(16, 1, 3, 3)
    ops.token_depthwise_conv(x, weight, grid=(2, 2), backend=backend)


def _depthwise_separable_conv(like: Tensor, backend: str) -> None:
    x, weight = like.new_zeros(1, 4, 16), like.new_zeros(16, 1, 3, 3)
    ops.depthwise_separable_conv(x, weight, None, like.new_zeros(16, 16), grid=(2, 2), backend=backend)


def _conv_batch_norm(like: Tensor, backend: str) -> None:
    vector = like.new_zeros(2)
    norm = BatchNorm(vector, vector, vector, vector)
    ops.conv_batch_norm(like.new_zeros(1, 3, 8, 8), like.new_zeros(2, 3, 3, 3), None, norm, backend=backend)


def _conv_projection(like: Tensor, backend: str) -> None:
    part = Projection(like.new_zeros(16, 1, 3, 3), None, like.new_zeros(16, 16))
    ops.conv_projection(like.new_zeros(1, 4, 16), part, part, part, grid=(2, 2), backend=backend)


def _leff(like: Tensor, backend: str) -> None:
    x, up, weight, down = (like.new_zeros(shape) for shape in ((1, 5, 8), (16, 8), (16, 1, 3, 3), (8, 16)))
    ops.leff(x, up, None, weight, None, down, None, grid=(2, 2), backend=backend)


def _linear(like: Tensor, backend: str) -> None:
    ops.linear(like.new_zeros(64, 16), like.new_zeros(16, 16), backend=backend)


def _mlp(like: Tensor, backend: str) -> None:
    weight = like.new_zeros(16, 16)
    ops.mlp(like.new_zeros(64, 16), weight, None, weight, None, backend=backend)


def _glu_mlp(like: Tensor, backend: str) -> None:
    weight = like.new_zeros(16, 16)
    ops.glu_mlp(like.new_zeros(64, 16), weight, None, weight, None, weight, None, backend=backend)


CALLS: dict[str, Callable[[Tensor, str], None]] = {
    "linear": _linear,
    "masked_attention": _masked_attention,
    "mlp": _mlp,
    "class_attention": _class_attention,
    "head_mixed_attention": _head_mixed_attention,
    "token_depthwise_conv": _token_depthwise_conv,
    "depthwise_separable_conv": _depthwise_separable_conv,
    "glu_mlp": _glu_mlp,
    "conv_batch_norm": _conv_batch_norm,
    "conv_projection": _conv_projection,
    "leff": _leff,
}
"""By operator, a small call of it beside a tensor that tells dtype and device."""


class _Chosen(Exception):  # noqa: N818 (no error: it ends the call where the choice is made)
    def __init__(self, selection: _operator.Selection):
        self.selection = selection


def _stop(selection: _operator.Selection) -> None:
    raise _Chosen(selection)


def _select(op: str, backend: str, dtype: torch.dtype, device: torch.device) -> _operator.Selection | None:
    """What a call of ``op`` with ``backend`` selects, computing nothing; None where it would raise."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(autotune.unmeasured())
        if torch.amp.is_autocast_available(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(_operator.recording(_stop))
        try:
            CALLS[op](torch.empty(0, dtype=dtype, device=device), backend)
        except _Chosen as chosen:
            return chosen.selection
        except RuntimeError:  # a backend insisted on that does not take the call
            return None
    return _operator.Selection(op, _operator.REFERENCE, {})  # under a torch.func transform nothing is chosen


def backend_for(op: str, backend: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """The backend that a call of ``op`` with ``backend`` runs on; None where it would raise."""
    selection = _select(op, backend, dtype, device)
    return None if selection is None else selection.backend


NOTHING_FASTER = "nothing faster here: "


def nothing_faster(op: str, backend: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a call of ``op`` runs plain though nobody asked for it; None where it does not, or somebody did."""
    if backend != _operator.AUTO or backends.REQUESTED is not None:
        return None
    return _runs_plain(op, dtype, device)


@functools.cache
def _runs_plain(op: str, dtype: torch.dtype, device: torch.device) -> str | None:
    *faster, _ = ops.OPERATORS[op].implementations
    faster = [each for each in faster if not backends.unproven_reasons(op, each.name, device)]
    if any(_select(op, each.name, dtype, device) is not None for each in faster):
        return None  # though it may be measured not to be the fastest for some sizes, which explain tells
    selection = _select(op, _operator.AUTO, dtype, device)
    if selection is None or not selection.turned_down:
        return None
    native = "cpp" if device.type == "cpu" else "triton"
    reasons = selection.turned_down.get(native) or next(iter(selection.turned_down.values()))
    return NOTHING_FASTER + "; ".join(reasons)


def backends_by_dtype(op: str, backend: str, device: torch.device) -> dict[str, str]:
    """By name of the dtype ("float32"), the backend it gets; dtypes that would raise are left out."""
    found = {str(dtype).removeprefix("torch."): backend_for(op, backend, dtype, device) for dtype in DTYPES}
    return {dtype: name for dtype, name in found.items() if name is not None}
