"""Head-mixed attention by ``csrc/cpu/head_mixed_attention*``: the schema of its operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvit.ops._head_mixing import Call, as_rows
from fastvit.reference.functional import LayerNorm

__all__ = ["infer"]

torch.library.define(
    "fastvit::head_mixed_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? pre_weight, Tensor? pre_bias, Tensor? post_weight, Tensor? post_bias, "
    "Tensor? norm_weight, Tensor? norm_bias, Tensor? norm_mean, Tensor? norm_var, float norm_eps, "
    "bool layer_norm, float output_scale, Tensor? mask, float scale) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.register_fake("fastvit::head_mixed_attention")
def _fake(q: Tensor, *_: object) -> Tensor:
    batch, heads, queries, head_dim = q.shape
    return q.new_empty((batch, queries, heads, head_dim)).transpose(1, 2)


def infer(call: Call, dtype: torch.dtype) -> Tensor:
    """The call without gradients, a BatchNorm by running statistics folded in C++."""
    q, k, v = (as_rows(tensor.to(dtype)) for tensor in (call.q, call.k, call.v))
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
