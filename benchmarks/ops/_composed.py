"""What the benchmarks of operators made of several layers share: the library compositions, arguments, the table."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from benchmarks.ops._timing import Call, Measured, compare, fresh, is_accurate
from fastvit import backends
from fastvit.reference.functional import BatchNorm, activate

Row = tuple[str, Mapping[str, Any], Callable[[int, torch.dtype], dict[str, Any]]]
Makers = Mapping[str, Callable[[dict[str, Any]], Call]]


def random_norm(channels: int) -> BatchNorm:
    """A BatchNorm with statistics of its own."""
    mean, bias = torch.randn(2, channels)
    var, weight = 0.5 + torch.rand(2, channels)
    return BatchNorm(mean, var, weight, bias)


def converted(arguments: Any, dtype: torch.dtype) -> Any:
    """The arguments with every tensor in another dtype."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(dtype), arguments)


def folded(weight: Tensor, bias: Tensor | None, norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """A layer's weight and bias with the norm behind it folded in, as one would do by hand, once."""
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
    """The library's depthwise convolution of tokens, in image layout or through a channels-last view."""
    image = tokens.unflatten(1, grid).permute(0, 3, 1, 2)
    image = image if channels_last else image.contiguous()
    out = F.conv2d(image, weight, bias, stride, weight.shape[-1] // 2, groups=weight.shape[0])
    return activate(out, activation).flatten(2).transpose(1, 2)


def main(description: str, rows: Iterable[Row], candidates: Makers, argv: Sequence[str] | None = None) -> None:
    """Measure every row with every candidate in turn and print the table.

    Args:
        rows: name, what to say of it in JSON, and a function of batch and dtype that makes its arguments.
        candidates: by name, what makes a call on x of the other arguments. The first is fastvit's, the second its
            plain twin.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", help="instruction set of the C++ kernels; the CPU's best by default")
    parser.add_argument("--threads", type=int, help="torch's threads")
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 1])
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--only", default="", help="rows whose name holds this text")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path, help="write the measurements here")
    options = parser.parse_args(argv)
    if reasons := backends.cpp_reasons():
        parser.error("; ".join(reasons))
    from fastvit import _C

    if options.isa:
        _C._set_cpu_capability(options.isa)
    if options.threads:
        torch.set_num_threads(options.threads)
    machine = {"platform": platform.platform(), "threads": torch.get_num_threads(), "torch": str(torch.__version__)}
    machine |= {"isa": _C.cpu_info()["in_use"], "cpu": backends.describe()["devices"][0]["name"]}
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print("median milliseconds | the peer's time over fastvit's")
    names = list(candidates)
    print(f"{'':<38}" + "".join(f"{n[:8]:>9}" for n in names) + " |" + "".join(f"{n[:8]:>9}" for n in names[1:]))
    measured = []
    for dtype in options.dtype:
        for batch in options.batch:
            for name, facts, make in rows:
                if options.only not in name:
                    continue
                torch.manual_seed(0)
                times, right = _measure(make(batch, getattr(torch, dtype)), candidates, options.rounds)
                _show(f"{name}, batch {batch}, {dtype}", times, right)
                measured.append({"shape": facts, "batch": batch, "dtype": dtype, "accurate": right})
                measured[-1]["ms"] = {candidate: value._asdict() for candidate, value in times.items()}
    if options.json:
        text = json.dumps({"machine": machine, "rows": measured}, indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")


def _measure(arguments: dict[str, Any], candidates: Makers, rounds: int) -> tuple[dict[str, Measured], bool]:
    """The times of every candidate, and whether the first one's result is right."""
    x = arguments.pop("x")
    calls = {name: maker(arguments) for name, maker in candidates.items()}
    fastvit, plain, *_ = calls.values()
    with torch.no_grad():
        exact = list(candidates.values())[1](converted(arguments, torch.float64))
        results = fastvit(x), plain(x), exact(x.double())
        right = all(is_accurate(*each) for each in zip(*map(pytree.tree_leaves, results), strict=True))
        inputs = fresh(lambda: torch.randn_like(x), x.nbytes)
        return compare(calls, inputs, rounds=rounds, repeats=max(1, 100_000 // x.numel())), right


def _show(name: str, times: dict[str, Measured], right: bool) -> None:
    first, *peers = times
    columns = [f"{measured.median:9.3f}" for measured in times.values()]
    ratios = [f"{times[peer].median / times[first].median:8.2f}x" if right else "   wrong" for peer in peers]
    print(f"{name:<38}" + "".join(columns) + " |" + "".join(ratios), flush=True)
