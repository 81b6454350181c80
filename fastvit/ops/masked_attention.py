"""Attention under a mask and an additive bias: who computes it.

- ``cpp``: ``csrc/cpu/masked_attention*``, forward and backward. First on the CPU where it has vectors (AVX2 or better).
- ``triton``: ``kernels/masked_attention.py``. Reads masks through their strides, where PyTorch's CUDA backends first
  write them out in full and padded; so it goes first on CUDA where there is a mask or a bias.
- ``sdpa``: ``torch.nn.functional.scaled_dot_product_attention``. First everywhere else, and where there is dropout.
- ``reference``: ``fastvit.reference.functional.masked_attention``.
"""

from __future__ import annotations

from torch import Tensor

from fastvit.ops import _at_once, _attention
from fastvit.ops._attention import Call
from fastvit.ops._dispatch import Implementation, select

__all__ = ["masked_attention"]


ORDERS = _attention.orders("triton")
IMPLEMENTATIONS = ORDERS.cpp_first
"""In order of preference."""


def _order(call: Call) -> tuple[Implementation, ...]:
    """Who is asked first. Sizes play no part, so that a compiled graph serves any of them."""
    device = call.q.device.type
    if device == "cpu" and _attention.VECTORISED:
        return ORDERS.cpp_first
    masked = call.mask is not None or call.bias is not None
    return ORDERS.triton_first if device == "cuda" and masked else ORDERS.sdpa_first


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
    found = _at_once.tried(backend, _at_once.attention, q, k, v, mask, bias, scale, dropout_p)
    if found is not None:
        return found
    call = _attention.checked(q, k, v, mask, bias, scale, dropout_p)
    return select("masked_attention", _order(call), backend, (call,), {}).run(call)
