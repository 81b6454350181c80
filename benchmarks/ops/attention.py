"""Masked and class attention on CPU, compared with torch's SDPA and the plain form, on views of a packed qkv.

    python -m benchmarks.ops.attention [--task inference training] [--dtype float32 bfloat16] [--batch 8 1]
        [--mask none padding] [--backend auto] [--rounds 15] [--json PATH]

One line for each shape: median milliseconds of the operator, of SDPA on the same views and of the plain form, all timed
in turn within one run; the time relative to SDPA (and the 20th and 80th percentile of the operator over SDPA's median);
and the speed-up over the plain form. Masks: "padding" is a mask over keys, (B, Nk), that keeps four fifths; "full" is a
mask for each query, (B, 1, Nq, Nk); "bias" is an additive bias, (1, H, Nq, Nk), which has a gradient in training. The
task "training" is the forward pass and all gradients. Shapes with up to four queries run ``class_attention``. A row
that fails the accuracy rule says so and has no times. ``--backend cpp`` measures the C++ kernel even where the
automatic choice is SDPA.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops._timing import Measured, compare, fresh
from benchmarks.timing import keep_memory
from fastvit import backends, ops
from fastvit.accuracy import is_accurate
from fastvit.reference import functional


class Shape(NamedTuple):
    """One model's attention: heads, queries, keys, head dimension."""

    model: str
    heads: int
    queries: int
    keys: int
    dim: int


SHAPES = (
    Shape("vit_ti", 3, 197, 197, 64),
    Shape("vit_s", 6, 197, 197, 64),
    Shape("vit_b", 12, 197, 197, 64),
    Shape("vit_b_384", 12, 577, 577, 64),
    Shape("vit_s_512", 6, 1025, 1025, 64),
    Shape("cvt_stage1", 1, 3136, 784, 64),
    Shape("cvt_stage2", 3, 784, 196, 64),
    Shape("cvt_stage3", 6, 197, 50, 64),
    Shape("cpvt_s", 6, 196, 196, 64),
    Shape("cait_s_class", 8, 1, 197, 48),
    Shape("cait_xxs_class", 4, 1, 197, 48),
    Shape("cait_m_class_448", 16, 1, 785, 48),
    Shape("two_class_tokens", 12, 2, 198, 64),
    Shape("ceit_s_class", 6, 1, 12, 64),
)
CLASS_QUERIES = 4
PRODUCTS_PER_ROUND = 1 << 27


