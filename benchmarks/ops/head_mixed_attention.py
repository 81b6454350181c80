"""Head-mixed attention on CPU beside its plain form and beside attention without any mixing (torch's SDPA).

    python -m benchmarks.ops.head_mixed_attention [--dtype float32 bfloat16] [--batch 1 8] [--rounds 30] [--json PATH]

One line a shape: median milliseconds of the fused operator, of the plain one and of SDPA on the same q, k and v, all
timed in turn within one run; then how many times faster than the plain form, and the time relative to SDPA. A row whose
result is not as accurate as the plain form's prints its errors and no speed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import interleaved
from fastvit import backends, ops
from fastvit.reference import functional
from fastvit.reference.functional import BatchNorm


class Shape(NamedTuple):
    """One model's attention: heads, tokens, head dimension, and whether the heads talk before the softmax, too."""

    model: str
    heads: int
    tokens: int
    dim: int
    talking: bool


SHAPES = (
    Shape("deepvit_16b", 12, 197, 32, False),
    Shape("deepvit_s", 12, 197, 33, False),
    Shape("deepvit_l", 12, 197, 35, False),
    Shape("cait_xxs24_224", 4, 196, 48, True),
    Shape("cait_s24_224", 8, 196, 48, True),
)


def make_parts(shape: Shape, dtype: torch.dtype) -> tuple[Any, ...]:
    """The arguments behind q, k and v."""
    heads = shape.heads
    mixes = [torch.eye(heads) + 0.1 * torch.randn(heads, heads), 0.1 * torch.randn(heads)] * 2
    mixes = [mix.to(dtype) for mix in mixes]
    if shape.talking:
        return tuple(mixes)
    mean, var = torch.full((heads,), 1.0 / shape.tokens), torch.full((heads,), 1e-4)
    norm = BatchNorm(mean.to(dtype), var.to(dtype), torch.ones(heads, dtype=dtype), torch.zeros(heads, dtype=dtype))
    return mixes[0], mixes[1], norm


def to_double(value: Any) -> Any:
    if isinstance(value, BatchNorm):
        return BatchNorm(*(to_double(field) for field in value))
    return value.double() if isinstance(value, Tensor) else value


def largest_errors(fused: Tensor, plain: Tensor, exact: Tensor) -> tuple[float, float]:
    return float((fused - exact).abs().max()), float((plain - exact).abs().max())


def measure(shape: Shape, batch: int, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Times one row; its errors are against float64."""
    parts = make_parts(shape, dtype)
    inputs = [
        torch.randn(batch, shape.tokens, 3, shape.heads, shape.dim).to(dtype).permute(2, 0, 3, 1, 4).unbind(0)
        for _ in range(3)
    ]
    fused_op = ops.talking_heads_attention if shape.talking else ops.re_attention
    plain_op = functional.talking_heads_attention if shape.talking else functional.re_attention
    calls: list[Callable[[Any], Tensor]] = [
        lambda qkv: fused_op(*qkv, *parts),
        lambda qkv: plain_op(*qkv, *parts),
        lambda qkv: F.scaled_dot_product_attention(*qkv),
    ]
    exact = plain_op(*(t.double() for t in inputs[0]), *(to_double(part) for part in parts))
    error, plain_error = largest_errors(calls[0](inputs[0]), calls[1](inputs[0]), exact)
    seconds = interleaved(calls, inputs, rounds=rounds)
    fused, plain, sdpa = (1e3 * statistics.median(times) for times in seconds)
    allowed = 2 * plain_error + 4 * torch.finfo(dtype).eps * float(exact.square().mean().sqrt())
    return {
        "model": shape.model,
        "shape": [batch, shape.heads, shape.tokens, shape.dim],
        "dtype": str(dtype).removeprefix("torch."),
        "fused_ms": fused,
        "plain_ms": plain,
        "sdpa_ms": sdpa,
        "error": error,
        "plain_error": plain_error,
        "accurate": error <= allowed,
    }


def describe_row(row: dict[str, Any]) -> str:
    name = f"{row['model']:<15} {tuple(row['shape'])!s:<17} {row['dtype']:<9}"
    if not row["accurate"]:
        return f"{name} WRONG: error {row['error']:.2e}, of the plain form {row['plain_error']:.2e}"
    fused, plain, sdpa = row["fused_ms"], row["plain_ms"], row["sdpa_ms"]
    return f"{name} {fused:8.3f} {plain:8.3f} {sdpa:8.3f} {plain / fused:8.2f}x {fused / sdpa:8.2f}"


def machine() -> dict[str, Any]:
    """Where it ran."""
    return {
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "devices": backends.describe()["devices"],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    print(
        f"{'model':<15} {'(B, H, N, D)':<17} {'dtype':<9} {'fused ms':>8} {'plain':>8} {'sdpa':>8} faster by  of sdpa"
    )
    rows = []
    with torch.inference_mode():
        for dtype in options.dtype:
            for batch in options.batch:
                for shape in SHAPES:
                    rows.append(measure(shape, batch, getattr(torch, dtype), options.rounds))
                    print(describe_row(rows[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
