"""The low-level operators of a head-mixing engine: their schemas and fakes, the same for every kind of kernel.

- ``head_mixed_attention``: the result, (B, H, Nq, D) in the memory order of (B, Nq, H, D), in q's dtype.
- ``head_mixed_attention_backward``: gradients of q, k and v in their dtype and in the memory order of (B, N, H, D),
  of the mixes and of the norm's affine in float32.
- ``head_map_moments``: sums (H,) and moments (H, H) of the maps less 1 / Nk, in float32.
- ``head_map_moments_backward``: gradients of q, k and the mix before the softmax, as above.

The gradient of a tensor that is absent has size 0; only norm tensors beside ``layer_norm`` have one. mask is bool with
four axes and broadcasts to (B, H, Nq, Nk). What each computes stands in :class:`fastvit.ops._head_mixing.Engine`.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["define_operators"]

_PRE = "Tensor? pre_weight, Tensor? pre_bias"
_MIXES = f"{_PRE}, Tensor? post_weight, Tensor? post_bias"
_AFFINE = "Tensor? norm_weight, Tensor? norm_bias"
_SETTINGS = "float norm_eps, bool layer_norm, float output_scale, Tensor? mask, float scale"
_STATISTICS = "Tensor? norm_mean, Tensor? norm_var, "


def _tokens_like(tensor: Tensor) -> Tensor:
    batch, heads, tokens, head_dim = tensor.shape
    return tensor.new_empty((batch, tokens, heads, head_dim)).transpose(1, 2)


def _gradient_like(tensor: Tensor | None, q: Tensor) -> Tensor:
    return q.new_empty((0,) if tensor is None else tensor.shape, dtype=torch.float32)


def _fake(q: Tensor, *_: object) -> Tensor:
    return _tokens_like(q)


def _fake_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Tensor | None) -> tuple[Tensor, ...]:
    return *map(_tokens_like, (q, k, v)), *(_gradient_like(tensor, q) for tensor in rest[:6])


def _fake_moments(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    heads = q.shape[1]
    return q.new_empty((heads,), dtype=torch.float32), q.new_empty((heads, heads), dtype=torch.float32)


def _fake_moments_backward(
    dsums: Tensor, dmoments: Tensor, q: Tensor, k: Tensor, *rest: Tensor | None
) -> tuple[Tensor, ...]:
    return *map(_tokens_like, (q, k)), *(_gradient_like(tensor, q) for tensor in rest[:2])


def define_operators(suffix: str = "", statistics: bool = False) -> None:
    """Define ``fastvit::head_mixed_attention<suffix>`` and its three companions, with their fakes.

    Args:
        suffix: tells kernels of another kind apart.
        statistics: whether the first takes the running statistics of a BatchNorm, too, behind its affine tensors.
    """
    running = _STATISTICS if statistics else ""
    definitions = (
        (
            f"fastvit::head_mixed_attention{suffix}",
            f"(Tensor q, Tensor k, Tensor v, {_MIXES}, {_AFFINE}, {running}{_SETTINGS}) -> Tensor",
            _fake,
        ),
        (
            f"fastvit::head_mixed_attention{suffix}_backward",
            f"(Tensor grad, Tensor q, Tensor k, Tensor v, {_MIXES}, {_AFFINE}, {_SETTINGS}) -> "
            "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
            _fake_backward,
        ),
        (
            f"fastvit::head_map_moments{suffix}",
            f"(Tensor q, Tensor k, {_PRE}, Tensor? mask, float scale) -> (Tensor, Tensor)",
            _fake_moments,
        ),
        (
            f"fastvit::head_map_moments{suffix}_backward",
            f"(Tensor dsums, Tensor dmoments, Tensor q, Tensor k, {_PRE}, Tensor? mask, float scale) -> "
            "(Tensor, Tensor, Tensor, Tensor)",
            _fake_moments_backward,
        ),
    )
    for name, schema, fake in definitions:
        torch.library.define(name, schema, tags=torch.Tag.pt2_compliant_tag)
        torch.library.register_fake(name, fake)
