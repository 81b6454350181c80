"""Attention mixed across heads (talking heads, re-attention): the checks, and who computes it.

- ``cpp``: ``csrc/cpu/head_mixed_attention*``: all heads of a few queries at a time, their maps never leave the caches.
- ``triton``: ``kernels/head_mixed_attention*.py``, the same on a GPU.
- ``reference``: ``fastvit.reference.functional.head_mixed_attention``; attention dropout is left to it.

The others are engines of :mod:`fastvit.ops._head_mixing`, which has the algebra of the norms around them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvit import backends
from fastvit.ops import _head_mixed_attention_native as native
from fastvit.ops import _head_mixed_attention_triton as triton
from fastvit.ops._checks import check_mask, check_tokens, describe
from fastvit.ops._dispatch import Implementation, gradients_needed, select
from fastvit.ops._head_mixing import Call, attend
from fastvit.reference import functional
from fastvit.reference.functional import BatchNorm, LayerNorm

__all__ = ["head_mixed_attention", "re_attention", "talking_heads_attention"]

CPP_DTYPES = (torch.float32, torch.bfloat16)
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEADS = 32
MAX_HEAD_DIM = 128


def _check_parameter(name: str, tensor: Tensor | None, shape: tuple[int, ...], q: Tensor) -> None:
    if tensor is None:
        return
    if not isinstance(tensor, Tensor) or tensor.shape != shape or not tensor.is_floating_point():
        raise ValueError(
            f"{name}: got {describe(tensor)}, accepted is a floating tensor {shape}, q has {shape[0]} heads"
        )
    if tensor.device != q.device:
        raise ValueError(f"{name}: got {describe(tensor)}, q is on {q.device}")


def _check_mix(names: tuple[str, str], weight: Tensor | None, bias: Tensor | None, q: Tensor) -> None:
    if weight is None:
        if bias is not None:
            raise ValueError(f"{names[1]}: got {describe(bias)} without {names[0]}, accepted is None then")
        return
    heads = q.shape[1]
    _check_parameter(names[0], weight, (heads, heads), q)
    _check_parameter(names[1], bias, (heads,), q)


def _check_given(name: str, weight: Tensor) -> None:
    if weight is None:
        raise ValueError(f"{name}: got None, accepted is a floating tensor (H, H)")


def _check_norm(norm: BatchNorm | LayerNorm, q: Tensor) -> None:
    shape = (q.shape[1],)
    if isinstance(norm, BatchNorm):
        if (norm.running_mean is None) != (norm.running_var is None):
            raise ValueError("norm: running_mean and running_var must both be given or both be None")
        if norm.running_mean is None and not norm.use_batch_stats:
            raise ValueError("norm: got no running statistics and use_batch_stats=False, accepted is one of the two")
        _check_parameter("norm.running_mean", norm.running_mean, shape, q)
        _check_parameter("norm.running_var", norm.running_var, shape, q)
    elif not isinstance(norm, LayerNorm):
        accepted = "BatchNorm.of(module), LayerNorm.of(module) or None"
        raise ValueError(f"norm: got {type(norm).__name__}, accepted is {accepted}")
    _check_parameter("norm.weight", norm.weight, shape, q)
    _check_parameter("norm.bias", norm.bias, shape, q)


def _compute_dtype(q: Tensor) -> torch.dtype:
    """The dtype q is computed in: autocast's where it is on and q is not float64."""
    device = q.device.type
    if torch.is_autocast_enabled(device) and q.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return q.dtype


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _reasons(call: Call, dtypes: tuple[torch.dtype, ...]) -> list[str]:
    """What no engine can do, and the dtypes that one cannot."""
    reasons = []
    dtype = _compute_dtype(call.q)
    if dtype not in dtypes:
        reasons.append(f"dtype {dtype} is not one of {_names(dtypes)}")
    if call.q.shape[1] > MAX_HEADS:
        reasons.append(f"{call.q.shape[1]} heads are more than {MAX_HEADS}")
    if call.q.shape[3] > MAX_HEAD_DIM:
        reasons.append(f"head dimension {call.q.shape[3]} is larger than {MAX_HEAD_DIM}")
    if call.dropout_p > 0.0:
        reasons.append("attention dropout is not implemented")
    for tensor in call.parameters():
        if tensor is not None and tensor.dtype not in dtypes:
            reasons.append(f"a parameter of dtype {tensor.dtype} is not one of {_names(dtypes)}")
            break
    if isinstance(call.norm, BatchNorm):
        reasons += _batch_norm_reasons(call.norm, call)
    return reasons


def _batch_norm_reasons(norm: BatchNorm, call: Call) -> list[str]:
    if norm.layer is not None and norm.process_group is None:
        return [f"the norm is {type(norm.layer).__name__}, which has to be called"]
    if norm.process_group is not None:
        return ["a synchronised norm is not traced"] if torch.compiler.is_compiling() else []
    values = call.q.shape[0] * call.q.shape[2] * call.k.shape[2]
    if norm.use_batch_stats and values <= 1:
        return [f"the norm uses batch statistics, of {values} values"]
    return []


def _cpp_reasons(call: Call) -> list[str]:
    if call.q.device.type != "cpu":
        return [*backends.cpp_reasons(), f"it takes tensors on the CPU, q is on {call.q.device}"]
    return backends.cpp_reasons() + _reasons(call, CPP_DTYPES)


def _run_cpp(call: Call) -> Tensor:
    dtype = _compute_dtype(call.q)
    by_batch = isinstance(call.norm, BatchNorm) and call.norm.use_batch_stats
    if by_batch or gradients_needed(call.q, call.k, call.v, *call.parameters()):
        return attend(native.ENGINE, call, dtype)
    return native.infer(call, dtype)


