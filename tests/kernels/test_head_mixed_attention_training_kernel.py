"""A training step of head-mixed attention in half precision, its kernels in Triton's interpreter, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from fastvit.kernels import head_mixed_attention as forward
from fastvit.kernels import head_mixed_attention_backward as backward
from fastvit.kernels import head_mixed_attention_tiles as tiles
from fastvit.kernels import head_mixed_attention_training as training

from fastvit.reference import functional
from fastvit.reference.functional import BatchNorm
from tests.helpers import assert_as_accurate, poisoned_empty
from tests.kernels.test_head_mixed_attention_kernel import make_qkv

pytestmark = pytest.mark.interpreter

LIMIT, EPS, MOMENTUM = 227 * 1024, 1e-5, 0.2
HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
NAMES = ("q", "k", "v", "pre_weight", "pre_bias", "post_weight", "post_bias", "norm_weight", "norm_bias")


@pytest.fixture(autouse=True)
def device(monkeypatch):
    """Sets whether Gluon runs, and the shared memory of a program; gives the settings that were launched."""

    def use(gluon: bool, limit: int = LIMIT) -> list[tiles.Tiles]:
        plans: list[tiles.Tiles] = []
        plan_for = tiles.plan_for

        def spy(*arguments, **options):
            plans.append(plan_for(*arguments, **options))
            return plans[-1]

        for module in (forward, backward, training):
            monkeypatch.setattr(module, "gluon_runs", lambda _: gluon)
            monkeypatch.setattr(module, "shared_limit", lambda _: limit)
        monkeypatch.setattr(tiles, "plan_for", spy)
        return plans

    return use


def make(kind: str, batch: int, heads: int, queries: int, keys: int, dim: int, dtype: torch.dtype, size: float = 1.0):
    """The tensors by name."""
    q, k, v = make_qkv(batch, heads, queries, keys, dim, dtype, size)
    mixes = [(torch.eye(heads) + 0.3 * torch.randn(heads, heads)).to(dtype) for _ in range(2)]
    vectors = [(0.3 * torch.randn(heads)).to(dtype) for _ in range(4)]
    vectors[2] = (1.0 + vectors[2]).to(dtype)
    values = (q, k, v, mixes[0], vectors[0], mixes[1], *vectors[1:])
    given = {"batch": NAMES[5:], "talking": NAMES[3:7], "all": NAMES[3:], "bare": ("post_weight",), "free": NAMES[5:6]}
    wanted = {*"qkv", *given[kind]}
    tensors: dict[str, Any] = {n: x if n in wanted else None for n, x in zip(NAMES, values, strict=True)}
    if kind in ("batch", "all"):
        tensors |= {"mean": (0.1 * torch.randn(heads)).to(dtype), "var": torch.rand(heads).to(dtype)}
    return tensors | {"batch_statistics": kind in ("batch", "all", "free")}


def step(tensors: dict[str, Any], grad: Tensor, scale: float) -> dict[str, Tensor]:
    """The result and everything that follows from it, by the kernels."""
    given, running = [tensors[name] for name in NAMES], (tensors.get("mean"), tensors.get("var"))
    settings = (EPS, MOMENTUM, tensors["batch_statistics"], -1.5, scale)
    with poisoned_empty():
        out, lse, kept, mean, var = training.head_mixed_attention_training(*given, *running, *settings)
        gradients = training.head_mixed_attention_training_backward(grad, *given, lse, kept, -1.5, scale)
    got = {name: x for name, x in zip(NAMES, gradients, strict=True) if tensors[name] is not None}
    assert all(x.numel() == 0 for name, x in zip(NAMES, gradients, strict=True) if tensors[name] is None)
    for name, x in got.items():
        assert x.dtype == tensors[name].dtype, name
    assert all(x.transpose(1, 2).is_contiguous() for x in (out, *gradients[:3]))
    if running[0] is not None:
        got |= {"mean": mean, "var": var}
    return {"out": out, **got}


def plain(tensors: dict[str, Any], grad: Tensor, scale: float, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same by the plain form in a dtype."""
    leaves = {n: tensors[n].detach().to(dtype).requires_grad_() for n in NAMES if tensors[n] is not None}
    running = {n: tensors[n].to(dtype).clone() for n in ("mean", "var") if n in tensors}
    norm = None
    if tensors["batch_statistics"]:
        affine = leaves.get("norm_weight"), leaves.get("norm_bias")
        norm = BatchNorm(running.get("mean"), running.get("var"), *affine, True, MOMENTUM, EPS)
    mixes = {name: leaves.get(name) for name in NAMES[3:7]}
    out = functional.head_mixed_attention(
        *(leaves[n] for n in "qkv"), **mixes, norm=norm, output_scale=-1.5, scale=scale
    )
    gradients = torch.autograd.grad(out, list(leaves.values()), grad.to(dtype))
    return {"out": out.detach(), **dict(zip(leaves, gradients, strict=True)), **running}


def check(tensors: dict[str, Any], scale: float | None = None) -> None:
    q = tensors["q"]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    grad = torch.randn(q.shape).to(q.dtype)
    got, reference, exact = (
        step(tensors, grad, scale),
        plain(tensors, grad, scale, q.dtype),
        plain(tensors, grad, scale, torch.float64),
    )
    assert got.keys() == reference.keys()
    for name, value in got.items():
        vanishes = name == "pre_bias" or (name == "post_bias" and tensors["batch_statistics"])
        if vanishes:  # the softmax, or the norm, takes it away again
            assert value.eq(0).all()
        else:
            assert_as_accurate(value, reference[name], exact[name], name=name)


@HALF
@pytest.mark.parametrize(
    ("kind", "heads", "queries", "keys", "dim"),
    [
        ("batch", 12, 21, 70, 33),  # two tiles of columns, and two blocks of rows, none of them full
        ("talking", 8, 21, 70, 48),
        ("batch", 3, 16, 64, 16),  # both full; fewer heads than warps
        ("all", 5, 18, 35, 24),
        ("free", 16, 17, 20, 16),  # no affine part
        ("bare", 4, 9, 37, 80),
    ],
)
def test_a_step(kind, heads, queries, keys, dim, dtype, device):
    plans = device(True)
    check(make(kind, 2, heads, queries, keys, dim, dtype))
    assert len(plans) == (3 if kind in ("talking", "bare") else 5)


@HALF
@pytest.mark.parametrize("kind", ["batch", "talking", "all", "bare"])
@pytest.mark.parametrize("why", ["no Gluon", "little shared memory"])
def test_without_tiles_of_all_heads(kind, why, dtype, device):
    plans = device(why != "no Gluon", LIMIT if why == "no Gluon" else 40 * 1024)
    check(make(kind, 2, 3, 18, 19, 16, dtype))
    assert plans == []


@HALF
@pytest.mark.parametrize("kind", ["batch", "talking"])
def test_more_keys_than_one_pass_takes(kind, dtype, device):
    plans = device(True)
    check(make(kind, 1, 3, 258, 257, 16, dtype))
    assert len(plans) == (5 if kind == "batch" else 4)


@HALF
@pytest.mark.parametrize("kind", ["batch", "talking"])
def test_large_logits(kind, dtype, device):
    device(True)
    tensors = make(kind, 1, 4, 19, 41, 16, dtype, size=8.0)
    check(tensors)


@HALF
def test_maps_that_are_nearly_uniform(dtype, device):
    """A BatchNorm with a small variance enlarges what the maps differ by."""
    device(True)
    check(make("batch", 2, 6, 18, 50, 32, dtype, size=0.3))
