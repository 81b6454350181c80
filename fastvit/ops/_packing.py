"""Weights of linear layers in the layout of the C++ kernels, made once and kept beside the weights.

A packed weight is used again while the weight is the same object, and its version counter, address, sizes, strides,
dtype and a fingerprint are what they were. The version counter tells of every change in place that autograd can see;
the address of a replaced ``.data`` and of ``share_memory``; the fingerprint, of 64 values spread over the weight and
read at each call, of writes through ``.data`` and by other processes. A single value written in such a way may escape
it: call :func:`release` then. Weights that have no version counter (inference tensors), and all weights with
``FASTVIT_PACK=0``, are packed at each call. Nothing is kept on modules or in a ``state_dict``.
"""

from __future__ import annotations

import importlib
import os
import weakref
from typing import Any, NamedTuple

from torch import Tensor

from fastvit import backends
from fastvit.ops._schema import define

__all__ = ["packed", "release"]


def _enabled(value: str) -> bool:
    if value not in ("", "0", "1"):
        raise ValueError(f"FASTVIT_PACK: expected '0' or '1', got {value!r}")
    return value != "0"


ENABLED = _enabled(os.environ.get("FASTVIT_PACK", ""))

_pack = define("pack_weight", "Tensor weight", "Tensor", lambda a: a.weight.new_empty(0)).eager
_fingerprint = None if backends.cpp_reasons() else importlib.import_module("fastvit._C").fingerprint


class _Kept(NamedTuple):
    weight: weakref.ref[Tensor]
    state: tuple[Any, ...]
    packed: Tensor


_kept: dict[int, _Kept] = {}
"""By the identity of the weight."""


def packed(weight: Tensor) -> Tensor | None:
    """A float32 or bfloat16 weight (N, K) on the CPU, packed; None where the call is to pack it."""
    if not ENABLED or _fingerprint is None or weight.is_inference():
        return None
    address, sizes, strides, dtype = weight.data_ptr(), weight.shape, weight.stride(), weight.dtype
    sample = _fingerprint(address, sizes[0], sizes[1], strides[0], strides[1], weight.itemsize)
    state = (weight._version, address, sizes, strides, dtype, sample)
    kept = _kept.get(id(weight))
    if kept is not None and kept.state == state and kept.weight() is weight:
        return kept.packed
    identity = id(weight)
    fresh = _Kept(weakref.ref(weight, lambda _: _kept.pop(identity, None)), state, _pack(weight.detach()))
    _kept[identity] = fresh
    return fresh.packed


def release() -> None:
    """Give up every packed weight; the next call packs anew."""
    _kept.clear()