def _triton_reasons(call: Call) -> list[str]:
    if reasons := backends.triton_reasons(call.q.device):
        return reasons
    reasons = _reasons(call, TRITON_DTYPES)
    if call.q.device.type == "cpu" and _compute_dtype(call.q) == torch.bfloat16:
        reasons.append("Triton's interpreter multiplies bfloat16 as integers")
    return reasons


def _run_triton(call: Call) -> Tensor:
    return attend(triton.ENGINE, call, _compute_dtype(call.q))


def _no_reasons(call: Call) -> list[str]:
    return []


def _run_reference(call: Call) -> Tensor:
    # torch's convolution wants the maps' dtype, which under autocast it sees to itself.
    mixes = (call.pre_weight, call.pre_bias, call.post_weight, call.post_bias)
    pre_weight, pre_bias, post_weight, post_bias = (None if t is None else t.to(call.q.dtype) for t in mixes)
    return functional.head_mixed_attention(
        call.q,
        call.k,
        call.v,
        pre_weight=pre_weight,
        pre_bias=pre_bias,
        post_weight=post_weight,
        post_bias=post_bias,
        norm=call.norm,
        output_scale=call.output_scale,
        mask=call.mask,
        scale=call.scale,
        dropout_p=call.dropout_p,
        dropout_after_mix=call.dropout_after_mix,
    )


IMPLEMENTATIONS = (
    Implementation("cpp", _cpp_reasons, _run_cpp),
    Implementation("triton", _triton_reasons, _run_triton),
    Implementation("reference", _no_reasons, _run_reference),
)
"""In order of preference."""


def _attend(
    post_names: tuple[str, str],
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pre_weight: Tensor | None,
    pre_bias: Tensor | None,
    post_weight: Tensor | None,
    post_bias: Tensor | None,
    norm: BatchNorm | LayerNorm | None,
    output_scale: float,
    mask: Tensor | None,
    scale: float | None,
    dropout_p: float,
    dropout_after_mix: bool,
) -> Tensor:
    """Check, choose and run; ``post_names``: what the caller calls the weight and bias of the mix after the softmax."""
    check_tokens(q, k, v)
    _check_mix(("pre_weight", "pre_bias"), pre_weight, pre_bias, q)
    _check_mix(post_names, post_weight, post_bias, q)
    if norm is not None:
        _check_norm(norm, q)
    if mask is not None:
        mask = check_mask(mask, q, k)
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p: got {dropout_p!r}, accepted is a probability from 0 to 1")
    if scale is None:
        scale = q.shape[3] ** -0.5
    mixes = (pre_weight, pre_bias, post_weight, post_bias)
    call = Call(q, k, v, *mixes, norm, output_scale, mask, scale, dropout_p, dropout_after_mix)
    return select("head_mixed_attention", IMPLEMENTATIONS, backend, (call,), {}).run(call)


def head_mixed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    pre_weight: Tensor | None = None,
    pre_bias: Tensor | None = None,
    post_weight: Tensor | None = None,
    post_bias: Tensor | None = None,
    norm: BatchNorm | LayerNorm | None = None,
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
        norm: BatchNorm or LayerNorm over heads on the mixed map, or None. A BatchNorm that uses the batch's statistics
            has its running statistics updated in place; a synchronised one sums over its processes.
        output_scale: factor on the finished map.
        mask: bool, True = attend; (B, Nk) key padding, or broadcastable to (B, H, Nq, Nk). Applied to the mixed logits;
            the finished map is zero at masked positions too. A row with no key left gives zeros.
        scale: D ** -0.5 by default.
        dropout_p: on the softmaxed maps, or on the finished map with ``dropout_after_mix``; pass 0 outside training.
        backend: "auto", "cpp", "triton" or "reference".

    Returns:
        (B, H, Nq, D) in q's dtype, or autocast's.

    Raises:
        ValueError: a shape, dtype, device or probability that is not accepted, or an unknown backend.
        RuntimeError: the backend asked for cannot run this call; lists every reason.

    Source: Zhou et al. 2021 (DeepViT), section 4; Touvron et al. 2021 (CaiT); Shazeer et al. 2020 (talking heads). The
    plain form is ``fastvit.reference.functional.head_mixed_attention``.
    """
    arguments = (q, k, v, pre_weight, pre_bias, post_weight, post_bias, norm, output_scale, mask, scale)
    return _attend(("post_weight", "post_bias"), backend, *arguments, dropout_p, dropout_after_mix)


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
    arguments = (q, k, v, pre_weight, pre_bias, post_weight, post_bias, None, 1.0, mask, scale)
    return _attend(("post_weight", "post_bias"), backend, *arguments, dropout_p, True)


def re_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: BatchNorm | LayerNorm | None,
    *,
    output_scale: float = 1.0,
    mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """DeepViT's re-attention: softmax, dropout, linear mix across heads, norm over heads, output scale.

    Arguments, result and errors as in :func:`head_mixed_attention`; ``weight`` (H, H) is the 1x1 convolution's. Source:
    Zhou et al. 2021, equation 3, and zhoudaquan/dvit_repo ``layers.py``; with a LayerNorm and no bias it is
    lucidrains/vit-pytorch's.
    """
    _check_given("weight", weight)
    arguments = (q, k, v, None, None, weight, bias, norm, output_scale, mask, scale)
    return _attend(("weight", "bias"), backend, *arguments, dropout_p, False)
