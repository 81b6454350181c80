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
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils import _pytree as pytree

from fastvit import backends
from fastvit.ops._schema import define

__all__ = ["PackedWeight", "as_matrix", "derived", "pack", "packed", "release_memory", "sole_packings"]


def _enabled(value: str) -> bool:
    if value not in ("", "0", "1"):
        raise ValueError(f"FASTVIT_PACK: expected '0' or '1', got {value!r}")
    return value != "0"


ENABLED = _enabled(os.environ.get("FASTVIT_PACK", ""))

pack = define("pack_weight", "Tensor weight", "Tensor", lambda a: a.weight.new_empty(0)).eager
pack_constant = define(
    "pack_constant", "Tensor weight", "Tensor", lambda a: a.weight.new_empty(0, dtype=torch.float32)
).call
"""For the graphs of torch.export: what :func:`packed` gives where the graph runs."""
_unpack = define("unpack_weight", "Tensor packed", "Tensor", lambda a: a.packed.new_empty(0)).eager
_fingerprint = None if backends.cpp_reasons() else importlib.import_module("fastvit._C").fingerprint


def _pack_cpp(weight: Tensor, rows: int) -> Tensor:
    return pack(weight)


def _pack_mkl(weight: Tensor, rows: int) -> Tensor:
    return torch.ops.mkl._mkl_reorder_linear_weight(weight, rows)


def _pack_onednn(weight: Tensor, rows: int) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, rows)


_PACK: dict[Hashable, Callable[[Tensor, int], Tensor]] = {"cpp": _pack_cpp, "mkl": _pack_mkl, "onednn": _pack_onednn}


class _Kept(NamedTuple):
    owner: weakref.ref[Tensor]
    state: tuple[Any, ...]
    packed: Tensor


_kept: dict[tuple[Any, ...], _Kept] = {}
"""By whose layout it is, the identity of the weight, or of what it is a view of, and its place in that."""


def as_matrix(weight: Tensor) -> Tensor:
    """(O, C, k, l) as (O, C * k * l).

    ``flatten`` gives in inference mode, while a dispatch mode records, a view that does not tell what it is a view of:
    it would be packed anew, and what is recorded would do so at each call.
    """
    return weight.view(weight.shape[0], weight.shape[1:].numel()) if weight.is_contiguous() else weight.flatten(1)


