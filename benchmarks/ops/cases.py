"""What the rows of all operators share: arguments, forms, training."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from benchmarks.worker import Absent, Case, Form
from fastvit import ops
from fastvit.reference import functional
from fastvit.reference.functional import BatchNorm, activate

FILES = (
    "attention",
    "head_mixed_attention",
    "token_depthwise_conv",
    "conv_projection",
    "leff",
    "conv_batch_norm",
    "linear",
)
Arguments = dict[str, Any]
Maker = Callable[[Arguments], Callable[..., Any]]


class Op(NamedTuple):
    """One row: an operator at the sizes of a model.

    ``inputs(batch, dtype)`` are its first arguments, new for every call; ``arguments(batch)`` its others, by name, in
    float32. ``peers`` make a call on the inputs from the arguments, beside fastvit, the plain form and that compiled;
    those in ``prepared`` fold norms beforehand, and cannot be trained. ``floors`` do less than the operator has to.
    """

    op: str
    shape: str
    inputs: Callable[[int, torch.dtype], tuple[Tensor, ...]]
    arguments: Callable[[int], Arguments]
    peers: Mapping[str, Maker] = {}
    prepared: Sequence[str] = ()
    floors: Sequence[str] = ()

    @property
    def name(self) -> str:
        return f"{self.op}: {self.shape}"


def rows_of(
    op: str,
    shapes: Sequence[Any],
    make_inputs: Callable[..., tuple[Tensor, ...]],
    make_arguments: Callable[..., Arguments],
    peers: Mapping[str, Maker],
    floors: Sequence[str] = (),
) -> tuple[Op, ...]:
    """A row per shape, each with a ``name``, of an operator whose peers fold its norms beforehand."""
    return tuple(
        Op(
            op,
            shape.name,
            functools.partial(make_inputs, shape),
            functools.partial(make_arguments, shape),
            peers,
            prepared=tuple(peers),
            floors=floors,
        )
        for shape in shapes
    )


@functools.cache
def rows() -> dict[str, Op]:
    """All rows by name."""
    modules = [importlib.import_module(f"benchmarks.ops.{file}") for file in FILES]
    return {row.name: row for module in modules for row in module.ROWS}


def random_norm(channels: int) -> BatchNorm:
    """A BatchNorm far from the identity."""
    mean, bias = torch.randn(2, channels)
    var, weight = 0.5 + torch.rand(2, channels)
    return BatchNorm(mean, var, weight, bias)


def converted(arguments: Any, dtype: torch.dtype, device: str | torch.device = "cpu") -> Any:
    """The arguments with every floating tensor in another dtype."""
    return pytree.tree_map_only(
        Tensor, lambda t: t.to(device, dtype) if t.is_floating_point() else t.to(device), arguments
    )


def folded(weight: Tensor, bias: Tensor | None, norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer with the norm that follows folded in."""
    assert norm.running_var is not None and norm.running_mean is not None
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


def both_layouts(composition: Callable[[Arguments, bool], Callable[..., Any]]) -> dict[str, Maker]:
    """The same composition of the library's layers in either layout."""
    return {
        "nchw": functools.partial(composition, channels_last=False),
        "channels-last": functools.partial(composition, channels_last=True),
    }


def trainable(value: Any, leaves: list[Tensor]) -> Any:
    """The argument with gradients required, each such tensor put among the leaves; norms with batch statistics."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            value = value.detach().clone().requires_grad_()
            leaves.append(value)
        return value
    if isinstance(value, BatchNorm):
        running = [None if each is None else each.clone() for each in value[:2]]
        affine = [trainable(each, leaves) for each in value[2:4]]
        return value._replace(
            running_mean=running[0], running_var=running[1], weight=affine[0], bias=affine[1], use_batch_stats=True
        )
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(trainable(each, leaves) for each in value))
    return value


class Operator:
    """A row, opened."""

    input_gradients = True
    few = None

    def __init__(self, case: Case) -> None:
        self.case, self.row = case, rows()[case.name]
        torch.manual_seed(0)
        self.arguments = converted(self.row.arguments(case.batch), case.torch_dtype, case.device)

    def state(self) -> dict[str, Tensor]:
        tensors = [leaf for leaf in pytree.tree_leaves(self.arguments) if isinstance(leaf, Tensor)]
        return {str(i): tensor for i, tensor in enumerate(tensors)}

    def load(self, state: dict[str, Tensor]) -> None:
        """Nothing: the same seed has given the same arguments."""

    def inputs(self, draw: int) -> tuple[Tensor, ...]:
        torch.manual_seed(1 + draw)
        return tuple(each.to(self.case.device) for each in self.row.inputs(self.case.batch, self.case.torch_dtype))

    def form(self, provider: str, example: tuple[Tensor, ...]) -> Form:
        row, case, leaves = self.row, self.case, list[Tensor]()
        arguments = converted(self.arguments, torch.float64, case.device) if provider == "exact" else self.arguments
        if case.training:
            if provider in row.prepared:
                raise Absent("prepared for inference: norms are folded beforehand")
            arguments = {name: trainable(value, leaves) for name, value in arguments.items()}
        if provider in ("plain", "exact", "eager"):
            return Form(functools.partial(getattr(functional, row.op), **arguments), leaves)
        if provider == "fastvit":
            return Form(functools.partial(getattr(ops, row.op), **arguments), leaves)
        if provider == "inductor":
            plain = getattr(functional, row.op)
            return Form(torch.compile(lambda *inputs: plain(*inputs, **arguments), dynamic=False), leaves)
        if provider not in row.peers:
            raise Absent("none of this operator's peers")
        return Form(row.peers[provider](arguments), leaves, provider in row.floors)


def open_case(case: Case) -> Operator:
    return Operator(case)
