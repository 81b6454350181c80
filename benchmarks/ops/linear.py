"""Linear layers and MLPs on CPU, compared with torch's.

    python -m benchmarks.ops.linear [--dtype float32 bfloat16] [--batch 8 1] [--backend auto] [--train] [--rounds 15]
        [--json PATH]

One line for each layer: median milliseconds of the operator and of the plain form (the library's product, in an MLP
followed by GELU), timed in turn within one run; and the speed-up (with the plain form's median over the 80th and the
20th percentile of the operator). ``--train`` times forward and backward. A row that fails the accuracy rule says so and
has no times. ``--backend cpp`` measures the C++ kernel even where the automatic choice is the library.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.ops._timing import Call, Measured, compare, fresh
from benchmarks.timing import keep_memory
from fastvit import backends, ops
from fastvit.accuracy import is_accurate
from fastvit.reference import functional


class Shape(NamedTuple):
    """One layer of a model: tokens of an image, widths of input and output, and of the hidden layer of an MLP."""

    layer: str
    tokens: int
    depth: int
    columns: int
    hidden: int | None = None


SHAPES = (
    Shape("vit_ti_mlp", 197, 192, 192, 768),
    Shape("vit_s_qkv", 197, 384, 1152),
    Shape("vit_s_proj", 197, 384, 384),
    Shape("vit_s_mlp", 197, 384, 384, 1536),
    Shape("vit_b_mlp", 197, 768, 768, 3072),
    Shape("cait_xxs_mlp", 196, 192, 192, 768),
    Shape("cvt_1_mlp", 3136, 64, 64, 256),
    Shape("cvt_2_mlp", 784, 192, 192, 768),
    Shape("head", 1, 384, 1000),
)
PRODUCTS_PER_ROUND = 1 << 28


def make_calls(shape: Shape, dtype: torch.dtype, backend: str) -> dict[str, Call]:
    """Calls on x: the operator, the plain form, the plain form in float64, and training steps of the first two."""
    widths = [shape.depth, shape.hidden or shape.columns, *([shape.columns] if shape.hidden else [])]
    tensors = []
    for depth, columns in itertools.pairwise(widths):
        tensors += [torch.randn(columns, depth) / depth**0.5, torch.randn(columns)]
    fused, plain = (ops.mlp, functional.mlp) if shape.hidden else (ops.linear, functional.linear)
    tensors = [tensor.to(dtype) for tensor in tensors]
    exact = [tensor.double() for tensor in tensors]
    return {
        "fused": lambda x: fused(x, *tensors, backend=backend),
        "plain": lambda x: plain(x, *tensors),
        "exact": lambda x: plain(x.double(), *exact),
        "train_fused": lambda x: _step(fused, (x, *tensors), backend=backend),
        "train_plain": lambda x: _step(plain, (x, *tensors)),
    }


def _step(run: Callable[..., Tensor], tensors: Sequence[Tensor], **options: Any) -> Tensor:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    run(*leaves, **options).sum().backward()
    assert leaves[0].grad is not None
    return leaves[0].grad


def measure(shape: Shape, batch: int, dtype: torch.dtype, backend: str, train: bool, rounds: int) -> dict[str, Any]:
    """Measure one row."""
    calls = make_calls(shape, dtype, backend)
    x = torch.randn(batch, shape.tokens, shape.depth).to(dtype)
    inputs = fresh(lambda: torch.randn_like(x), x.nbytes)
    timed = {name: calls[f"train_{name}" if train else name] for name in ("fused", "plain")}
    products = batch * shape.tokens * (shape.hidden or 1) * (shape.depth + shape.columns if shape.hidden else 1)
    repeats = max(1, min(50, PRODUCTS_PER_ROUND // products))
    return {
        "layer": shape.layer,
        "shape": [batch, *shape[1:]],
        "dtype": str(dtype).removeprefix("torch."),
        "train": train,
        "accurate": is_accurate(calls["fused"](x), calls["plain"](x), calls["exact"](x)),
        **{
            name: measured._asdict()
            for name, measured in compare(timed, inputs, rounds=rounds, repeats=repeats).items()
        },
    }


def describe_row(row: dict[str, Any]) -> str:
    sizes = " ".join(str(size) for size in row["shape"] if size is not None)
    name = f"{row['layer']:<13} {sizes:<22} {row['dtype']:<9}"
    if not row["accurate"]:
        return f"{name} WRONG: less accurate than the rule allows"
    fused, plain = (Measured(**row[key]) for key in ("fused", "plain"))
    spread = f"({plain.median / fused.high:.2f} to {plain.median / fused.low:.2f})"
    return f"{name} {fused.median:9.3f} {plain.median:9.3f} {plain.median / fused.median:7.2f}x {spread}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--batch", nargs="+", type=int, default=[8, 1])
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--train", action="store_true", help="forward and backward")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--json", type=Path, help="write the rows and the machine's description there")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"{'layer':<13} {'sizes':<22} {'dtype':<9} {'fused ms':>9} {'plain':>9} faster")
    rows = []
    with torch.inference_mode(not options.train):
        for dtype in options.dtype:
            for batch in options.batch:
                for shape in SHAPES:
                    row = measure(shape, batch, getattr(torch, dtype), options.backend, options.train, options.rounds)
                    rows.append(row)
                    print(describe_row(row), flush=True)
    if options.json:
        machine = {
            "torch": str(torch.__version__),
            "threads": torch.get_num_threads(),
            "devices": backends.describe()["devices"],
        }
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    keep_memory()
    main()
