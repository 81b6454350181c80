"""Head-mixed attention on CPU, compared with its plain form and with attention without mixing (torch's SDPA).

    python -m benchmarks.ops.head_mixed_attention [--passes inference training] [--dtype float32 bfloat16]
                                                  [--batch 8 1] [--rounds 30] [--threads 2] [--json PATH]

One line for each shape: median milliseconds of the fused operator, of the plain form and of SDPA on the same q, k and
v, all timed in turn within one run; the speed-up over the plain form, and the time relative to SDPA. Training rows are
a forward and a backward pass, re-attention with batch statistics. A row that fails the accuracy rule names the results
and gradients that do, and has no times.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops._timing import Call, compare, fresh
from benchmarks.timing import keep_memory
from fastvit import backends, ops
from fastvit.accuracy import is_accurate
from fastvit.reference import functional
from fastvit.reference.functional import BatchNorm, LayerNorm

PASSES = ("inference", "training")


class Shape(NamedTuple):
    """One model's attention: heads, tokens, head dimension; the norm of re-attention, or None for talking heads."""

    model: str
    heads: int
    tokens: int
    dim: int
    norm: str | None


SHAPES = (
    Shape("deepvit_16b", 12, 197, 32, "batch"),
    Shape("deepvit_s", 12, 197, 33, "batch"),
    Shape("deepvit_l", 12, 197, 35, "batch"),
    Shape("vit_pytorch", 12, 197, 32, "layer"),
    Shape("cait_xxs24_224", 4, 196, 48, None),
    Shape("cait_s24_224", 8, 196, 48, None),
)


def make_parameters(shape: Shape) -> dict[str, Tensor]:
    """The weights and biases of the mixes, and the tensors of the norm."""
    heads = shape.heads
    names = ("pre", "post") if shape.norm is None else ("post",)
    made = {f"{name}_weight": torch.eye(heads) + 0.1 * torch.randn(heads, heads) for name in names}
    if shape.norm != "layer":
        made |= {f"{name}_bias": 0.1 * torch.randn(heads) for name in names}
    if shape.norm is not None:
        made |= {"norm_weight": torch.ones(heads), "norm_bias": torch.zeros(heads)}
    if shape.norm == "batch":
        made |= {"running_mean": torch.full((heads,), 1.0 / shape.tokens), "running_var": torch.full((heads,), 1e-4)}
    return made


class Step:
    """A call of an operator on q, k and v, with its parameters in one dtype; in training with the backward pass."""

    def __init__(self, shape: Shape, parameters: dict[str, Tensor], weights: Tensor | None, dtype: torch.dtype):
        training = weights is not None
        self.weights = None if weights is None else weights.to(dtype)
        # Copies, since training updates the running statistics.
        own = {name: tensor.to(dtype, copy=True) for name, tensor in parameters.items()}
        running = [own.pop(name, None) for name in ("running_mean", "running_var")]
        self.leaves = {name: tensor.requires_grad_(training) for name, tensor in own.items()}
        affine = [own.pop(name, None) for name in ("norm_weight", "norm_bias")]
        norms = {"batch": BatchNorm(*running, *affine, use_batch_stats=training), "layer": LayerNorm(*affine)}
        self.arguments: dict[str, Any] = {**own, "norm": None if shape.norm is None else norms[shape.norm]}

    def __call__(self, op: Callable[..., Tensor], qkv: Sequence[Tensor], mixed: bool = True) -> list[Tensor]:
        """The result, and in training the gradients of q, k, v and, if ``mixed``, of the parameters."""
        if self.weights is None:
            return [op(*qkv, **(self.arguments if mixed else {}))]
        qkv = [tensor.detach().requires_grad_() for tensor in qkv]
        out = op(*qkv, **(self.arguments if mixed else {}))
        return [out.detach(), *torch.autograd.grad(out, [*qkv, *(self.leaves.values() if mixed else ())], self.weights)]


def measure(shape: Shape, batch: int, dtype: torch.dtype, training: bool, rounds: int) -> dict[str, Any]:
    """Measure one row; its errors are those against float64."""
    packed = (batch, shape.tokens, 3, shape.heads, shape.dim)
    inputs = fresh(
        lambda: torch.randn(packed).to(dtype).permute(2, 0, 3, 1, 4).unbind(0), math.prod(packed) * dtype.itemsize
    )
    weights = torch.randn(batch, shape.heads, shape.tokens, shape.dim).to(dtype) if training else None
    parameters = {name: tensor.to(dtype) for name, tensor in make_parameters(shape).items()}
    step, exact = (Step(shape, parameters, weights, numbers) for numbers in (dtype, torch.float64))
    calls: dict[str, Call] = {
        "fused_ms": lambda qkv: step(ops.head_mixed_attention, qkv),
        "plain_ms": lambda qkv: step(functional.head_mixed_attention, qkv),
        "sdpa_ms": lambda qkv: step(F.scaled_dot_product_attention, qkv, mixed=False),
    }
    with torch.set_grad_enabled(training):
        results = calls["fused_ms"](inputs[0]), calls["plain_ms"](inputs[0])
        oracle = exact(functional.head_mixed_attention, [tensor.double() for tensor in inputs[0]])
        names = ["out", *"qkv", *step.leaves]
        wrong = [name for name, *tensors in zip(names, *results, oracle, strict=False) if not is_accurate(*tensors)]
        times = compare(calls, inputs, rounds=rounds)
    return {
        "model": shape.model,
        "pass": PASSES[training],
        "shape": [batch, shape.heads, shape.tokens, shape.dim],
        "dtype": str(dtype).removeprefix("torch."),
        **{name: measured.median for name, measured in times.items()},
        "inaccurate": wrong,
    }


def describe_row(row: dict[str, Any]) -> str:
    name = f"{row['model']:<15} {row['pass']:<9} {tuple(row['shape'])!s:<17} {row['dtype']:<9}"
    if row["inaccurate"]:
        return f"{name} WRONG: {', '.join(row['inaccurate'])} less accurate than the rule allows"
    fused, plain, sdpa = row["fused_ms"], row["plain_ms"], row["sdpa_ms"]
    return f"{name} {fused:8.3f} {plain:8.3f} {sdpa:8.3f} {plain / fused:8.2f}x {fused / sdpa:8.2f}"


def machine() -> dict[str, Any]:
    """Description of the machine."""
    return {
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "devices": backends.describe()["devices"],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES)
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--batch", nargs="+", type=int, default=[8, 1])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--json", type=Path, help="write the rows and the machine's description there")
    options = parser.parse_args(arguments)
    if reasons := backends.cpp_reasons():
        parser.error("the C++ kernels cannot run: " + "; ".join(reasons))
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    head = f"{'model':<15} {'pass':<9} {'(B, H, N, D)':<17} {'dtype':<9}"
    print(f"{head} {'fused ms':>8} {'plain':>8} {'sdpa':>8} faster by  of sdpa")
    rows = []
    for passed in options.passes:
        for dtype in options.dtype:
            for batch in options.batch:
                for shape in SHAPES:
                    training = passed == "training"
                    rows.append(measure(shape, batch, getattr(torch, dtype), training, options.rounds))
                    print(describe_row(rows[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    keep_memory()
    main()
