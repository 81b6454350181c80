"""Head-mixed attention in one pass: the kernel in Triton's interpreter, without its layouts, against float64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from fastvit.kernels import head_mixed_attention as forward
from fastvit.kernels import head_mixed_attention_backward as backward
from fastvit.kernels import head_mixed_attention_tiles as tiles
from fastvit.kernels import head_mixed_attention_whole as whole

from fastvit.reference import functional
from fastvit.reference.functional import BatchNorm
from tests.helpers import assert_as_accurate, poisoned_empty
from tests.kernels.test_head_mixed_attention_kernel import EPS, NAMES, make_parts, make_qkv, plain, to, with_gradients

pytestmark = pytest.mark.interpreter

LIMIT = 227 * 1024
HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


@pytest.fixture(autouse=True)
def one_pass(monkeypatch):
    """Take the one-pass kernel wherever it fits, and say which settings were launched."""
    plans: list[whole.Whole] = []
    plan_for = whole.plan_for

    def spy(*arguments):
        plans.append(plan_for(*arguments))
        return plans[-1]

    monkeypatch.setattr(forward, "gluon_runs", lambda _: True)
    monkeypatch.setattr(forward, "shared_limit", lambda _: LIMIT)
    monkeypatch.setattr(whole, "plan_for", spy)
    return plans


def run(q, k, v, parts, scale=None, mask=None):
    """The result, and the plain form's in its dtype and in float64."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    mixes = [parts[name] for name in NAMES]
    settings = (None, None, EPS, parts["layer_norm"], parts["output_scale"], False, mask, scale)
    with poisoned_empty():
        out = forward.head_mixed_attention_forward(q, k, v, *mixes, *settings)
    assert out.transpose(1, 2).is_contiguous()
    wide = {name: to(value, torch.float64) for name, value in parts.items()}
    exact = plain(*(to(x, torch.float64) for x in (q, k, v)), wide, mask, scale).detach()
    return out, plain(q, k, v, parts, mask, scale), exact


@HALF
@pytest.mark.parametrize(
    ("kind", "heads", "queries", "keys", "dim"),
    [
        ("re", 12, 5, 197, 33),  # four warps, and pieces of 32, 16 and 8 keys of each
        ("post", 3, 17, 33, 16),  # fewer heads than warps
        ("talking", 8, 3, 196, 48),
        ("talking", 5, 3, 70, 80),
        ("talking", 16, 2, 40, 35),  # more heads than the warps take at once
        ("re", 16, 4, 200, 24),  # eight warps
    ],
)
def test_shapes(kind, heads, queries, keys, dim, dtype, one_pass):
    out, reference, exact = run(*make_qkv(1, heads, queries, keys, dim, dtype), make_parts(kind, heads, dtype))
    assert one_pass[0] is not None and (one_pass[0].warps == 8) == (heads * keys > 3000)
    assert_as_accurate(out, reference, exact, name="out")


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 31), (33, 1), (16, 16), (3, 256)])
def test_token_counts(queries, keys, one_pass):
    qkv = make_qkv(2, 3, queries, keys, 16, torch.float16)
    out, reference, exact = run(*qkv, make_parts("re", 3, torch.float16))
    assert one_pass[0] is not None
    assert_as_accurate(out, reference, exact, name="out")


@HALF
@pytest.mark.parametrize("kind", ["re", "talking"])
@pytest.mark.parametrize("place", [0, 40], ids=["first", "last"])
def test_large_logits(kind, dtype, place):
    """Rows whose weight lies on one key; a key that no other comes near, so that other warps have nothing."""
    q, k, v = (x.contiguous() for x in make_qkv(1, 4, 7, 41, 16, dtype, size=8.0))
    k[:, :, place] = 6.0 * q[:, :, 3]
    out, reference, exact = run(q, k, v, make_parts(kind, 4, dtype))
    assert_as_accurate(out, reference, exact, name="out")


