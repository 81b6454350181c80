"""The public operator on the Triton kernels, in the interpreter: norms, running statistics and gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton", reason="Triton is not installed")

from fastvit.ops import head_mixed_attention
from fastvit.reference import functional
from fastvit.reference.functional import BatchNorm, LayerNorm
from tests.helpers import assert_as_accurate

HEADS = 3


def step(op: Any, norm: nn.Module | None, dtype: torch.dtype, **options: Any) -> dict[str, Tensor]:
    """A training step with a mix before and after the softmax: result, gradients and buffers by name."""
    torch.manual_seed(0)
    norm = copy.deepcopy(norm)
    sizes = {"q": (2, HEADS, 9, 8), "k": (2, HEADS, 13, 8), "v": (2, HEADS, 13, 8)}
    sizes |= {"pre_weight": (HEADS, HEADS), "pre_bias": (HEADS,), "post_weight": (HEADS, HEADS), "post_bias": (HEADS,)}
    leaves = {name: torch.randn(size).to(dtype).requires_grad_() for name, size in sizes.items()}
    mask = torch.rand(2, 1, 9, 13) < 0.7
    mask[1, :, 4] = False
    given: BatchNorm | LayerNorm | None = None
    if norm is not None:
        norm = norm.to(dtype)
        given = BatchNorm.of(norm) if isinstance(norm, nn.BatchNorm2d) else LayerNorm.of(norm)
    out = op(**leaves, norm=given, output_scale=0.5, mask=mask, **options)
    (out * torch.randn(out.shape).to(dtype)).sum().backward()
    left = {"out": out.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}
    if norm is not None:
        left |= {name: parameter.grad for name, parameter in norm.named_parameters()} | dict(norm.named_buffers())
    return left


NORMS = {
    "none": None,
    "batch": nn.BatchNorm2d(HEADS),
    "batch_eval": nn.BatchNorm2d(HEADS).eval(),
    "layer": nn.LayerNorm(HEADS),
}


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", NORMS)
def test_a_training_step(kind: str) -> None:
    norm = NORMS[kind]
    got = step(head_mixed_attention, norm, torch.float32, backend="triton")
    plain = step(functional.head_mixed_attention, norm, torch.float32)
    exact = step(functional.head_mixed_attention, norm, torch.float64)
    assert got.keys() == plain.keys()
    large = ("out", *"qkv")
    for name in large:
        assert_as_accurate(got[name], plain[name], exact[name], name=name)
    small = [name for name in got if name not in large and exact[name].is_floating_point() and exact[name].any()]
    sizes = {name: exact[name].square().mean().sqrt() for name in small}
    small = [name for name in small if sizes[name] > 1e-9]  # a bias before a BatchNorm has a zero gradient
    joined = [torch.cat([(left[n].double() / sizes[n]).flatten() for n in small]) for left in (got, plain, exact)]
    assert_as_accurate(joined[0].float(), joined[1].float(), joined[2])


def test_on_a_cpu_the_error_says_why() -> None:
    q = torch.randn(1, HEADS, 4, 8)
    with pytest.raises(RuntimeError, match="Triton kernels run on CUDA"):
        head_mixed_attention(q, q, q, backend="triton")
