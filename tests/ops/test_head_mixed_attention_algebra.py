"""The algebra around the kernels of head-mixed attention, in float64 on plain functions."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastvit.ops.head_mixed_attention import Call, attend
from fastvit.reference import functional
from fastvit.reference.functional import BatchNorm, LayerNorm, recomputing
from tests.ops import head_mixed_attention_plain

HEADS = 4
MIXES = {
    "none": (False, False, False, False),
    "pre": (True, True, False, False),
    "post": (False, False, True, True),
    "post_weight": (False, False, True, False),
    "both": (True, True, True, True),
    "weights": (True, False, True, False),
}
MASKS = {
    "none": None,
    "keys": (2, 1, 1, 9),
    "rows": (2, 1, 7, 9),
    "heads": (2, HEADS, 7, 9),
}


def make_norm(kind: str) -> nn.Module | None:
    norms: dict[str, Any] = {
        "none": lambda: None,
        "layer": lambda: nn.LayerNorm(HEADS, eps=1e-3),
        "layer_plain": lambda: nn.LayerNorm(HEADS, elementwise_affine=False),
        "batch": lambda: nn.BatchNorm2d(HEADS, eps=1e-4),
        "batch_plain": lambda: nn.BatchNorm2d(HEADS, affine=False),
        "batch_cumulative": lambda: nn.BatchNorm2d(HEADS, momentum=None),
        "batch_untracked": lambda: nn.BatchNorm2d(HEADS, track_running_stats=False),
        "batch_eval": lambda: nn.BatchNorm2d(HEADS).eval(),
        "batch_untracked_eval": lambda: nn.BatchNorm2d(HEADS, track_running_stats=False).eval(),
    }
    norm = norms[kind]()
    if norm is not None:
        norm.double()
        for name, tensor in (*norm.named_parameters(), *norm.named_buffers()):
            if tensor.is_floating_point():
                tensor.data.uniform_(0.5, 1.5) if "var" in name else tensor.data.normal_()
    return norm


def read(norm: nn.Module | None) -> BatchNorm | LayerNorm | None:
    if norm is None:
        return None
    return LayerNorm.of(norm) if isinstance(norm, nn.LayerNorm) else BatchNorm.of(norm)


def make_inputs(mix: str, mask: str) -> tuple[dict[str, Tensor], Tensor | None]:
    """q, k, v and the mixes, to be differentiated, and a mask with empty rows."""
    sizes = {"q": (2, HEADS, 7, 5), "k": (2, HEADS, 9, 5), "v": (2, HEADS, 9, 5)}
    names = ("pre_weight", "pre_bias", "post_weight", "post_bias")
    for name, given in zip(names, MIXES[mix], strict=True):
        if given:
            sizes[name] = (HEADS, HEADS) if "weight" in name else (HEADS,)
    inputs = {name: torch.randn(size, dtype=torch.float64).requires_grad_() for name, size in sizes.items()}
    shape = MASKS[mask]
    if shape is None:
        return inputs, None
    allowed = torch.rand(shape) < 0.6
    allowed[-1, :, -1] = False
    return inputs, allowed


def run(
    fused: bool, inputs: dict[str, Tensor], mask: Tensor | None, norm: BatchNorm | LayerNorm | None, output_scale: float
) -> Tensor:
    options = {"norm": norm, "output_scale": output_scale, "mask": mask, "scale": 0.7}
    if not fused:
        return functional.head_mixed_attention(**inputs, **options)
    names = ("q", "k", "v", "pre_weight", "pre_bias", "post_weight", "post_bias")
    call = Call(*(inputs.get(name) for name in names), **options, dropout_p=0.0, dropout_after_mix=False)
    return attend(head_mixed_attention_plain.PLAIN, call)


def step(fused: bool, mix: str, mask: str, kind: str, times: int = 1) -> dict[str, Tensor]:
    """Everything a training step leaves behind: results, gradients, buffers."""
    torch.manual_seed(3)
    inputs, allowed = make_inputs(mix, mask)
    norm = make_norm(kind)
    for _ in range(times):
        out = run(fused, inputs, allowed, read(norm), 0.3)
    weights = torch.linspace(-1.0, 1.0, out.numel(), dtype=torch.float64).view_as(out)
    (out * weights.sin()).sum().backward()
    left = {"out": out.detach(), **{name: tensor.grad for name, tensor in inputs.items()}}
    if norm is not None:
        left |= {f"norm.{name}": parameter.grad for name, parameter in norm.named_parameters()}
        left |= dict(norm.named_buffers())
    return left


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            got[name], tensor, rtol=1e-9, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    ("kind", "mix"),
    [
        (kind, mix)
        for kind in ("none", "batch", "batch_eval", "layer")
        for mix, (*_, post_weight, _) in MIXES.items()
        if post_weight or "batch" not in kind  # which the operator leaves to the plain form
    ],
)
def test_results_gradients_and_statistics(kind: str, mix: str, mask: str) -> None:
    assert_same(step(True, mix, mask, kind), step(False, mix, mask, kind))


@pytest.mark.parametrize(
    "kind", ["batch_plain", "batch_cumulative", "batch_untracked", "batch_untracked_eval", "layer_plain"]
)
def test_settings_of_the_norm(kind: str) -> None:
    assert_same(step(True, "post", "keys", kind, times=3), step(False, "post", "keys", kind, times=3))


@pytest.mark.parametrize("kind", ["batch", "batch_eval", "layer"])
def test_gradcheck(kind: str) -> None:
    """Of the plain twin, and of the algebra by plain kernels: both in float64, affine parameters included."""
    inputs, allowed = make_inputs("both", "rows")
    norm = make_norm(kind)
    assert norm is not None
    names, leaves = [*inputs, "weight", "bias"], [*inputs.values(), norm.weight, norm.bias]

    for fused in (False, True):

        def call(*tensors: Tensor, fused: bool = fused) -> Tensor:
            given = dict(zip(names, tensors, strict=True))
            affine = {name: given.pop(name) for name in ("weight", "bias")}
            return run(fused, given, allowed, read(copy.deepcopy(norm))._replace(**affine), 0.3)

        assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


def test_a_checkpointed_block_counts_a_batch_once() -> None:
    inputs, allowed = make_inputs("post", "none")
    norms = [make_norm("batch")]
    norms.append(copy.deepcopy(norms[0]))
    run(True, inputs, allowed, read(norms[0]), 1.0)
    run(True, inputs, allowed, read(norms[1]), 1.0)
    with recomputing():
        run(True, inputs, allowed, read(norms[1]), 1.0)
    assert all(map(torch.equal, norms[0].buffers(), norms[1].buffers()))
    assert norms[0].num_batches_tracked == 1


def test_a_layer_norm_of_something_else_is_refused() -> None:
    for module in (nn.LayerNorm((4, 2)), nn.BatchNorm2d(4)):
        with pytest.raises(ValueError, match="module: expected an nn.LayerNorm over one axis, got "):
            LayerNorm.of(module)
