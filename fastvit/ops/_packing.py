"""Weights of linear layers in the layout of the kernels that read them, made once and kept beside the weights.

A packed weight is used again while the weight is the same object, or a view of it, and its version counter, address,
sizes, strides, dtype and a fingerprint are what they were. The version counter tells of every change in place that
autograd can see; the address of a replaced ``.data`` and of ``share_memory``; the fingerprint, of 64 values spread over
the weight and read at each call, of writes through ``.data`` and by other processes. A single value written in such a
way may escape it: call ``fastvit.release_memory()`` then. Weights that have no version counter (inference tensors), and
all weights with ``FASTVIT_PACK=0``, are packed at each call. Nothing is kept on modules or in a ``state_dict``.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import sys
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from fastvit import backends
from fastvit.ops._schema import define

__all__ = ["packed", "release_memory"]


def _enabled(value: str) -> bool:
    if value not in ("", "0", "1"):
        raise ValueError(f"FASTVIT_PACK: expected '0' or '1', got {value!r}")
    return value != "0"


ENABLED = _enabled(os.environ.get("FASTVIT_PACK", ""))

_pack = define("pack_weight", "Tensor weight", "Tensor", lambda a: a.weight.new_empty(0)).eager
_fingerprint = None if backends.cpp_reasons() else importlib.import_module("fastvit._C").fingerprint


def _pack_cpp(weight: Tensor, rows: int) -> Tensor:
    return _pack(weight)


def _pack_mkl(weight: Tensor, rows: int) -> Tensor:
    return torch.ops.mkl._mkl_reorder_linear_weight(weight, rows)


def _pack_onednn(weight: Tensor, rows: int) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, rows)


_PACK: dict[str, Callable[[Tensor, int], Tensor]] = {"cpp": _pack_cpp, "mkl": _pack_mkl, "onednn": _pack_onednn}


class _Kept(NamedTuple):
    owner: weakref.ref[Tensor]
    state: tuple[Any, ...]
    packed: Tensor


_kept: dict[tuple[Any, ...], _Kept] = {}
"""By whose layout it is, the identity of the weight, or of what it is a view of, and its place in that."""


def packed(weight: Tensor, layout: str = "cpp", rows: int = 0) -> Tensor | None:
    """A float32 or bfloat16 weight (N, K) on the CPU, packed; None where the call is to do without.

    Args:
        layout: "cpp", "mkl" or "onednn".
        rows: of x, which the layouts of the latter two depend on.
    """
    # The memory of any other tensor (fake, sparse, on another device) is not to be read by its address.
    ordinary = type(weight) in (Tensor, Parameter) and weight.is_cpu and weight.dim() == 2
    if not ENABLED or _fingerprint is None or not ordinary or weight.is_inference():
        return None
    address, sizes, strides = weight.data_ptr(), weight.shape, weight.stride()
    sample = _fingerprint(address, *sizes, *strides, weight.itemsize)
    state = (weight._version, address, weight.dtype, sample, rows)
    owner = weight if weight._base is None else weight._base
    # A last block has a part of a weight packed as well.
    key = layout, id(owner), weight.storage_offset(), sizes, strides
    kept = _kept.get(key)
    if kept is not None and kept.state == state and kept.owner() is owner:
        return kept.packed
    fresh = _PACK[layout](weight.detach(), rows)
    if type(fresh) is not Tensor:  # made while fake tensors are
        return None
    _kept[key] = _Kept(weakref.ref(owner, lambda _: _kept.pop(key, None)), state, fresh)
    return fresh


def release_memory() -> None:
    """Give up every packed copy of a weight, and give freed memory back to the system; the next call packs anew."""
    _kept.clear()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        if trim is not None:
            trim(0)
