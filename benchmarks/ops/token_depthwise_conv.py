"""Token depthwise convolution against the library's convolutions and a plain copy, on the shapes of CPVT, CeiT and CvT.

    python -m benchmarks.ops.token_depthwise_conv [--isa avx2] [--threads 2] [--batch 1 8] [--only ceit] [--training]
                                                  [--json FILE]

Columns, all timed in turn in one run:
    fastvit         the operator, on tokens as they lie
    eager           the plain function: tokens to image and back, each step its own pass
    nchw            the library's convolution on NCHW, the norm folded into its weight, with both transposes
    channels-last   the same on a view of the tokens as a channels-last image, without transposes
    copy            a copy of x into a tensor already there
With --training: a forward and a backward pass, batch statistics in the norms; fastvit and eager alone.

No ratio is printed where the result fails the accuracy rule.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops._timing import Call, Measured, compare, fresh, is_accurate
from fastvit import backends
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
    def norm() -> BatchNorm:
        mean, bias = torch.randn(2, shape.channels).to(dtype)
        var, weight = (0.5 + torch.rand(2, shape.channels)).to(dtype)
        return BatchNorm(mean, var, weight, bias)

    activation = "gelu" if shape.leff else None
    return {
        "x": torch.randn(batch, shape.side**2, shape.channels).to(dtype),
        "weight": (torch.randn(shape.channels, 1, 3, 3) / 3).to(dtype),
        "bias": None if shape.norm else torch.randn(shape.channels).to(dtype),
        "grid": (shape.side, shape.side),
        "stride": shape.stride,
        "pre_norm": norm() if shape.leff else None,
        "pre_activation": activation,
        "norm": norm() if shape.leff or shape.norm else None,
        "activation": activation,
        "residual": shape.residual,
    }


def fold(weight: Tensor, bias: Tensor | None, norm: BatchNorm | None) -> tuple[Tensor, Tensor | None]:
    """The norm folded into the convolution in front of it, as one would do by hand."""
    if norm is None:
        return weight, bias
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    offset = -norm.running_mean if bias is None else bias - norm.running_mean
    return weight * scale[:, None, None, None], norm.bias + scale * offset


def library_composition(arguments: dict[str, Any], channels_last: bool) -> Call:
    """The best one can write with the library's convolution in the given layout; parameters are prepared beforehand."""
    (h, w), channels = arguments["grid"], arguments["weight"].shape[0]
    weight, bias = fold(arguments["weight"], arguments["bias"], arguments["norm"])
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


