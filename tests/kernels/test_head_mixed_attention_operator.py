"""The public operator on the Triton kernels, in the interpreter: norms, running statistics and gradients."""

from __future__ import annotations

import copy
import importlib
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
module = importlib.import_module("fastvit.ops.head_mixed_attention")


def step(op: Any, norm: nn.Module | None, dtype: torch.dtype, masked: bool = True, **options: Any) -> dict[str, Tensor]:
    """A training step with a mix before and after the softmax: result, gradients and buffers by name."""
    torch.manual_seed(0)
    norm = copy.deepcopy(norm)
    sizes = {"q": (2, HEADS, 9, 8), "k": (2, HEADS, 13, 8), "v": (2, HEADS, 13, 8)}
    sizes |= {"pre_weight": (HEADS, HEADS), "pre_bias": (HEADS,), "post_weight": (HEADS, HEADS), "post_bias": (HEADS,)}
    leaves = {name: torch.randn(size).to(dtype).requires_grad_() for name, size in sizes.items()}
    mask = torch.rand(2, 1, 9, 13) < 0.7
    mask[1, :, 4] = False
    options |= {"mask": mask} if masked else {}
    given: BatchNorm | LayerNorm | None = None
    if norm is not None:
        norm = norm.to(dtype)
        given = BatchNorm.of(norm) if isinstance(norm, nn.BatchNorm2d) else LayerNorm.of(norm)
    out = op(**leaves, norm=given, output_scale=0.5, **options)
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


def check(norm: nn.Module | None, dtype: torch.dtype, masked: bool) -> None:
    got = step(head_mixed_attention, norm, dtype, masked, backend="triton")
    plain = step(functional.head_mixed_attention, norm, dtype, masked)
    exact = step(functional.head_mixed_attention, norm, torch.float64, masked)
    assert got.keys() == plain.keys()
    large = ("out", *"qkv")
    for name in large:
        assert_as_accurate(got[name], plain[name], exact[name], name=name)
    small = [name for name in got if name not in large and exact[name].is_floating_point() and exact[name].any()]
    sizes = {name: exact[name].square().mean().sqrt() for name in small}
    small = [name for name in small if sizes[name] > 1e-9]  # a bias before a BatchNorm has a zero gradient
    joined = [torch.cat([(left[n].double() / sizes[n]).flatten() for n in small]) for left in (got, plain, exact)]
    assert_as_accurate(joined[0].to(dtype), joined[1].to(dtype), joined[2])


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", NORMS)
def test_a_training_step(kind: str) -> None:
    check(NORMS[kind], torch.float32, masked=True)


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", ["none", "batch", "batch_eval"])
def test_a_training_step_in_half_precision_is_one_operator(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, train = [], module._Train.apply

    def spy(*arguments: Any) -> Any:
        steps.append(1)
        return train(*arguments)

    monkeypatch.setattr(module._Train, "apply", spy)
    check(NORMS[kind], torch.float16, masked=False)
    assert steps == [1]


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", ["none", "batch"])
def test_second_derivatives_of_a_step_are_those_of_the_plain_form(kind: str) -> None:
    def second(op: Any, dtype: torch.dtype, **options: Any) -> Tensor:
        torch.manual_seed(0)
        q = (0.5 * torch.randn(2, HEADS, 5, 8)).half().to(dtype).requires_grad_()
        weight = torch.randn(HEADS, HEADS).half().to(dtype)
        norm = copy.deepcopy(NORMS[kind])
        given = None if norm is None else BatchNorm.of(norm.to(dtype))
        out = op(q, q, q, post_weight=weight, norm=given, **options)
        (grad,) = torch.autograd.grad(out.sin().mean(), q, create_graph=True)
        return torch.autograd.grad(100.0 * grad.sin().sum(), q)[0]

    got = second(head_mixed_attention, torch.float16, backend="triton")
    plain, exact = (second(functional.head_mixed_attention, dtype) for dtype in (torch.float16, torch.float64))
    assert_as_accurate(got, plain, exact)


@pytest.mark.interpreter
@pytest.mark.parametrize("batch_statistics", [True, False])
def test_the_operators_of_a_step_hold_torchs_contract(batch_statistics: bool) -> None:
    q, k, v = (torch.randn(2, HEADS, 9, 8).half() for _ in range(3))
    weight, vector = torch.randn(HEADS, HEADS).half(), torch.rand(HEADS).half()
    given = q, k, v, None, None, weight, vector, *((vector, vector) if batch_statistics else (None, None))
    running = (vector, vector) if batch_statistics else (None, None)
    forward, backward = module._INFER_TRITON.train, module._INFER_TRITON.train_backward
    settings, utils = (1e-5, 0.1, batch_statistics, 1.0, 0.3), ("test_schema", "test_faketensor")
    torch.library.opcheck(forward, (*given, *running, *settings), test_utils=utils)
    out, lse, kept, *_ = forward(*given, *running, *settings)
    torch.library.opcheck(backward, (out, *given, torch.zeros_like(lse), kept, 1.0, 0.3), test_utils=utils)


@pytest.mark.interpreter
def test_a_step_compiles_in_one_graph() -> None:
    """One tensor as both mixes, too."""
    q, weight = torch.randn(2, HEADS, 9, 8).half().requires_grad_(), torch.randn(HEADS, HEADS).half()

    def run(norm: nn.Module) -> Tensor:
        parts = {"pre_weight": weight, "post_weight": weight, "norm": BatchNorm.of(norm)}
        return head_mixed_attention(q, q, q, **parts, backend="triton")

    norms = [nn.BatchNorm2d(HEADS).half() for _ in range(2)]
    outs = run(norms[0]), torch.compile(run, backend="aot_eager", fullgraph=True)(norms[1])
    assert torch.equal(*outs)
    assert torch.equal(norms[0].running_var, norms[1].running_var) and not norms[0].running_var.eq(1).all()
    grads = [torch.autograd.grad(out.float().sin().mean(), q)[0] for out in outs]
    torch.testing.assert_close(*grads)


def test_on_a_cpu_the_error_says_why() -> None:
    q = torch.randn(1, HEADS, 4, 8)
    with pytest.raises(RuntimeError, match="Triton kernels run on CUDA"):
        head_mixed_attention(q, q, q, backend="triton")
