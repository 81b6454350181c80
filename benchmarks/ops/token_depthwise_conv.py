"""Token depthwise convolution, compared with the library's and with a copy, on the shapes of CPVT, CeiT and CvT.

    python -m benchmarks.ops.token_depthwise_conv [--isa avx2] [--threads 2] [--batch 1 8] [--only ceit] [--training]
                                                  [--json FILE]

Columns, all timed in turn in one run:
    fastvit         the operator, on tokens in their own layout, (B, N, C)
    eager           the plain function: tokens to image and back, each step its own pass
    nchw            the library's convolution on NCHW, the norm folded into its weight, with both transposes
    channels-last   the same on a view of the tokens as a channels-last image, without transposes
    copy            a copy of x into an existing tensor
With --training, fastvit and eager alone, norms with batch statistics:
    fastvit, eager  a forward and a backward pass
    backward, of eager  the backward pass alone of each, after an untimed forward pass

No ratio is printed for a result that fails the accuracy rule.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops import _composed, _table
from benchmarks.ops._composed import converted, folded, random_norm
from benchmarks.ops._table import Row, Table, make_row
from benchmarks.ops._timing import Call, compare, fresh
from benchmarks.timing import keep_memory
from fastvit.accuracy import is_accurate
from fastvit.ops import token_depthwise_conv
from fastvit.reference import functional
from fastvit.reference.functional import BatchNorm, activate


class Shape(NamedTuple):
    """One use of the operator in a model."""

    name: str
    side: int
    channels: int
    stride: int = 1
    norm: bool = False
    leff: bool = False  # norm and GELU on both sides
    residual: bool = False


SHAPES = (
    *(Shape(f"cpvt PEG {channels}", 14, channels, residual=True) for channels in (192, 384, 768)),
    *(Shape(f"ceit depthwise {channels}", 14, channels) for channels in (768, 1536, 3072)),
    *(Shape(f"ceit LeFF middle {channels}", 14, channels, leff=True) for channels in (768, 1536, 3072)),
    *(
        Shape(f"cvt {channels} stride {stride}", side, channels, stride, norm=True)
        for side, channels in ((56, 64), (28, 192), (14, 384))
        for stride in (1, 2)
    ),
)
CANDIDATES = ("fastvit", "eager", "nchw", "channels-last", "copy")


def make_arguments(shape: Shape, batch: int, dtype: torch.dtype) -> dict[str, Any]:
    activation, channels = "gelu" if shape.leff else None, shape.channels
    arguments = {
        "x": torch.randn(batch, shape.side**2, channels),
        "weight": torch.randn(channels, 1, 3, 3) / 3,
        "bias": None if shape.norm else torch.randn(channels),
        "grid": (shape.side, shape.side),
        "stride": shape.stride,
        "pre_norm": random_norm(channels) if shape.leff else None,
        "pre_activation": activation,
        "norm": random_norm(channels) if shape.leff or shape.norm else None,
        "activation": activation,
        "residual": shape.residual,
    }
    return converted(arguments, dtype)


def library_composition(arguments: dict[str, Any], channels_last: bool) -> Call:
    """The best one can write with the library's convolution in the given layout; parameters are prepared beforehand."""
    (h, w), channels = arguments["grid"], arguments["weight"].shape[0]
    weight, bias, norm = (arguments[name] for name in ("weight", "bias", "norm"))
    if norm is not None:
        weight, bias = folded(weight, bias, norm)
    pre_norm, padding = arguments["pre_norm"], arguments["weight"].shape[-1] // 2

    def run(x: Tensor) -> Tensor:
        image = x.view(-1, h, w, channels).permute(0, 3, 1, 2)
        if not channels_last:
            image = image.contiguous()
        inner = pre_norm(image) if pre_norm is not None else image
        inner = activate(inner, arguments["pre_activation"])
        out = F.conv2d(inner, weight, bias, arguments["stride"], padding, groups=channels)
        out = activate(out, arguments["activation"])
        if arguments["residual"]:
            out = out + image
        return out.flatten(2).transpose(1, 2).contiguous()

    return run


