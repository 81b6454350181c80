"""Shared by the benchmarks of convolutions: arguments, compositions of the library's layers, measuring."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from benchmarks.ops import _table
from benchmarks.ops._table import Row, Table, Times, make_row
from benchmarks.ops._timing import Call, compare, fresh
from fastvit.accuracy import is_accurate
from fastvit.reference.functional import BatchNorm, activate

Makers = Mapping[str, Callable[[dict[str, Any]], Call]]
ELEMENTS = 200_000
"""The least number of elements in a round of calls."""


class Shape(Protocol):
    """One use of an operator in a model."""

    @property
    def name(self) -> str: ...

    def _asdict(self) -> dict[str, Any]: ...


def random_norm(channels: int) -> BatchNorm:
    """A BatchNorm far from the identity."""
    mean, bias = torch.randn(2, channels)
    var, weight = 0.5 + torch.rand(2, channels)
    return BatchNorm(mean, var, weight, bias)


def converted(arguments: Any, dtype: torch.dtype) -> Any:
    """The arguments with every tensor in another dtype."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(dtype), arguments)


def folded(weight: Tensor, bias: Tensor | None, norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer with the norm that follows folded in."""
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    offset = -norm.running_mean if bias is None else bias - norm.running_mean
    shape = (-1,) + (1,) * (weight.dim() - 1)
    return weight * scale.view(shape), norm.bias + scale * offset


def convolve(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grid: tuple[int, int],
    stride: int,
    channels_last: bool,
    activation: str | None = None,
) -> Tensor:
    """The library's depthwise convolution of tokens, copied to NCHW or seen as a channels-last image."""
    image = tokens.unflatten(1, grid).permute(0, 3, 1, 2)
    image = image if channels_last else image.contiguous()
    out = F.conv2d(image, weight, bias, stride, weight.shape[-1] // 2, groups=weight.shape[0])
    return activate(out, activation).flatten(2).transpose(1, 2)


def measure(calls: Mapping[str, Call], exact: Call, x: Tensor, rounds: int) -> tuple[Times, bool]:
    """The times of every candidate, and whether the first, fastvit's, is accurate; the second is the plain form."""
    fastvit, plain, *_ = calls.values()
    with torch.no_grad():
        results = fastvit(x), plain(x), exact(x.double())
        right = all(is_accurate(*each) for each in zip(*map(pytree.tree_leaves, results), strict=True))
        inputs = fresh(lambda: torch.randn_like(x), x.nbytes)
        return compare(calls, inputs, rounds=rounds, repeats=max(1, ELEMENTS // x.numel())), right


def make_table(
    shapes: Sequence[Shape], make_arguments: Callable[[Any, int, torch.dtype], dict[str, Any]], candidates: Makers
) -> Table:
    """A table with a row for each shape.

    Args:
        make_arguments: from shape, batch and dtype; ``x`` is among them.
        candidates: by name, functions that make a call on x from the other arguments. The first is fastvit's, the
            second the plain form's.
    """

    def measured(shape: Shape, batch: int, dtype: torch.dtype, rounds: int) -> Row:
        arguments = make_arguments(shape, batch, dtype)
        x = arguments.pop("x")
        calls = {name: maker(arguments) for name, maker in candidates.items()}
        exact = list(candidates.values())[1](converted(arguments, torch.float64))
        times, right = measure(calls, exact, x, rounds)
        return make_row(shape._asdict(), batch, dtype, right, ms=times)

    names = list(candidates)
    return Table(names, names[1:], {shape.name: functools.partial(measured, shape) for shape in shapes})


def main(description: str | None, table: Table, argv: Sequence[str] | None = None) -> None:
    """Measure a table as a command."""
    options, machine = _table.start(_table.make_parser(description), argv)
    _table.write(options.json, machine=machine, rows=_table.fill(table, options))
