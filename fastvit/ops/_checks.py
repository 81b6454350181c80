"""Checks of arguments that several attention operators share; each error names the argument and what is accepted."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check_mask", "check_tokens", "describe", "to_four_axes"]


def describe(value: object) -> str:
    """What was given for a tensor, in an error message."""
    if not isinstance(value, Tensor):
        return f"{value!r} ({type(value).__name__})"
    return f"{tuple(value.shape)} {value.dtype} on {value.device}"


def check_tokens(q: Tensor, k: Tensor, v: Tensor) -> None:
    """ValueError unless q is (B, H, Nq, D) and k, v are (B, H, Nk, D) of one floating dtype on one device."""
    if not isinstance(q, Tensor) or q.dim() != 4 or not q.is_floating_point():
        raise ValueError(f"q: got {describe(q)}, accepted is a floating tensor (B, H, Nq, D)")
    if not isinstance(k, Tensor) or k.dim() != 4 or k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3]:
        raise ValueError(f"k: got {describe(k)}, accepted beside q {describe(q)} is (B, H, Nk, D)")
    if not isinstance(v, Tensor) or v.shape != k.shape:
        raise ValueError(f"v: got {describe(v)}, accepted beside k {describe(k)} is the same shape")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.device != q.device:
            raise ValueError(f"{name}: got {describe(tensor)}, q is on {q.device}")
        if tensor.dtype != q.dtype and not torch.is_autocast_enabled(q.device.type):
            raise ValueError(f"{name}: got {describe(tensor)}, q is {q.dtype}")


def to_four_axes(name: str, tensor: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """A view with leading axes of size 1; ValueError unless it broadcasts to (B, H, Nq, Nk) on q's device."""
    full = (*q.shape[:3], k.shape[2])
    missing = 4 - tensor.dim()
    if missing > 0:
        tensor = tensor[(None,) * missing]
    if missing < 0 or any(size not in (1, wanted) for size, wanted in zip(tensor.shape, full, strict=True)):
        raise ValueError(f"{name}: got {describe(tensor)}, accepted is broadcastable to (B, H, Nq, Nk) = {full}")
    if tensor.device != q.device:
        raise ValueError(f"{name}: got {describe(tensor)}, q is on {q.device}")
    return tensor


def check_mask(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """The mask with four axes; (B, Nk) is key padding. ValueError where it is not bool or does not broadcast."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise ValueError(f"mask: got {describe(mask)}, accepted is bool, True = attend")
    if mask.dim() == 2:
        if mask.shape[0] not in (1, q.shape[0]):
            raise ValueError(
                f"mask: got {describe(mask)}, accepted with two axes is key padding (B, Nk) = "
                f"{(q.shape[0], k.shape[2])}; give a mask of (Nq, Nk) leading axes of size 1"
            )
        mask = mask.unsqueeze(1).unsqueeze(1)  # half the time of indexing with None
    return to_four_axes("mask", mask, q, k)
