"""The four kernels of head-mixed attention in plain PyTorch, gradients by hand, in any dtype: the algebra itself."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvit.ops.head_mixed_attention import Kernels


def _maps(q: Tensor, k: Tensor, weight: Tensor | None, bias: Tensor | None, mask: Tensor | None, scale: float):
    """The logits before their mix, and the maps."""
    logits = scale * q @ k.mT
    mixed = logits if weight is None else torch.einsum("hg,bgij->bhij", weight, logits)
    if bias is not None:
        mixed = mixed + bias[:, None, None]
    if mask is None:
        return logits, mixed.softmax(-1)
    return logits, mixed.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0.0).masked_fill(~mask, 0.0)


def _through_the_softmax(
    dmaps: Tensor, maps: Tensor, logits: Tensor, q: Tensor, k: Tensor, weight: Tensor | None, scale
):
    """Gradients of q, k, pre_weight and pre_bias, given that of the maps."""
    dmixed = maps * (dmaps - (maps * dmaps).sum(-1, keepdim=True))
    dweight, dbias, dlogits = dmixed.new_zeros(0), dmixed.sum((0, 2, 3)), dmixed
    if weight is not None:
        dweight = torch.einsum("bhij,bgij->hg", dmixed, logits)
        dlogits = torch.einsum("hg,bhij->bgij", weight, dmixed)
    return scale * dlogits @ k, scale * dlogits.mT @ q, dweight, dbias


def _mixed(maps: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    mixed = maps if weight is None else torch.einsum("hg,bgij->bhij", weight, maps)
    return mixed if bias is None else mixed + bias[:, None, None]


def _standard(mixed: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Standardised over heads, and what they were multiplied with."""
    centred = mixed - mixed.mean(1, keepdim=True)
    factor = (centred.square().mean(1, keepdim=True) + eps).rsqrt()
    return centred * factor, factor


def _column(tensor: Tensor | None) -> Tensor | float:
    return 1.0 if tensor is None else tensor[:, None, None]


def _finish(finished: Tensor, norm_bias: Tensor | None, output_scale: float, mask: Tensor | None) -> Tensor:
    finished = output_scale * (finished if norm_bias is None else finished + norm_bias[:, None, None])
    return finished if mask is None else finished.masked_fill(~mask, 0.0)


def forward(q, k, v, pre_weight, pre_bias, post_weight, post_bias, norm_weight, norm_bias, eps, layer_norm, *rest):
    output_scale, centred, mask, scale = rest
    _, maps = _maps(q, k, pre_weight, pre_bias, mask, scale)
    mixed = _mixed(maps - centred / k.shape[2], post_weight, post_bias)
    if layer_norm:
        mixed = _standard(mixed, eps)[0] * _column(norm_weight)
    return _finish(mixed, norm_bias, output_scale, mask) @ v


def backward(
    grad, q, k, v, pre_weight, pre_bias, post_weight, post_bias, norm_weight, norm_bias, eps, layer_norm, *rest
):
    output_scale, centred, mask, scale = rest
    logits, maps = _maps(q, k, pre_weight, pre_bias, mask, scale)
    mixed = _mixed(maps - centred / k.shape[2], post_weight, post_bias)
    standard, factor = _standard(mixed, eps) if layer_norm else (mixed, None)
    finished = standard * _column(norm_weight) if layer_norm else mixed
    dv = _finish(finished, norm_bias, output_scale, mask).mT @ grad
    dmixed = output_scale * grad @ v.mT
    if mask is not None:
        dmixed = dmixed.masked_fill(~mask, 0.0)
    dnorm_weight = dnorm_bias = grad.new_zeros(0)
    if layer_norm:
        dnorm_weight, dnorm_bias = (dmixed * standard).sum((0, 2, 3)), dmixed.sum((0, 2, 3))
        d = dmixed * _column(norm_weight)
        dmixed = factor * (d - d.mean(1, keepdim=True) - standard * (d * standard).mean(1, keepdim=True))
    dpost_weight, dmaps = grad.new_zeros(0), dmixed
    if post_weight is not None:
        dpost_weight = torch.einsum("bhij,bgij->hg", dmixed, maps - centred / k.shape[2])
        dmaps = torch.einsum("hg,bhij->bgij", post_weight, dmixed)
    dq, dk, dpre_weight, dpre_bias = _through_the_softmax(dmaps, maps, logits, q, k, pre_weight, scale)
    return dq, dk, dv, dpre_weight, dpre_bias, dpost_weight, dmixed.sum((0, 2, 3)), dnorm_weight, dnorm_bias


def moments(q, k, pre_weight, pre_bias, mask, scale, weight):
    centred = _maps(q, k, pre_weight, pre_bias, mask, scale)[1] - 1.0 / k.shape[2]
    return centred.sum((0, 2, 3)), torch.einsum("bgij,bhij->gh", centred, centred)


def moments_backward(dsums, dmoments, q, k, pre_weight, pre_bias, mask, scale):
    logits, maps = _maps(q, k, pre_weight, pre_bias, mask, scale)
    centred = maps - 1.0 / k.shape[2]
    dmaps = dsums[:, None, None] + torch.einsum("gh,bhij->bgij", dmoments + dmoments.mT, centred)
    if mask is not None:
        dmaps = dmaps.masked_fill(~mask, 0.0)
    return _through_the_softmax(dmaps, maps, logits, q, k, pre_weight, scale)


PLAIN = Kernels(forward, backward, moments, moments_backward)
