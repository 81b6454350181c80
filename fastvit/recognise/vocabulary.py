"""How torch's functions and methods spell the operations on an attention map: each call read as steps of a chain.

Two tables, by function: ``products.STARTS`` reads a call that makes a map of ordinary tensors, :data:`READERS` one that
takes a map. A reader gives the steps (none for a copy), :data:`SAME` where torch gives the same tensor back, or a
:class:`Product` with the values; it raises BreaksOff for what only looks like one of them. What stands in neither table
is not understood.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit.recognise.chain import (
    Bias,
    Cast,
    Chain,
    Fill,
    Normalise,
    Permute,
    Product,
    Reshape,
    Scale,
    Softmax,
    Step,
    break_off,
)
from fastvit.recognise.products import Args, Kwargs, arguments, is_number, mixed, read_einsum, read_product
from fastvit.reference.functional import BatchNorm, LayerNorm

__all__ = ["IN_PLACE", "READERS", "SAME", "UNCHANGED", "VIEWS"]


class _Same:
    pass


SAME = _Same()
"""The call gives the map itself."""

Read = tuple[Step, ...] | Product | _Same
Reader = Callable[[Chain, int, Args, Kwargs], Read]
"""Called with the chain, the map's place among the arguments, and the arguments."""


def _times(chain: Chain, place: int, args: Args, kwargs: Kwargs) -> Read:
    found = arguments("input other", args, kwargs)
    return (Scale(_factor(found["other" if place == 0 else "input"])),)


def _divided(chain: Chain, place: int, args: Args, kwargs: Kwargs) -> Read:
    found = arguments("input other", args, kwargs, "rounding_mode")
    if place != 0 or found.get("rounding_mode") is not None:
        break_off("something is divided by the map, or the quotient rounded")
    return (Scale(_factor(found["other"]), divides=True),)


def _factor(value: Any) -> float | Tensor:
    if not is_number(value) and not isinstance(value, Tensor):
        break_off(f"the map is multiplied by {type(value).__name__}")
    return value


def _plus(chain: Chain, place: int, args: Args, kwargs: Kwargs, sign: float = 1.0) -> Read:
    found = arguments("input other", args, kwargs, "alpha")
    alpha, other = found.get("alpha", 1), found["other" if place == 0 else "input"]
    if not isinstance(other, Tensor) or not is_number(alpha):
        break_off("a number is added to the map")
    if place == 1 and (alpha != 1 or sign < 0):
        break_off("the map is subtracted, or added a number of times")
    return (Bias(other, sign * alpha),)


def _filled(chain: Chain, place: int, args: Args, kwargs: Kwargs) -> Read:
    found = arguments("input mask value", args, kwargs)
    if place != 0 or not is_number(found["value"]):
        break_off("the map is filled with a tensor")
    return (Fill(found["mask"], float(found["value"])),)


def _chosen(chain: Chain, place: int, args: Args, kwargs: Kwargs, names: str = "condition input other") -> Read:
    found = arguments(names, args, kwargs)
    by_name = names.split()[place]
    other = found.get("other" if by_name == "input" else "input")
    if by_name == "condition" or not is_number(other):
        break_off("the map is combined with a tensor")
    return (Fill(found["condition"], float(other), outside=by_name == "input"),)  # type: ignore[arg-type]


def _softmaxed(chain: Chain, place: int, args: Args, kwargs: Kwargs, names: str = "input dim dtype") -> Read:
    found = arguments(names, args, kwargs)
    dim, dtype = found.get("dim"), found.get("dtype")
    if not isinstance(dim, int):
        break_off("the softmax is over an axis that is not given")
    if dtype is None:
        autocast = torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled("cuda")
        dtype = torch.float32 if autocast and chain.q.is_cuda else chain.dtype
    return (Softmax(_place(dim, chain), dtype),)


def _place(dim: int, chain: Chain) -> int:
    count = len(chain.order)
    if not -count <= dim < count:
        break_off(f"axis {dim} is none of the map's {count}")
    return dim % count


def _dropped(chain: Chain, place: int, args: Args, kwargs: Kwargs, names: str = "input p training inplace") -> Read:
    found = {"p": 0.5, "training": True, **arguments(names, args, kwargs)}
    if found.get("train", found["training"]) and found["p"] != 0:
        break_off("attention dropout is active, which is drawn as the plain code draws it")
    return SAME


def _copied(chain: Chain, place: int, args: Args, kwargs: Kwargs) -> Read:
    if len(args) > 1 or kwargs:
        break_off("the map's memory is laid out anew")
    return ()


def _contiguous(chain: Chain, place: int, args: Args, kwargs: Kwargs) -> Read:
    _copied(chain, place, args, kwargs)
    return SAME if chain.in_order else ()


