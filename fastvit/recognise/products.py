"""Products of matrices and einsum: where a map begins, where it meets the values, where a matrix mixes its heads.

Each reads one call, as :mod:`fastvit.recognise.vocabulary` says.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvit.recognise.chain import Axes, Bias, Cast, Chain, Mix, Product, Step, break_off
from fastvit.recognise.transitions import follow

__all__ = [
    "STARTS",
    "arguments",
    "flat_einsum",
    "is_number",
    "mixed",
    "multiplied_dtype",
    "read_einsum",
    "read_product",
]

LARGEST_HEAD_DIM = 256
"""Maps of wider heads are taken for something else."""

Args = Sequence[Any]
Kwargs = dict[str, Any]


def multiplied_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which torch multiplies matrices of this one: autocast's where it is on."""
    if torch._C._is_any_autocast_enabled() and dtype != torch.float64 and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return dtype


def _multiplied(tensor: Tensor) -> Tensor:
    dtype = multiplied_dtype(tensor.dtype, tensor.device)
    return tensor if dtype == tensor.dtype else tensor.to(dtype)


def arguments(names: str, args: Args, kwargs: Kwargs, accepted: str = "") -> Kwargs:
    """Arguments by name; BreaksOff for others than ``names`` and ``accepted``."""
    in_order, known = _names(names, accepted)
    found = dict(zip(in_order, args, strict=False))
    found.update(kwargs)
    if len(args) > len(in_order) or not found.keys() <= known:
        unknown = ", ".join(sorted(found.keys() - known))
        break_off(f"it is called with {unknown or 'more arguments than are known'}")
    return found


@functools.cache
def _names(names: str, accepted: str) -> tuple[list[str], frozenset[str]]:
    return names.split(), frozenset((*names.split(), *accepted.split()))


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def mixed(chain: Chain, weight: Tensor, bias: Tensor | None, place: int, name: str) -> tuple[Step, ...] | Product:
    dtype = multiplied_dtype(chain.dtype, chain.q.device)
    return Cast(dtype), Mix(_multiplied(weight), None if bias is None else _multiplied(bias), place, name)


# --- Where a map begins ---------------------------------------------------------------------------------------------


def _map_of(a: Tensor, b: Tensor, order: Axes | None = None, scale: float = 1.0) -> Chain | None:
    """The chain of a (*lead, N, D) and b (*lead, M, D), where they may be queries and keys."""
    if not 3 <= a.dim() == b.dim() <= 5 or a.shape[-1] != b.shape[-1] or not 0 < a.shape[-1] <= LARGEST_HEAD_DIM:
        return None
    if not a.is_floating_point() or a.dtype != b.dtype or a.device != b.device or 0 in a.shape or 0 in b.shape:
        return None
    if any(1 not in sizes and sizes[0] != sizes[1] for sizes in zip(a.shape[:-2], b.shape[:-2], strict=True)):
        return None
    return Chain.begin(_multiplied(a), _multiplied(b), order, scale)


def _start_matmul(args: Args, kwargs: Kwargs) -> Chain | None:
    if len(args) != 2 or kwargs or not all(isinstance(each, Tensor) and each.dim() > 2 for each in args):
        return None
    return _map_of(args[0], args[1].transpose(-2, -1))


def _start_baddbmm(args: Args, kwargs: Kwargs) -> Chain | None:
    found = _known("input batch1 batch2 beta alpha", args, kwargs)
    if found is None or not {"input", "batch1", "batch2"} <= found.keys():
        return None
    beta, alpha = found.get("beta", 1), found.get("alpha", 1)
    if not (is_number(beta) and is_number(alpha)) or found["batch1"].dim() != 3 or found["batch2"].dim() != 3:
        return None
    chain = _map_of(found["batch1"], found["batch2"].transpose(-2, -1), scale=alpha)
    if chain is None or beta == 0:
        return chain
    return follow(chain, Bias(found["input"], float(beta)))


def _known(names: str, args: Args, kwargs: Kwargs) -> Kwargs | None:
    """As :func:`_named`; None for other arguments."""
    found = {**dict(zip(names.split(), args, strict=False)), **kwargs}
    return found if found.keys() <= set(names.split()) and len(args) <= len(names.split()) else None


def flat_einsum(args: Args) -> Args:
    """einsum's arguments with the operands one by one, where they were given as a list."""
    if len(args) == 2 and isinstance(args[1], (list, tuple)):
        return (args[0], *args[1])
    return args


class _Equation(NamedTuple):
    """The letters of two operands and of the result, ellipses written out in capitals that are not used."""

    first: str
    second: str
    out: str


@functools.lru_cache(256)
def _equation(text: str, dims: tuple[int, int]) -> _Equation | None:
    """None where it is not one of two operands, each letter at most once in each."""
    text = text.replace(" ", "")
    inputs, arrow, out = text.partition("->")
    parts = inputs.split(",")
    if len(parts) != 2 or not arrow:  # without one, letters that both have are summed: no batch, no heads
        return None
    free = [letter for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if letter not in text]
    hidden = [dim - len(part.replace("...", "")) if "..." in part else 0 for part, dim in zip(parts, dims, strict=True)]
    most = max(hidden)
    if min(hidden) < 0 or most > len(free):
        return None
    written = "".join(free[:most])
    first, second = (part.replace("...", written[most - count :]) for part, count in zip(parts, hidden, strict=True))
    out = out.replace("...", written)
    if any(len(set(each)) != len(each) for each in (first, second, out)) or not set(out) <= set(first + second):
        return None
    return _Equation(first, second, out) if (len(first), len(second)) == dims else None