def make_inputs(shape: Shape, batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as views of packed tensors."""
    longest = max(shape.queries, shape.keys)
    packed = torch.randn(batch, longest, 3, shape.heads, shape.dim).to(dtype)
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    return q[:, :, : shape.queries], k[:, :, : shape.keys], v[:, :, : shape.keys]


def make_mask(kind: str, shape: Shape, batch: int) -> Tensor | None:
    sizes = {"padding": (batch, 1, 1, shape.keys), "full": (batch, 1, shape.queries, shape.keys)}
    return torch.rand(sizes[kind]) < 0.8 if kind in sizes else None


Attention = Callable[..., Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask if bias is None else bias)


def results(attention: Attention, leaves: list[Tensor], mask: Tensor | None, grad: Tensor | None) -> list[Tensor]:
    """The output, and in training the gradient of every leaf: q, k, v and the bias if there is one."""
    q, k, v, *bias = leaves
    out = attention(q, k, v, mask, bias[0] if bias else None)
    return [out] if grad is None else [out, *torch.autograd.grad(out, leaves, grad)]


def measure(
    shape: Shape, batch: int, dtype: torch.dtype, mask_kind: str, backend: str, rounds: int, training: bool
) -> dict[str, Any]:
    """Measure one row; its errors are those against float64."""
    bias = [torch.randn(1, shape.heads, shape.queries, shape.keys).to(dtype)] if mask_kind == "bias" else []

    def make_leaves() -> list[Tensor]:
        tensors = [*make_inputs(shape, batch, dtype), *bias]
        return [tensor.detach().requires_grad_(training) for tensor in tensors]

    leaves = make_leaves()
    mask = make_mask(mask_kind, shape, batch)
    grad = torch.randn(batch, shape.queries, shape.heads, shape.dim).to(dtype).transpose(1, 2) if training else None
    operator = ops.class_attention if shape.queries <= CLASS_QUERIES else ops.masked_attention
    forms: dict[str, Attention] = {
        "fused": functools.partial(operator, backend=backend),
        "sdpa": sdpa,
        "plain": functional.masked_attention,
    }
    calls = {name: functools.partial(results, form, mask=mask, grad=grad) for name, form in forms.items()}
    wide = [leaf.detach().double().requires_grad_(training) for leaf in leaves]
    exact = results(functional.masked_attention, wide, mask, None if grad is None else grad.double())
    products = (7 if training else 2) * batch * shape.heads * shape.queries * shape.keys * shape.dim
    repeats = max(1, min(50, PRODUCTS_PER_ROUND // products))
    inputs = fresh(make_leaves, sum(leaf.nbytes for leaf in leaves[:3]))
    times = compare(calls, inputs, rounds=rounds, repeats=repeats)
    return {
        "model": shape.model,
        "shape": [batch, *shape[1:]],
        "task": "training" if training else "inference",
        "dtype": str(dtype).removeprefix("torch."),
        "mask": mask_kind,
        "accurate": all(map(is_accurate, calls["fused"](leaves), calls["plain"](leaves), exact)),
        **{name: measured._asdict() for name, measured in times.items()},
    }


def describe_row(row: dict[str, Any]) -> str:
    name = f"{row['model']:<16} {tuple(row['shape'])!s:<24} {row['task']:<9} {row['dtype']:<8} {row['mask']:<7}"
    if not row["accurate"]:
        return f"{name} WRONG: less accurate than the rule allows"
    fused, sdpa, plain = (Measured(**row[key]) for key in ("fused", "sdpa", "plain"))
    spread = f"({fused.low / sdpa.median:.2f} to {fused.high / sdpa.median:.2f})"
    return (
        f"{name} {fused.median:8.3f} {sdpa.median:8.3f} {plain.median:8.3f} "
        f"{fused.median / sdpa.median:8.2f} {spread:<14} {plain.median / fused.median:8.2f}x"
    )


def machine() -> dict[str, Any]:
    """Description of the machine."""
    return {
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "devices": backends.describe()["devices"],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=("inference", "training"), default=["inference", "training"])
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--batch", nargs="+", type=int, default=[8, 1])
    parser.add_argument("--mask", nargs="+", choices=("none", "padding", "full", "bias"), default=["none", "padding"])
    parser.add_argument("--model", nargs="+", choices=[shape.model for shape in SHAPES])
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--json", type=Path, help="write the rows and the machine's description there")
    options = parser.parse_args(arguments)
    if reasons := backends.cpp_reasons():
        parser.error("the C++ kernels cannot run: " + "; ".join(reasons))
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(
        f"{'model':<16} {'(B, H, Nq, Nk, D)':<24} {'task':<9} {'dtype':<8} {'mask':<7} {'fused ms':>8} {'sdpa':>8} "
        f"{'plain':>8} {'of sdpa':>8} {'':<14} faster than plain"
    )
    shapes = [shape for shape in SHAPES if not options.model or shape.model in options.model]
    rows = []
    for task, dtype, batch, shape, kind in itertools.product(
        options.task, options.dtype, options.batch, shapes, options.mask
    ):
        training = task == "training"
        with torch.inference_mode(not training):
            row = measure(shape, batch, getattr(torch, dtype), kind, options.backend, options.rounds, training)
        rows.append(row)
        print(describe_row(row), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    keep_memory()
    main()