def _cast_to(chain: Chain, place: int, args: Args, kwargs: Kwargs) -> Read:
    dtype = chain.dtype
    for value in (*args[1:], *kwargs.values()):
        if isinstance(value, Tensor):
            dtype, value = value.dtype, value.device
        if isinstance(value, torch.dtype):
            dtype = value
        elif not isinstance(value, bool) and value is not None and value != chain.device:
            break_off(f"the map is brought to {value}")
    if kwargs.get("copy") or len(args) > 3 or "memory_format" in kwargs:
        return (Cast(dtype),)
    return SAME if dtype == chain.dtype else (Cast(dtype),)


def _cast(dtype: torch.dtype) -> Reader:
    def read(chain: Chain, place: int, args: Args, kwargs: Kwargs) -> Read:
        _copied(chain, place, args, kwargs)
        return SAME if dtype == chain.dtype else (Cast(dtype),)

    return read


def _of_type(chain: Chain, place: int, args: Args, kwargs: Kwargs) -> Read:
    if place != 0 or len(args) != 2 or not isinstance(args[1], torch.dtype):
        break_off("the map's type is asked for, or given by name")
    return _cast_to(chain, place, args, kwargs)


def _as_type(chain: Chain, place: int, args: Args, kwargs: Kwargs) -> Read:
    if place != 0:
        break_off("a tensor is brought to the map's type")
    return _cast_to(chain, place, args, kwargs)


def _permuted(chain: Chain, place: int, args: Args, kwargs: Kwargs) -> Read:
    dims = kwargs["dims"] if "dims" in kwargs else args[1] if isinstance(args[1], (list, tuple)) else args[1:]
    return _moved(chain, [_place(dim, chain) for dim in dims])


def _transposed(chain: Chain, place: int, args: Args, kwargs: Kwargs, names: str = "input dim0 dim1") -> Read:
    found = arguments(names, args, kwargs)
    first, second = (_place(found[name], chain) for name in names.split()[1:])
    places = list(range(len(chain.order)))
    places[first], places[second] = second, first
    return _moved(chain, places)


def _matrix_transposed(chain: Chain, place: int, args: Args, kwargs: Kwargs) -> Read:
    count = len(chain.order)
    return _moved(chain, [*range(count - 2), count - 1, count - 2])


def _moved(chain: Chain, places: list[int]) -> Read:
    if sorted(places) != list(range(len(chain.order))):
        break_off(f"axes {places} are no permutation of the map's")
    return (Permute(tuple(places)),)


def _moved_dims(chain: Chain, place: int, args: Args, kwargs: Kwargs) -> Read:
    found = arguments("input source destination", args, kwargs)
    count = len(chain.order)
    numbered = torch.empty_strided(
        (2,) * count, tuple(range(count)), device="meta"
    )  # the stride of an axis is its place
    try:
        moved = torch.movedim(numbered, found["source"], found["destination"])
    except (RuntimeError, IndexError) as error:
        break_off(str(error))
    return _moved(chain, list(moved.stride()))


def _reshaped(method: str) -> Reader:
    """By torch itself, on a tensor without contents."""

    def read(chain: Chain, place: int, args: Args, kwargs: Kwargs) -> Read:
        if place != 0 or any(isinstance(value, torch.dtype) for value in (*args, *kwargs.values())):
            break_off("the map gives another tensor its shape, or is read as another dtype")
        like = torch.empty(chain.shape, device="meta")
        try:
            shape = getattr(like, method)(*args[1:], **kwargs).shape
        except (RuntimeError, IndexError, TypeError) as error:
            break_off(str(error))
        return (Reshape(tuple(shape)),)

    return read


# --- Over heads -----------------------------------------------------------------------------------------------------


def _linear(chain: Chain, place: int, args: Args, kwargs: Kwargs) -> Read:
    found = arguments("input weight bias", args, kwargs)
    weight, bias = found["weight"], found.get("bias")
    if place != 0 or weight.dim() != 2 or weight.shape[0] != weight.shape[1]:
        break_off("a linear layer makes another number of features")
    return mixed(chain, weight, bias, len(chain.order) - 1, "linear")


def _conv2d(chain: Chain, place: int, args: Args, kwargs: Kwargs) -> Read:
    found = arguments("input weight bias stride padding dilation groups", args, kwargs)
    weight, groups = found["weight"], found.get("groups", 1)
    ones = all(_is_all(found.get(name, 1), 1) for name in ("stride", "dilation"))
    if place != 0 or not ones or not _is_all(found.get("padding", 0), 0) or groups != 1:
        break_off("a convolution with a stride, padding, dilation or groups is applied to the map")
    if weight.shape[2:] != (1, 1) or weight.shape[0] != weight.shape[1] or len(chain.order) != 4:
        break_off(f"a convolution with a weight {tuple(weight.shape)} is applied to the map")
    return mixed(chain, weight[:, :, 0, 0], found.get("bias"), 1, "conv2d 1x1")


def _is_all(value: Any, number: int) -> bool:
    return all(each == number for each in value) if isinstance(value, (tuple, list)) else value == number