def derived(weight: Tensor, name: Hashable, make: Callable[[Tensor], Tensor]) -> Tensor:
    """make(weight), the same tensor at each call as long as a packed weight would be; ``name`` says what is made.

    ``weight`` has two axes or more.
    """

    def make_to_keep(matrix: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():  # it may be kept for a call that differentiates
            return make(matrix.view_as(weight))

    kept = packed(as_matrix(weight), name, make=make_to_keep)
    return make(weight) if kept is None else kept


def packed(
    weight: Tensor, layout: Hashable = "cpp", rows: int = 0, make: Callable[[Tensor], Tensor] | None = None
) -> Tensor | None:
    """A float32, bfloat16 or float16 weight (N, K) on the CPU, packed; None where the call is to do without.

    Args:
        layout: "cpp", "mkl" or "onednn", or a name for what ``make`` gives.
        rows: of x, which the layouts of the latter two depend on.
        make: makes it, where it is none of these.
    """
    # The memory of any other tensor (fake, sparse, on another device) is not to be read by its address.
    ordinary = type(weight) in (Tensor, Parameter) and weight.is_cpu and weight.dim() == 2
    if not ENABLED or _fingerprint is None or not ordinary or weight.is_inference():
        return weight.packing if type(weight) is PackedWeight and layout == "cpp" else None
    address, sizes, strides = weight.data_ptr(), weight.shape, weight.stride()
    sample = _fingerprint(address, *sizes, *strides, weight.itemsize)
    state = (weight._version, address, weight.dtype, sample, rows)
    owner = weight if weight._base is None else weight._base
    # A last block has a part of a weight packed as well.
    key = layout, id(owner), weight.storage_offset(), sizes, strides
    kept = _kept.get(key)
    if kept is not None and kept.state == state and kept.owner() is owner:
        return kept.packed
    fresh = _PACK[layout](weight.detach(), rows) if make is None else make(weight.detach())
    if type(fresh) is not Tensor:  # made while fake tensors are
        return None
    _kept[key] = _Kept(weakref.ref(owner, lambda _: _kept.pop(key, None)), state, fresh)
    return fresh


@torch.library.impl("fastvit::pack_constant", "cpu")
def _run_pack_constant(weight: Tensor) -> Tensor:
    kept = packed(weight)
    return pack(weight) if kept is None else kept


def owner_of(packing: Tensor) -> Tensor | None:
    """The weight, or what it is a view of, that a copy kept here was made of."""
    return next((kept.owner() for kept in list(_kept.values()) if kept.packed is packing), None)


def sole_packings() -> dict[int, Tensor]:
    """By the identity of a weight, its packed copy for our kernels, where that is whole and the only one."""
    found: dict[int, list[Tensor | None]] = {}
    for (layout, owner, offset, sizes, strides), kept in list(_kept.items()):
        weight = kept.owner()
        place = None if weight is None else ("cpp", weight.storage_offset(), weight.shape, weight.stride())
        found.setdefault(owner, []).append(kept.packed if place == (layout, offset, sizes, strides) else None)
    return {owner: packings[0] for owner, packings in found.items() if len(packings) == 1 and packings[0] is not None}


class PackedWeight(Tensor):
    """A parameter (N, K) of which the packed copy alone is kept: what ``fastvit.freeze`` puts in a weight's place.

    Our products read the packed copy. Any other operation gets the weight unpacked, bit for bit, each time anew; none
    may change it. ``detach()``, and so a ``state_dict``, gives an ordinary tensor; so does a copy by pickle.
    """

    packing: Tensor
    stand_in: Tensor  # of its shape and dtype, without memory, for operators that read the packed copy
    trainable: bool  # whether the weight asked for gradients before

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, packing: Tensor, like: Tensor, trainable: bool) -> PackedWeight:
        return Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=like.device)

    def __init__(self, packing: Tensor, like: Tensor, trainable: bool) -> None:
        self.packing, self.trainable = packing, trainable
        self.stand_in = torch.empty(like.shape, dtype=like.dtype)
        self.stand_in.untyped_storage().resize_(0)
        self._is_param = True  # isinstance(self, nn.Parameter)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if type(value) is cls and argument.alias_info is not None and argument.alias_info.is_write:
                raise RuntimeError(
                    "a weight that fastvit.freeze gave up cannot be changed: fastvit.unfreeze(model) first"
                )
        unpack = pytree.tree_map_only(cls, cls.unpacked, (args, kwargs or {}))
        return func(*unpack[0], **unpack[1])

    def unpacked(self) -> Tensor:
        """The weight as an ordinary tensor (N, K)."""
        return _unpack(self.packing)

    @property
    def data(self) -> Tensor:
        """Itself, so that nobody writes to a copy. Module.to() sets it: then this is an ordinary parameter again."""
        return self

    @data.setter
    def data(self, value: Tensor) -> None:
        torch.utils.swap_tensors(self, Parameter(value, self.trainable))

    def __repr__(self, **options: Any) -> str:
        return f"PackedWeight(size={tuple(self.shape)}, dtype={self.dtype})"

    def __deepcopy__(self, memo: Any) -> PackedWeight:
        return PackedWeight(self.packing, self.stand_in, self.trainable)  # nobody can write to what they share

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return Parameter, (self.unpacked(), self.trainable)


on_release: list[Callable[[], object]] = []
"""Called when memory is released, by those who hold packed copies."""


def release_memory() -> None:
    """Give up every packed copy of a weight, and give freed memory back to the system; the next call packs anew."""
    _kept.clear()
    for release in on_release:
        release()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        if trim is not None:
            trim(0)
