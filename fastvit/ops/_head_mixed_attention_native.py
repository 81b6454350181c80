"""Head-mixed attention by ``csrc/cpu/head_mixed_attention*`` and ``csrc/cpu/head_map_moments*``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvit.ops._head_mixed_attention_schemas import define_operators
from fastvit.ops._head_mixing import Call, Engine, as_rows
from fastvit.reference.functional import LayerNorm

__all__ = ["ENGINE", "infer"]

define_operators(statistics=True)


def _forward(*arguments: Any) -> Tensor:
    """Without running statistics, which a norm that is to be differentiated has folded already."""
    return torch.ops.fastvit.head_mixed_attention.default(*arguments[:9], None, None, *arguments[9:])


ENGINE = Engine(
    _forward,
    torch.ops.fastvit.head_mixed_attention_backward.default,
    torch.ops.fastvit.head_map_moments.default,
    torch.ops.fastvit.head_map_moments_backward.default,
)
"""With gradients."""


def infer(call: Call, dtype: torch.dtype) -> Tensor:
    """The call without gradients, a BatchNorm by running statistics folded in C++."""
    q, k, v = as_rows(call.q, dtype), as_rows(call.k, dtype), as_rows(call.v, dtype)
    norm = call.norm
    normed: tuple[Any, ...] = None, None, None, None, 0.0, False  # weight, bias, mean, variance, eps, over heads
    if isinstance(norm, LayerNorm):
        normed = norm.weight, norm.bias, None, None, norm.eps, True
    elif norm is not None:
        normed = norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps, False
    mixes = (call.pre_weight, call.pre_bias, call.post_weight, call.post_bias)
    return torch.ops.fastvit.head_mixed_attention.default(
        q, k, v, *mixes, *normed, call.output_scale, call.mask, call.scale
    )
