"""What the tests of operators made of several layers share: their arguments as a tree of tensors, held to the twin."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastvit.reference.functional import BatchNorm
from tests.helpers import assert_as_accurate, on_thread_counts, poisoned_empty

Arguments = dict[str, Any]


def random_norm(channels: int, batch_statistics: bool = False, affine: bool = True) -> BatchNorm:
    """A BatchNorm far from the identity."""
    mean, bias = torch.randn(2, channels)
    var, weight = 0.5 + torch.rand(2, channels)
    return BatchNorm(mean, var, weight if affine else None, bias if affine else None, batch_statistics)


def converted(arguments: Arguments, dtype: torch.dtype, parameters: torch.dtype | None = None) -> Arguments:
    """A copy in another dtype, parameters in one of their own where it is given."""
    changed = pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone().to(parameters or dtype), arguments)
    return changed | {"x": arguments["x"].detach().clone().to(dtype)}


def check_inference(op: Callable[..., Any], twin: Callable[..., Any], arguments: Arguments, **options: Any) -> None:
    """Hold op(**arguments, **options) to its twin in the same dtype and in float64."""
    dtype = arguments["x"].dtype
    with torch.no_grad():
        with poisoned_empty():
            got = op(**arguments, **options)
        plain, exact = twin(**converted(arguments, dtype)), twin(**converted(arguments, torch.float64))
    for each in zip(*map(pytree.tree_leaves, (got, plain, exact)), strict=True):
        assert_as_accurate(*each)


def training_step(function: Callable[..., Any], arguments: Arguments, **options: Any) -> dict[str, Tensor]:
    """Outputs, gradients of everything that has one, and running statistics, by name."""
    leaves = dict(pytree.tree_leaves_with_path(arguments))
    tensors = {pytree.keystr(path): leaf for path, leaf in leaves.items() if isinstance(leaf, Tensor)}
    for name, tensor in tensors.items():
        tensor.requires_grad_("running" not in name)
    outputs = pytree.tree_leaves(function(**arguments, **options))
    found = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    weights = [torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view_as(output) for output in outputs]
    loss = [(output * weight.to(output.dtype)).sum() for output, weight in zip(outputs, weights, strict=True)]
    torch.stack(loss).sum().backward()
    for name, tensor in tensors.items():
        found[name] = tensor.detach() if tensor.grad is None else tensor.grad
    return found


def check_training(op: Callable[..., Any], twin: Callable[..., Any], arguments: Arguments, **options: Any) -> None:
    """The same of outputs, every gradient and the running statistics."""
    dtype = arguments["x"].dtype
    with poisoned_empty():
        got = training_step(op, converted(arguments, dtype), **options)
    plains = on_thread_counts(lambda: training_step(twin, converted(arguments, dtype)))
    exact = training_step(twin, converted(arguments, torch.float64))
    hold_to(got, {name: [plain[name] for plain in plains] for name in plains[0]}, exact)


def hold_to(
    got: Mapping[Any, Tensor], plain: Mapping[Any, Tensor | Sequence[Tensor]], exact: Mapping[Any, Tensor]
) -> None:
    """Hold the outputs and gradients of one step, by name, to the accuracy rule."""
    assert got.keys() == plain.keys() == exact.keys()
    sizes = {name: float(value.abs().max()) if value.numel() else 0.0 for name, value in exact.items()}
    largest = max((size for size in sizes.values() if math.isfinite(size)), default=0.0)
    for name, value in got.items():
        # A bias in front of batch statistics has a gradient of zero but for rounding: it has no digits to compare.
        if value.numel() and 0.0 < sizes[name] <= 1e-12 * largest:
            assert value.shape == exact[name].shape and value.isfinite().all(), name
        else:
            assert_as_accurate(value, plain[name], exact[name], name=str(name))
