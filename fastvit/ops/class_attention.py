"""Attention of few queries, as class tokens are, over all tokens: who computes it.

- ``cpp``: ``csrc/cpu/class_attention*`` up to eight queries, the tiles of masked attention beyond; forward and
  backward. First on the CPU where it has vectors (AVX2 or better).
- ``triton``: ``kernels/class_attention*.py``, keys split between programs so that one image fills the device. First on
  CUDA.
- ``sdpa``: ``torch.nn.functional.scaled_dot_product_attention``. First everywhere else, and where there is dropout.
- ``reference``: ``fastvit.reference.functional.class_attention``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvit.ops import _at_once, _attention
from fastvit.ops._attention import Call, Engine
from fastvit.ops._dispatch import Implementation, select

__all__ = ["class_attention"]

_attention.define_attention("class_attention_triton")


@torch.library.impl("fastvit::class_attention_triton", ("cpu", "cuda"))
def _triton(*arguments: Any) -> Tensor:
    from fastvit.kernels.attention_class import class_attention_forward

    return class_attention_forward(*arguments)


@torch.library.impl("fastvit::class_attention_triton_backward", ("cpu", "cuda"))
def _triton_backward(*arguments: Any) -> tuple[Tensor, ...]:
    from fastvit.kernels.attention_class_backward import class_attention_backward

    return class_attention_backward(*arguments)


_attention.ENGINES["class_triton"] = Engine.keeping_nothing("class_attention_triton")


ORDERS = _attention.orders("class_triton")
IMPLEMENTATIONS = ORDERS.cpp_first
"""In order of preference."""


def _order(call: Call) -> tuple[Implementation, ...]:
    device = call.q.device.type
    if device == "cpu" and _attention.VECTORISED:
        return ORDERS.cpp_first
    return ORDERS.triton_first if device == "cuda" else ORDERS.sdpa_first


def class_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """softmax(q k^T * scale + bias) v for few queries, restricted to the keys that ``mask`` allows.

    Args:
        q: (B, H, Nq, D), floating, any strides; made for one to four queries, right for any number.
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

    Source: Touvron et al. 2021 (CaiT), section 3; Yuan et al. 2021 (CeiT), section 3.3; the plain form is
    ``fastvit.reference.functional.class_attention``.
    """
    found = _at_once.tried(backend, _at_once.attention, q, k, v, mask, bias, scale, dropout_p)
    if found is not None:
        return found
    call = _attention.checked(q, k, v, mask, bias, scale, dropout_p)
    return select("class_attention", _order(call), backend, (call,), {}).run(call)