def measure(shape: Shape, batch: int, dtype: torch.dtype, rounds: int) -> Row:
    """The times of every candidate, and whether fastvit's result is accurate."""
    arguments = make_arguments(shape, batch, dtype)
    x = arguments.pop("x")
    calls: dict[str, Call] = {
        "fastvit": functools.partial(token_depthwise_conv, **arguments),
        "eager": functools.partial(functional.token_depthwise_conv, **arguments),
        "nchw": library_composition(arguments, channels_last=False),
        "channels-last": library_composition(arguments, channels_last=True),
        "copy": torch.empty_like(x).copy_,
    }
    exact = functools.partial(functional.token_depthwise_conv, **converted(arguments, torch.float64))
    times, right = _composed.measure(calls, exact, x, rounds)
    return make_row(shape._asdict(), batch, dtype, right, ms=times)


def trainable(value: Any) -> Any:
    """The argument with its gradient required; of a norm with batch statistics, those of its weight and bias."""
    if isinstance(value, Tensor):
        return value.requires_grad_()
    if isinstance(value, BatchNorm):
        running = (tensor.clone() for tensor in value[:2])  # else views of a trained tensor, updated in place
        return BatchNorm(*running, *map(trainable, value[2:4]), use_batch_stats=True)
    return value


class Step:
    """A training step of one implementation on x, as a whole or pass by pass."""

    def __init__(self, run: Call, arguments: dict[str, Any], grad: Tensor):
        self.run, self.grad = run, grad
        self.arguments = own = {name: trainable(value) for name, value in arguments.items()}
        norms = [norm[2:4] for norm in (own["pre_norm"], own["norm"]) if norm is not None]
        trained = [own["weight"], own["bias"], *(tensor for norm in norms for tensor in norm)]
        self.trained = [tensor for tensor in trained if tensor is not None]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The result, and the x that requires its gradient."""
        return self.run(x.requires_grad_(), **self.arguments), x

    def backward(self, passed: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """The gradients of x and of every parameter, from what :meth:`forward` returned."""
        out, x = passed
        return torch.autograd.grad(out, [x, *self.trained], self.grad)

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.backward(self.forward(x))


def measure_training(shape: Shape, batch: int, dtype: torch.dtype, rounds: int) -> Row:
    """Like :func:`measure`, for forward and backward together and for the backward pass alone."""
    arguments = make_arguments(shape, batch, dtype)
    x, twin = arguments.pop("x"), functional.token_depthwise_conv
    grad = torch.randn_like(twin(x, **arguments))
    exact = Step(twin, converted(arguments, torch.float64), grad.double())(x.double())
    steps = {name: Step(run, arguments, grad) for name, run in (("fastvit", token_depthwise_conv), ("eager", twin))}
    right = all(map(is_accurate, *(step(x) for step in steps.values()), exact))
    backward = {f"{name} backward": step for name, step in steps.items()}
    times = compare(
        {**steps, **{name: step.backward for name, step in backward.items()}},
        fresh(lambda: torch.randn_like(x), x.nbytes),
        rounds=rounds,
        repeats=max(1, 50_000 // x.numel()),
        prepare={name: step.forward for name, step in backward.items()},
    )
    whole, alone = ({name: times[name + part] for name in steps} for part in ("", " backward"))
    return make_row(shape._asdict(), batch, dtype, right, ms=whole, backward_ms=alone)


def rows_of(measured: Callable[[Shape, int, torch.dtype, int], Row]) -> dict[str, Callable[..., Row]]:
    return {shape.name: functools.partial(measured, shape) for shape in SHAPES}


INFERENCE = Table(CANDIDATES, CANDIDATES[1:], rows_of(measure))
TRAINING = Table(("fastvit", "eager", "backward", "of eager"), ("eager", "backward"), rows_of(measure_training))


def main(argv: Sequence[str] | None = None) -> None:
    parser = _table.make_parser(__doc__)
    parser.add_argument("--training", action="store_true", help="forward and backward")
    options, machine = _table.start(parser, argv)
    _table.write(options.json, machine=machine, rows=_table.fill(TRAINING if options.training else INFERENCE, options))


if __name__ == "__main__":
    keep_memory()
    main()