def _start_einsum(args: Args, kwargs: Kwargs) -> Chain | None:
    if len(args) != 3 or kwargs or not isinstance(args[0], str):
        return None
    text, a, b = args
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return None
    equation = _equation(text, (a.dim(), b.dim()))
    if equation is None or a.dim() != b.dim():
        return None
    first, second, out = equation
    gone = [letter for letter in first if letter in second and letter not in out]
    lead = [letter for letter in out if letter in first and letter in second]
    rows = [letter for letter in first if letter not in second]
    columns = [letter for letter in second if letter not in first]
    if len(gone) != 1 or len(rows) != 1 or len(columns) != 1 or len(out) != len(lead) + 2:
        return None
    q = a.permute([first.index(letter) for letter in (*lead, *rows, *gone)])
    k = b.permute([second.index(letter) for letter in (*lead, *columns, *gone)])
    counted = (*lead, *rows, *columns)
    return _map_of(q, k, tuple(counted.index(letter) for letter in out))


STARTS: dict[Callable[..., Any], Callable[[Args, Kwargs], Chain | None]] = {
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm), _start_matmul),
    **dict.fromkeys((torch.baddbmm, Tensor.baddbmm), _start_baddbmm),
    torch.einsum: _start_einsum,
}


# --- The product with the values ------------------------------------------------------------------------------------


def read_product(chain: Chain, place: int, args: Args, kwargs: Kwargs) -> tuple[Step, ...] | Product:
    found = arguments("input other", args, kwargs, "mat2")
    other = found.get("mat2", found.get("other")) if place == 0 else found["input"]
    if not isinstance(other, Tensor):
        break_off("the map is multiplied by what is not a tensor")
    if place == 0 and other.dim() == 2 and chain.order[-1] == 1:
        if other.shape[0] != other.shape[1]:
            break_off(f"a matrix {tuple(other.shape)} makes another number of heads")
        return mixed(chain, other.t(), None, len(chain.order) - 1, "matmul")
    count = len(chain.order)
    if other.dim() != count:
        break_off(f"the map is multiplied by a tensor of {other.dim()} axes")
    lead = tuple(range(count - 2))
    if place == 0 and chain.in_order:
        return Product(_multiplied(other), None, "@v")
    if place == 1 and chain.order == (*lead, count - 1, count - 2):
        return Product(_multiplied(other).transpose(-2, -1), (*lead, count - 1, count - 2), "v@")
    return break_off("the map is multiplied along another axis than the keys")


def read_einsum(chain: Chain, place: int, args: Args, kwargs: Kwargs) -> tuple[Step, ...] | Product:
    if len(args) != 3 or kwargs or not isinstance(args[0], str):
        break_off("einsum takes other operands than the map and one tensor")
    other = args[2 if place == 1 else 1]
    if not isinstance(other, Tensor):
        break_off("einsum takes what is not a tensor")
    dims = (len(chain.order), other.dim()) if place == 1 else (other.dim(), len(chain.order))
    equation = _equation(args[0], dims)
    if equation is None:
        break_off(f"einsum {args[0]!r} is no product of two")
    mine, theirs, out = equation if place == 1 else (equation.second, equation.first, equation.out)
    if len(theirs) == 2:
        return _mix_by_einsum(chain, mine, theirs, out, other)
    counted = [mine[chain.order.index(axis)] for axis in range(len(chain.order))]
    *lead, query, key = counted
    width = [letter for letter in theirs if letter not in mine]
    if key not in theirs or key in out or query in theirs or len(width) != 1 or set(out) != {*lead, query, *width}:
        break_off(f"einsum {args[0]!r} does not sum the values over the keys")
    present = [letter for letter in lead if letter in theirs]
    values = other.permute([theirs.index(letter) for letter in (*present, key, *width)])
    for position, letter in enumerate(lead):
        if letter not in theirs:
            values = values.unsqueeze(position)
    names = [*lead, query, *width]
    return Product(_multiplied(values), tuple(names.index(letter) for letter in out), f"einsum {args[0]!r}")


def _mix_by_einsum(chain: Chain, mine: str, theirs: str, out: str, weight: Tensor) -> tuple[Step, ...] | Product:
    gone = [letter for letter in mine if letter not in out]
    made = [letter for letter in out if letter not in mine]
    if len(gone) != 1 or len(made) != 1 or set(theirs) != {*gone, *made} or mine.replace(gone[0], made[0]) != out:
        break_off("einsum of the map and a matrix is no mix over heads in place")
    weight = weight if theirs == made[0] + gone[0] else weight.t()
    return mixed(chain, weight, None, mine.index(gone[0]), "einsum")