def measure(shape: Shape, batch: int, dtype: torch.dtype, rounds: int) -> tuple[dict[str, Measured], bool]:
    """The times of every candidate, and whether fastvit's result is right."""
    arguments = make_arguments(shape, batch, dtype)
    x = arguments.pop("x")
    calls: dict[str, Call] = {
        "fastvit": functools.partial(token_depthwise_conv, **arguments),
        "eager": functools.partial(functional.token_depthwise_conv, **arguments),
        "nchw": library_composition(arguments, channels_last=False),
        "channels-last": library_composition(arguments, channels_last=True),
        "copy": torch.empty_like(x).copy_,
    }
    with torch.no_grad():
        doubled = {name: to_double(value) for name, value in arguments.items()}
        exact = functional.token_depthwise_conv(x.double(), **doubled)
        right = is_accurate(calls["fastvit"](x), calls["eager"](x), exact)
        inputs = fresh(lambda: torch.randn_like(x), x.nbytes)
        return compare(calls, inputs, rounds=rounds, repeats=max(1, 200_000 // x.numel())), right


def training_step(x: Tensor, *, run: Call, arguments: dict[str, Any], grad: Tensor) -> Tensor:
    """The gradient of x, with those of every parameter found on the way."""
    x.requires_grad_()
    norms = [norm[2:4] for norm in (arguments["pre_norm"], arguments["norm"]) if norm is not None]
    trained = [x, arguments["weight"], arguments["bias"], *(tensor for norm in norms for tensor in norm)]
    trained = [tensor for tensor in trained if tensor is not None]
    return torch.autograd.grad(run(x, **arguments), trained, grad)[0]


def measure_training(shape: Shape, batch: int, dtype: torch.dtype, rounds: int) -> tuple[dict[str, Measured], bool]:
    """As :func:`measure`, of forward and backward together."""

    def prepared(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.requires_grad_()
        if isinstance(value, BatchNorm):
            running = (tensor.clone() for tensor in value[:2])  # a view of what is trained would be moved in place
            return BatchNorm(*running, *map(prepared, value[2:4]), use_batch_stats=True)
        return value

    arguments = make_arguments(shape, batch, dtype)
    x, twin = arguments.pop("x"), functional.token_depthwise_conv
    doubled = {name: prepared(to_double(value)) for name, value in arguments.items()}
    arguments = {name: prepared(value) for name, value in arguments.items()}
    grad = torch.randn_like(twin(x, **arguments))
    calls: dict[str, Call] = {
        name: functools.partial(training_step, run=run, arguments=arguments, grad=grad)
        for name, run in (("fastvit", token_depthwise_conv), ("eager", twin))
    }
    exact = training_step(x.double(), run=twin, arguments=doubled, grad=grad.double())
    right = is_accurate(calls["fastvit"](x), calls["eager"](x), exact)
    inputs = fresh(lambda: torch.randn_like(x), x.nbytes)
    return compare(calls, inputs, rounds=rounds, repeats=max(1, 50_000 // x.numel())), right


def to_double(value: Any) -> Any:

    if isinstance(value, Tensor):
        return value.double()
    return BatchNorm(*(to_double(item) for item in value)) if isinstance(value, BatchNorm) else value


def show(name: str, times: dict[str, Measured], right: bool) -> None:
    columns = [f"{times[candidate].median:9.3f}" for candidate in times]
    peers = list(times)[1:]
    ratios = [f"{times[peer].median / times['fastvit'].median:8.2f}x" if right else "   wrong" for peer in peers]
    print(f"{name:<38}" + "".join(columns) + " |" + "".join(ratios), flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", help="instruction set of the C++ kernels; the CPU's best by default")
    parser.add_argument("--threads", type=int, help="torch's threads")
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 1])
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--only", default="", help="shapes whose name holds this text")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--training", action="store_true", help="forward and backward")
    parser.add_argument("--json", type=Path, help="write the measurements here")
    options = parser.parse_args(argv)
    if reasons := backends.cpp_reasons():
        parser.error("; ".join(reasons))
    from fastvit import _C

    if options.isa:
        _C._set_cpu_capability(options.isa)
    if options.threads:
        torch.set_num_threads(options.threads)
    rows = []
    machine = {"platform": platform.platform(), "threads": torch.get_num_threads(), "torch": str(torch.__version__)}
    machine |= {"isa": _C.cpu_info()["in_use"], "cpu": backends.describe()["devices"][0]["name"]}
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print("median milliseconds | the peer's time over fastvit's")
    names = CANDIDATES[:2] if options.training else CANDIDATES
    print(f"{'':<38}" + "".join(f"{n[:8]:>9}" for n in names) + " |" + "".join(f"{n[:8]:>9}" for n in names[1:]))
    for dtype in options.dtype:
        for batch in options.batch:
            for shape in SHAPES:
                if options.only not in shape.name:
                    continue
                torch.manual_seed(0)
                times, right = (measure_training if options.training else measure)(
                    shape, batch, getattr(torch, dtype), options.rounds
                )
                show(f"{shape.name}, batch {batch}, {dtype}", times, right)
                rows.append({"shape": shape._asdict(), "batch": batch, "dtype": dtype, "accurate": right})
                rows[-1]["ms"] = {name: measured._asdict() for name, measured in times.items()}
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