def _layer_norm(chain: Chain, place: int, args: Args, kwargs: Kwargs) -> Read:
    found = arguments("input normalized_shape weight bias eps", args, kwargs, "cudnn_enable")
    shape = found["normalized_shape"]
    if place != 0 or (shape if isinstance(shape, int) else tuple(shape)) not in (chain.shape[-1], chain.shape[-1:]):
        break_off("a LayerNorm over more than the heads is applied to the map")
    norm = LayerNorm(found.get("weight"), found.get("bias"), found.get("eps", 1e-5))
    return (Normalise(norm, len(chain.order) - 1),)


def _batch_norm(chain: Chain, place: int, args: Args, kwargs: Kwargs) -> Read:
    found = arguments("input running_mean running_var weight bias training momentum eps", args, kwargs)
    if place != 0:
        break_off("the map is a parameter of a norm")
    mean, var = found["running_mean"], found["running_var"]
    training, momentum = bool(found.get("training", False)), found.get("momentum", 0.1)
    if (mean is None or var is None) and not training:
        break_off("a BatchNorm has no statistics")
    norm = BatchNorm(mean, var, found.get("weight"), found.get("bias"), training, momentum, found.get("eps", 1e-5))
    return (Normalise(norm, 1),)


# --- The table ------------------------------------------------------------------------------------------------------


def _table(*rows: tuple[Reader, Sequence[Callable[..., Any]]]) -> dict[Callable[..., Any], Reader]:
    return {function: reader for reader, functions in rows for function in functions}


def _by(reader: Callable[..., Read], **settings: Any) -> Reader:
    return functools.partial(reader, **settings)


_T = Tensor
IN_PLACE: dict[Callable[..., Any], Reader] = _table(
    (_times, (_T.mul_, _T.__imul__, _T.multiply_)),
    (_divided, (_T.div_, _T.__itruediv__, _T.divide_, _T.true_divide_)),
    (_plus, (_T.add_, _T.__iadd__)),
    (_by(_plus, sign=-1.0), (_T.sub_, _T.__isub__, _T.subtract_)),
    (_filled, (_T.masked_fill_,)),
)
"""Those that change the map itself."""

VIEWS: dict[Callable[..., Any], Reader] = _table(
    (_permuted, (_T.permute, torch.permute)),
    (_transposed, (_T.transpose, torch.transpose)),
    (_by(_transposed, names="input axis0 axis1"), (_T.swapaxes, torch.swapaxes)),
    (_transposed, (_T.swapdims, torch.swapdims)),
    (_matrix_transposed, (_T.mT.__get__,)),
    (_moved_dims, (_T.movedim, torch.movedim, _T.moveaxis, torch.moveaxis)),
    *(
        (_reshaped(name), [getattr(owner, name) for owner in (_T, torch) if hasattr(owner, name)])
        for name in ("view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "unsqueeze", "squeeze")
    ),
)
"""Those whose result shares the map's memory."""

UNCHANGED: dict[Callable[..., Any], Reader] = _table(
    (_dropped, (F.dropout,)),
    (_by(_dropped, names="input p train"), (torch.dropout,)),
    (_copied, (_T.clone, torch.clone)),
    (_contiguous, (_T.contiguous,)),
    (_cast_to, (_T.to,)),
    (_of_type, (_T.type,)),
    (_as_type, (_T.type_as,)),
    (_cast(torch.float32), (_T.float,)),
    (_cast(torch.float16), (_T.half,)),
    (_cast(torch.bfloat16), (_T.bfloat16,)),
    (_cast(torch.float64), (_T.double,)),
)
"""Those that leave the numbers as they are, but for rounding."""

READERS: dict[Callable[..., Any], Reader] = {
    **IN_PLACE,
    **VIEWS,
    **UNCHANGED,
    **_table(
        (_times, (torch.mul, _T.mul, _T.__mul__, _T.__rmul__, torch.multiply, _T.multiply)),
        (_divided, (torch.div, _T.div, _T.__truediv__, torch.divide, _T.divide, torch.true_divide, _T.true_divide)),
        (_plus, (torch.add, _T.add, _T.__add__, _T.__radd__)),
        (_by(_plus, sign=-1.0), (torch.sub, _T.sub, _T.__sub__, torch.subtract, _T.subtract)),
        (_filled, (_T.masked_fill, torch.masked_fill)),
        (_chosen, (torch.where,)),
        (_by(_chosen, names="input condition other"), (_T.where,)),
        (_softmaxed, (torch.softmax, _T.softmax, torch.special.softmax)),
        (_by(_softmaxed, names="input dim _stacklevel dtype"), (F.softmax,)),
        (_linear, (F.linear,)),
        (_conv2d, (F.conv2d, torch.conv2d)),
        (_layer_norm, (F.layer_norm, torch.layer_norm)),
        (_batch_norm, (F.batch_norm,)),
        (read_product, (torch.matmul, _T.matmul, _T.__matmul__, torch.bmm, _T.bmm)),
        (read_einsum, (torch.einsum,)),
    ),
}
