"""Attention mixed across heads (talking heads, re-attention): the checks, the operator's schema, and who computes it.

- ``cpp``: ``csrc/cpu/head_mixed_attention*``, forward only. All heads of a few queries at a time, so that the maps stay
  in the caches; the normalisation (by running statistics) and the output scale are folded into the mix.
- ``reference``: ``fastvit.reference.functional.head_mixed_attention``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvit import backends
from fastvit.ops._checks import check_mask, check_tokens, describe
from fastvit.ops._dispatch import Implementation, gradients_needed, select
from fastvit.reference import functional
from fastvit.reference.functional import BatchNorm

__all__ = ["head_mixed_attention", "re_attention", "talking_heads_attention"]

CPP_DTYPES = (torch.float32, torch.bfloat16)
MAX_HEADS = 32
MAX_HEAD_DIM = 128

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


def _check_parameter(name: str, tensor: Tensor, shape: tuple[int, ...], q: Tensor) -> None:
    if not isinstance(tensor, Tensor) or tensor.shape != shape or not tensor.is_floating_point():
        raise ValueError(
            f"{name}: got {describe(tensor)}, accepted is a floating tensor {shape}, q has {q.shape[1]} heads"
        )
    if tensor.device != q.device:
        raise ValueError(f"{name}: got {describe(tensor)}, q is on {q.device}")


def _check_mix(when: str, weight: Tensor | None, bias: Tensor | None, q: Tensor) -> None:
    heads = q.shape[1]
    if weight is not None:
        _check_parameter(f"{when}_weight", weight, (heads, heads), q)
    if bias is not None:
        if weight is None:
            raise ValueError(f"{when}_bias: got {describe(bias)} without {when}_weight, accepted is None then")
        _check_parameter(f"{when}_bias", bias, (heads,), q)


def _check_given(name: str, weight: Tensor) -> None:
    if weight is None:
        raise ValueError(f"{name}: got None, accepted is a floating tensor (H, H)")


def _check_norm(norm: BatchNorm, q: Tensor) -> None:
    if not isinstance(norm, BatchNorm):
        raise ValueError(f"norm: got {type(norm).__name__}, accepted is BatchNorm.of(module) or None")
    if (norm.running_mean is None) != (norm.running_var is None):
        raise ValueError("norm: running_mean and running_var must both be given or both be None")
    if norm.running_mean is None and not norm.use_batch_stats:
        raise ValueError("norm: got no running statistics and use_batch_stats=False, accepted is one of the two")
    for field in ("running_mean", "running_var", "weight", "bias"):
        tensor = getattr(norm, field)
        if tensor is not None:
            _check_parameter(f"norm.{field}", tensor, (q.shape[1],), q)


def _compute_dtype(q: Tensor) -> torch.dtype:
    """The dtype a tensor on the CPU is computed in: autocast's where it is on and q is not float64."""
    if torch.is_autocast_enabled("cpu") and q.dtype != torch.float64:
        return torch.get_autocast_dtype("cpu")
    return q.dtype


def _cpp_reasons(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pre_weight: Tensor | None,
    pre_bias: Tensor | None,
    post_weight: Tensor | None,
    post_bias: Tensor | None,
    norm: BatchNorm | None,
    output_scale: float,
    mask: Tensor | None,
    scale: float,
    dropout_p: float,
    dropout_after_mix: bool,
) -> list[str]:
    if q.device.type != "cpu":
        return [*backends.cpp_reasons(), f"it takes tensors on the CPU, q is on {q.device}"]
    reasons = list(backends.cpp_reasons())
    dtype = _compute_dtype(q)
    if dtype not in CPP_DTYPES:
        reasons.append(f"dtype {dtype} is not one of float32, bfloat16")
    if q.shape[1] > MAX_HEADS:
        reasons.append(f"{q.shape[1]} heads are more than {MAX_HEADS}")
    if q.shape[3] > MAX_HEAD_DIM:
        reasons.append(f"head dimension {q.shape[3]} is larger than {MAX_HEAD_DIM}")
    if dropout_p > 0.0:
        reasons.append("attention dropout is not implemented")
    affine = (None, None)
    if norm is not None:
        affine = norm.weight, norm.bias
        if norm.use_batch_stats:
            reasons.append("the norm uses batch statistics, which is not implemented")
    for tensor in (pre_weight, pre_bias, post_weight, post_bias, *affine):
        if tensor is not None and tensor.dtype not in CPP_DTYPES:
            reasons.append(f"a parameter of dtype {tensor.dtype} is not one of float32, bfloat16")
            break
    if gradients_needed(q, k, v, pre_weight, pre_bias, post_weight, post_bias, *affine):
        reasons.append("gradients are needed and it has no backward")
    return reasons


def _with_adjacent_channels(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    tensor = tensor.to(dtype)
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


def _run_cpp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pre_weight: Tensor | None,
    pre_bias: Tensor | None,
    post_weight: Tensor | None,
    post_bias: Tensor | None,
    norm: BatchNorm | None,
    output_scale: float,
    mask: Tensor | None,
    scale: float,
    dropout_p: float,
    dropout_after_mix: bool,
) -> Tensor:
    dtype = _compute_dtype(q)
    q, k, v = (_with_adjacent_channels(tensor, dtype) for tensor in (q, k, v))
    weight, bias, mean, var, eps = None, None, None, None, 0.0
    if norm is not None:
        weight, bias, mean, var, eps = norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps
    statistics = (weight, bias, mean, var, eps, False)
    return torch.ops.fastvit.head_mixed_attention.default(
        q, k, v, pre_weight, pre_bias, post_weight, post_bias, *statistics, output_scale, mask, scale
    )