@HALF
def test_maps_that_are_nearly_uniform_before_a_norm(dtype, one_pass):
    """A BatchNorm with a small variance enlarges what the maps differ by."""
    heads, keys = 6, 50
    q, k, v = make_qkv(1, heads, 18, keys, 32, dtype, size=0.3)
    weight = (torch.eye(heads) + 0.2 * torch.randn(heads, heads)).to(dtype)
    bias, gamma, beta = ((0.5 * torch.randn(heads)).to(dtype) for _ in range(3))
    mean = (weight.double().sum(1) / keys + bias.double()).to(dtype)
    variance = torch.full((heads,), 1e-6).to(dtype)

    def reference(dtype):
        tensors = (x.to(dtype) for x in (mean, variance, gamma, beta))
        norm = BatchNorm(*tensors, use_batch_stats=False, eps=EPS)
        qkv = (x.to(dtype) for x in (q, k, v))
        return functional.re_attention(*qkv, weight.to(dtype), bias.to(dtype), norm, output_scale=0.5)

    settings = (None, None, weight, bias, gamma, beta, mean, variance, EPS, False, 0.5, False, None, 32**-0.5)
    with poisoned_empty():
        out = forward.head_mixed_attention_forward(q, k, v, *settings)
    assert one_pass[0] is not None
    assert_as_accurate(out, reference(dtype), reference(torch.float64), name="out")


@pytest.mark.parametrize("layout", ["columns_strided", "expanded", "odd_start"])
def test_layouts(layout, one_pass):
    wide = [torch.randn(2, 3, 19, 33) for _ in range(3)]
    if layout == "columns_strided":
        q, k, v = (x.half()[..., :32:2] for x in wide)
    elif layout == "odd_start":
        q, k, v = (x.half()[..., 1:17] for x in wide)
    else:
        q, k, v = (x.half()[:1, :1, :, :16].expand(2, 3, 19, 16) for x in wide)
    out, reference, exact = run(q, k, v, make_parts("re", 3, torch.float16))
    assert one_pass[0] is not None
    assert_as_accurate(out, reference, exact, name="out")


@HALF
@pytest.mark.parametrize(
    ("kind", "heads", "queries", "keys", "dim"), [("re", 5, 35, 18, 33), ("talking", 4, 70, 7, 16)]
)
def test_gradient_of_v(kind, heads, queries, keys, dim, dtype, monkeypatch):
    """Of a step that is not one operator, as with statistics of several processes."""
    taken = []
    weighted = tiles.weighted_rows
    monkeypatch.setattr(tiles, "weighted_rows", lambda *a, **o: taken.append(1) or weighted(*a, **o))
    monkeypatch.setattr(backward, "gluon_runs", lambda _: True)
    monkeypatch.setattr(backward, "shared_limit", lambda _: LIMIT)
    q, k, v = make_qkv(2, heads, queries, keys, dim, dtype)
    parts, grad = make_parts(kind, heads, dtype), torch.randn(2, heads, queries, dim).to(dtype)
    mixes = [parts[name] for name in NAMES]
    settings = (EPS, parts["layer_norm"], parts["output_scale"], False, None, dim**-0.5)
    with poisoned_empty():
        _, _, dv, *_ = backward.head_mixed_attention_backward(grad, q, k, v, *mixes, *settings)
    assert taken
    assert dv.transpose(1, 2).is_contiguous()
    reference, oracle = (
        with_gradients(q, k, v, parts, None, dim**-0.5, grad, each)["v"] for each in (dtype, torch.float64)
    )
    assert_as_accurate(dv, reference, oracle, name="v")


def test_a_call_that_does_not_fit_takes_two_passes(one_pass):
    out, reference, exact = run(*make_qkv(1, 3, 5, 257, 16, torch.float16), make_parts("re", 3, torch.float16))
    assert one_pass == [None]
    assert_as_accurate(out, reference, exact, name="out")
