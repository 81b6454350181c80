"""Attention under a mask and an additive bias: the checks, the operator's schema, and who computes it.

- ``triton``: ``kernels/masked_attention.py``, forward only. Reads masks through their strides, where PyTorch's CUDA
  backends first write them out in full and padded; so it goes first on CUDA where there is a mask or a bias.
- ``cpp``: ``csrc/cpu/masked_attention*``, forward only, without a bias. First on the CPU, but for the calls that
  :func:`_sdpa_is_faster` knows.
- ``sdpa``: ``torch.nn.functional.scaled_dot_product_attention``, with gradients. First everywhere else.
- ``reference``: ``fastvit.reference.functional.masked_attention``.
"""

from __future__ import annotations

import importlib

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit import backends
from fastvit.ops._checks import check_mask, check_tokens, describe, to_four_axes
from fastvit.ops._dispatch import Implementation, gradients_needed, select
from fastvit.reference import functional

__all__ = ["masked_attention"]

CPP_DTYPES = (torch.float32, torch.bfloat16)
CPP_MAX_HEAD_DIM = 128
CPP_MIN_FLOAT32_QUERIES = 9
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TRITON_MAX_HEAD_DIM = 128

torch.library.define(
    "fastvit::masked_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? bias, float scale) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.register_fake("fastvit::masked_attention")
def _fake(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, scale: float) -> Tensor:
    batch, heads, queries, head_dim = q.shape
    return q.new_empty((batch, queries, heads, head_dim)).transpose(1, 2)


# An operator of its own, since Triton's interpreter runs the one above on the CPU, too.
torch.library.define(
    "fastvit::masked_attention_cpp",
    "(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.register_fake("fastvit::masked_attention_cpp")
def _fake_cpp(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return _fake(q, k, v, mask, None, scale)


@torch.library.impl("fastvit::masked_attention", ("cpu", "cuda"))
def _launch(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, scale: float) -> Tensor:
    from fastvit.kernels.masked_attention import masked_attention_forward

    return masked_attention_forward(q, k, v, mask, bias, scale)


def _check_bias(bias: Tensor, q: Tensor, k: Tensor) -> Tensor:
    if not isinstance(bias, Tensor) or not bias.is_floating_point():
        raise ValueError(f"bias: got {describe(bias)}, accepted is floating; pass bool masks as mask")
    return to_four_axes("bias", bias, q, k)


def _autocast_dtype(q: Tensor) -> torch.dtype:
    """The dtype q is computed in: autocast's where it is on and q is not float64."""
    device = q.device.type
    if torch.is_autocast_enabled(device) and q.dtype in TRITON_DTYPES:
        return torch.get_autocast_dtype(device)
    return q.dtype


def _cpp_reasons(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    scale: float | None,
    dropout_p: float,
) -> list[str]:
    if q.device.type != "cpu":
        return [*backends.cpp_reasons(), f"it takes tensors on the CPU, q is on {q.device}"]
    reasons = backends.cpp_reasons()
    dtype = _autocast_dtype(q)
    if dtype not in CPP_DTYPES:
        reasons.append(f"dtype {dtype} is not one of float32, bfloat16")
    if q.shape[3] > CPP_MAX_HEAD_DIM:
        reasons.append(f"head dimension {q.shape[3]} is larger than {CPP_MAX_HEAD_DIM}")
    if bias is not None:
        reasons.append("an additive bias is not implemented")
    if dropout_p > 0.0:
        reasons.append("attention dropout is not implemented")
    if gradients_needed(q, k, v, bias):
        reasons.append("gradients are needed and it has no backward")
    return reasons


def _with_adjacent_channels(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    tensor = tensor if tensor.dtype == dtype else tensor.to(dtype)
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


def _run_cpp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    scale: float | None,
    dropout_p: float,
) -> Tensor:
    dtype = _autocast_dtype(q)
    q, k, v = (_with_adjacent_channels(tensor, dtype) for tensor in (q, k, v))
    scale = q.shape[3] ** -0.5 if scale is None else scale
    return torch.ops.fastvit.masked_attention_cpp.default(q, k, v, mask, scale)


def _triton_reasons(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    scale: float | None,
    dropout_p: float,
) -> list[str]:
    reasons = list(backends.triton_reasons(q.device))
    dtype = _autocast_dtype(q)
    if dtype not in TRITON_DTYPES:
        reasons.append(f"dtype {dtype} is not one of float32, float16, bfloat16")
    if dtype == torch.bfloat16 and q.device.type == "cpu":
        reasons.append("Triton's interpreter multiplies bfloat16 as integers")
    if q.shape[3] > TRITON_MAX_HEAD_DIM:
        reasons.append(f"head dimension {q.shape[3]} is larger than {TRITON_MAX_HEAD_DIM}")
    if dropout_p > 0.0:
        reasons.append("attention dropout is not implemented")
    if gradients_needed(q, k, v, bias):
        reasons.append("gradients are needed and it has no backward")
    return reasons


def _run_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    scale: float | None,
    dropout_p: float,
) -> Tensor:
    dtype = _autocast_dtype(q)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    return torch.ops.fastvit.masked_attention(q.to(dtype), k.to(dtype), v.to(dtype), mask, bias, scale)


def _no_reasons(*_: object) -> list[str]:
    return []


def _run_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    scale: float | None,
    dropout_p: float,
) -> Tensor:
    if bias is None:
        allowed = mask
    else:
        bias = bias.to(q.dtype)
        allowed = bias if mask is None else torch.where(mask, bias, float("-inf"))
    if allowed is None or q.device.type == "cpu":  # the CPU backends give zeros for a row without keys
        return F.scaled_dot_product_attention(q, k, v, allowed, dropout_p, scale=scale)
    # Of the other devices' backends some give NaN there, or the mean of v, and NaN gradients: such a row sees every key
    # in the call, and its result is cut off behind it.
    empty = ~(allowed if bias is None else allowed != float("-inf")).any(-1, keepdim=True)
    allowed = allowed | empty if bias is None else allowed.masked_fill(empty, 0.0)
    return F.scaled_dot_product_attention(q, k, v, allowed, dropout_p, scale=scale).masked_fill(empty, 0.0)


def _run_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    scale: float | None,
    dropout_p: float,
) -> Tensor:
    return functional.masked_attention(q, k, v, mask, None if bias is None else bias.to(q.dtype), scale, dropout_p)