def _no_reasons(*_: object) -> list[str]:
    return []


def _run_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pre_weight: Tensor | None,
    pre_bias: Tensor | None,
    post_weight: Tensor | None,
    post_bias: Tensor | None,
    norm: BatchNorm | None,
    output_scale: float,
    mask: Tensor | None,
    scale: float,
    dropout_p: float,
    dropout_after_mix: bool,
) -> Tensor:
    # torch's convolution wants the maps' dtype, which under autocast it sees to itself.
    mixes = [None if t is None else t.to(q.dtype) for t in (pre_weight, pre_bias, post_weight, post_bias)]
    return functional.head_mixed_attention(
        q,
        k,
        v,
        pre_weight=mixes[0],
        pre_bias=mixes[1],
        post_weight=mixes[2],
        post_bias=mixes[3],
        norm=norm,
        output_scale=output_scale,
        mask=mask,
        scale=scale,
        dropout_p=dropout_p,
        dropout_after_mix=dropout_after_mix,
    )


IMPLEMENTATIONS = (
    Implementation("cpp", _cpp_reasons, _run_cpp),
    Implementation("reference", _no_reasons, _run_reference),
)
"""In order of preference."""


def head_mixed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    pre_weight: Tensor | None = None,
    pre_bias: Tensor | None = None,
    post_weight: Tensor | None = None,
    post_bias: Tensor | None = None,
    norm: BatchNorm | None = None,
    output_scale: float = 1.0,
    mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_after_mix: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Attention whose maps are mixed linearly across heads before and/or after the softmax; no map is written.

    S_g = scale * q_g k_g^T;  S'_h = sum_g pre_weight[h, g] S_g + pre_bias[h];  P_h = softmax(S'_h);
    M_h = output_scale * norm(sum_g post_weight[h, g] P_g + post_bias[h]);  out_h = M_h v_h.

    Args:
        q: (B, H, Nq, D), floating, any strides.
        k, v: (B, H, Nk, D), dtype and device of q (under autocast dtypes may differ).
        pre_weight, post_weight: (H, H), row h makes output head h; None leaves that mix out. pre_bias, post_bias: (H,).
        norm: BatchNorm over heads on the mixed map, or None.
        output_scale: factor on the finished map.
        mask: bool, True = attend; (B, Nk) key padding, or broadcastable to (B, H, Nq, Nk). Applied to the mixed logits;
            the finished map is zero at masked positions too. A row with no key left gives zeros.
        scale: D ** -0.5 by default.
        dropout_p: on the softmaxed maps, or on the finished map with ``dropout_after_mix``; pass 0 outside training.
        backend: "auto", "cpp" or "reference".

    Returns:
        (B, H, Nq, D) in q's dtype, or autocast's.

    Raises:
        ValueError: a shape, dtype, device or probability that is not accepted, or an unknown backend.
        RuntimeError: the backend asked for cannot run this call; lists every reason.

    Source: Zhou et al. 2021 (DeepViT), section 4; Touvron et al. 2021 (CaiT); Shazeer et al. 2020 (talking heads). The
    plain form is ``fastvit.reference.functional.head_mixed_attention``.
    """
    check_tokens(q, k, v)
    _check_mix("pre", pre_weight, pre_bias, q)
    _check_mix("post", post_weight, post_bias, q)
    if norm is not None:
        _check_norm(norm, q)
    if mask is not None:
        mask = check_mask(mask, q, k)
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p: got {dropout_p!r}, accepted is a probability from 0 to 1")
    if scale is None:
        scale = q.shape[3] ** -0.5
    arguments = (
        q,
        k,
        v,
        pre_weight,
        pre_bias,
        post_weight,
        post_bias,
        norm,
        output_scale,
        mask,
        scale,
        dropout_p,
        dropout_after_mix,
    )
    return select("head_mixed_attention", IMPLEMENTATIONS, backend, arguments, {}).run(*arguments)


def talking_heads_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pre_weight: Tensor,
    pre_bias: Tensor | None,
    post_weight: Tensor,
    post_bias: Tensor | None,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """CaiT's talking heads: heads mixed before and after the softmax, dropout on the finished map.

    Arguments, result and errors as in :func:`head_mixed_attention`. Source: facebookresearch/deit ``cait_models.py``.
    """
    _check_given("pre_weight", pre_weight)
    _check_given("post_weight", post_weight)
    return head_mixed_attention(
        q,
        k,
        v,
        pre_weight=pre_weight,
        pre_bias=pre_bias,
        post_weight=post_weight,
        post_bias=post_bias,
        mask=mask,
        scale=scale,
        dropout_p=dropout_p,
        dropout_after_mix=True,
        backend=backend,
    )


def re_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: BatchNorm | None,
    *,
    output_scale: float = 1.0,
    mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """DeepViT's re-attention: softmax, dropout, linear mix across heads, BatchNorm over heads, output scale.

    Arguments, result and errors as in :func:`head_mixed_attention`; ``weight`` (H, H) is the 1x1 convolution's. Source:
    Zhou et al. 2021, equation 3, and zhoudaquan/dvit_repo ``layers.py``.
    """
    _check_given("weight", weight)
    return head_mixed_attention(
        q,
        k,
        v,
        post_weight=weight,
        post_bias=bias,
        norm=norm,
        output_scale=output_scale,
        mask=mask,
        scale=scale,
        dropout_p=dropout_p,
        backend=backend,
    )