_CPP = Implementation("cpp", _cpp_reasons, _run_cpp)
_TRITON = Implementation("triton", _triton_reasons, _run_triton)
_SDPA = Implementation("sdpa", _no_reasons, _run_sdpa)
_REFERENCE = Implementation("reference", _no_reasons, _run_reference)

IMPLEMENTATIONS = (_CPP, _SDPA, _TRITON, _REFERENCE)
"""In order of preference."""

SDPA_FIRST_IMPLEMENTATIONS = (_SDPA, _CPP, _TRITON, _REFERENCE)
"""The order off the CPU, and on it where SDPA is faster."""

CUDA_MASKED_IMPLEMENTATIONS = (_TRITON, _SDPA, _CPP, _REFERENCE)
"""The order on CUDA under a mask or a bias."""


_CPP_IS_VECTORISED = not backends.cpp_reasons() and (
    importlib.import_module("fastvit._C").cpu_info()["in_use"] != "portable"
)


def _sdpa_is_faster(q: Tensor) -> bool:
    """Whether SDPA takes less time than the C++ kernel on the CPU (``benchmarks/ops/masked_attention.py`` measures it).

    - Without AVX2 the two tie.
    - The C++ kernel's vectors hold a query a lane, so that few queries leave lanes empty: up to 8 queries SDPA needs
      0.3 to 1 times its time in float32. In bfloat16 SDPA is slower even with one query.
    """
    return not _CPP_IS_VECTORISED or (q.shape[2] < CPP_MIN_FLOAT32_QUERIES and _autocast_dtype(q) == torch.float32)


def _order(q: Tensor, plain: bool) -> tuple[Implementation, ...]:
    """Who is asked first; ``plain``: there is neither mask nor bias."""
    device = q.device.type
    if device == "cpu" and not _sdpa_is_faster(q):
        return IMPLEMENTATIONS
    return CUDA_MASKED_IMPLEMENTATIONS if device == "cuda" and not plain else SDPA_FIRST_IMPLEMENTATIONS


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """softmax(q k^T * scale + bias) v, restricted to the keys that ``mask`` allows; no (Nq, Nk) map is written.

    Args:
        q: (B, H, Nq, D), floating, any strides.
        k, v: (B, H, Nk, D), dtype and device of q (under autocast dtypes may differ).
        mask: bool, True = attend; (B, Nk) key padding, or broadcastable to (B, H, Nq, Nk). A row with no key left gives
            zeros, and zero gradients.
        bias: floating, added to the logits; broadcastable to (B, H, Nq, Nk); -inf masks a key.
        scale: D ** -0.5 by default.
        dropout_p: probability of dropping an attention weight; pass 0 outside training.
        backend: "auto", "cpp", "sdpa", "triton" or "reference".

    Returns:
        (B, H, Nq, D) in q's dtype, or autocast's.

    Raises:
        ValueError: a shape, dtype, device or probability that is not accepted, or an unknown backend.
        RuntimeError: the backend asked for cannot run this call; lists every reason.

    Source: Vaswani et al. 2017, section 3.2.1; the plain form is ``fastvit.reference.functional.masked_attention``.
    """
    check_tokens(q, k, v)
    if mask is not None:
        mask = check_mask(mask, q, k)
    if bias is not None:
        bias = _check_bias(bias, q, k)
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p: got {dropout_p!r}, accepted is a probability from 0 to 1")
    order = _order(q, mask is None and bias is None)
    arguments = (q, k, v, mask, bias, scale, dropout_p)
    return select("masked_attention", order, backend, arguments, {}).run(*arguments)
