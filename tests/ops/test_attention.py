"""``fastvit.ops.masked_attention`` on the CPU against the plain form; its C++ kernels have a file of their own."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastvit import autotune, backends
from fastvit.ops import OPERATORS, masked_attention
from fastvit.ops._operator import recording
from fastvit.ops.attention import Call, _masked_triton_reasons
from fastvit.reference import functional
from tests.helpers import assert_as_accurate, on_pooled_draws
from tests.ops import attention_checks
from tests.ops.attention_checks import backwards, outputs_and_gradients, packed

needs_cpp = pytest.mark.skipif(bool(backends.cpp_reasons()), reason="; ".join(backends.cpp_reasons()))


def check(tensors: list[Tensor], mask: Tensor | None = None, scale: float | None = None, backend: str = "auto") -> None:
    """Forward and every gradient; ``tensors`` is q, k, v and perhaps a bias."""
    attention_checks.check(functools.partial(masked_attention, backend=backend), tensors, mask, scale)


def check_where_gradients_cancel(tensors: list[Tensor]) -> None:
    """Of "sdpa", for rows with one weight of 1: there dS = P * (dP - sum(P * dP)) is the difference of equal numbers,
    exactly 0 in the plain form and rounding in SDPA's backward. So dq and dk are held to the size of what cancels."""
    q, k, v = tensors
    grad = torch.randn(q.shape)

    def fused(q, k, v):
        return masked_attention(q, k, v, backend="sdpa")

    got = outputs_and_gradients(fused, tensors, grad)
    same = outputs_and_gradients(functional.masked_attention, tensors, grad)
    other = outputs_and_gradients(functools.partial(backwards, mask=None, bias=None, scale=None), tensors, grad)
    exact = outputs_and_gradients(functional.masked_attention, [tensor.double() for tensor in tensors], grad)
    for name, index in (("out", 0), ("dv", 3)):
        assert_as_accurate(got[index], (same[index], other[index]), exact[index], name=name)
    cancelling = (grad.abs() @ v.abs().mT) * q.shape[-1] ** -0.5
    for index, terms in ((1, cancelling @ k.abs()), (2, cancelling.mT @ q.abs())):
        error, plain_error = ((tensors[index] - exact[index]).abs() for tensors in (got, same))
        assert (error <= 2 * plain_error.max() + 4 * torch.finfo(q.dtype).eps * terms).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("head_dim", [16, 33, 64])
def test_packed_qkv(head_dim, masked, dtype):
    mask = torch.rand(2, 37) > 0.3 if masked else None
    check(packed(2, 3, 37, head_dim, dtype), mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 9), (1, 9), (2, 1, 9, 9), (1, 3, 9, 9), (3, 9, 9), (2, 3, 1, 9), (9,)], ids=str)
def test_masks_of_every_broadcast_shape(shape, dtype):
    check(packed(2, 3, 9, 16, dtype), torch.rand(shape) > 0.4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(9, 9), (3, 9, 9), (2, 3, 9, 9), (2, 1, 1, 9), (1, 3, 9, 1)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_bias_and_its_gradient(shape, masked, dtype):
    bias = torch.randn(shape).to(dtype)
    check([*packed(2, 3, 9, 16, dtype), bias], torch.rand(2, 9) > 0.4 if masked else None)


def test_bias_of_another_dtype_is_taken():
    q, k, v = packed(1, 2, 5, 16, torch.bfloat16)
    bias = torch.randn(2, 5, 5)
    for backend in ("auto", "reference"):
        out = masked_attention(q, k, v, bias=bias, backend=backend)
        assert torch.equal(out, masked_attention(q, k, v, bias=bias.bfloat16(), backend=backend))


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 9), (9, 1), (4, 9)], ids=str)
def test_token_counts(queries, keys):
    tensors = [torch.randn(2, 3, queries, 16), torch.randn(2, 3, keys, 16), torch.randn(2, 3, keys, 16)]
    check(tensors)
    check(tensors, torch.rand(2, 1, queries, keys) > 0.3)
    if keys > 1:
        check(tensors, backend="sdpa")


def test_empty_sizes():
    for batch, queries in ((0, 5), (2, 0)):
        q, k, v = torch.randn(batch, 3, queries, 16), *torch.randn(2, batch, 3, 7, 16)
        assert masked_attention(q, k, v, torch.ones(batch, 7, dtype=torch.bool)).shape == q.shape
    no_keys = masked_attention(torch.randn(2, 3, 5, 16), *torch.randn(2, 2, 3, 0, 16))
    assert no_keys.eq(0).all()


def test_scale():
    check(packed(1, 2, 9, 16, torch.float32), scale=0.7)
    check(packed(1, 2, 9, 16, torch.float32), scale=0.0)


def test_large_logits():
    def checks() -> None:
        tensors = [tensor * 30 for tensor in packed(1, 2, 19, 16, torch.float32)]
        check_where_gradients_cancel(tensors)
        check(tensors, torch.rand(1, 19) > 0.3)

    # One key holds nearly all of a row's weight: the largest error is that of the few rows where two keys are close.
    on_pooled_draws(checks, draws=16)


@needs_cpp
def test_gradients_of_very_large_logits_are_those_of_our_kernel():
    """At logits of 2e5 the gradients of "sdpa" have lost all digits: it comes after the kernel that has them."""
    q, k, v = packed(1, 2, 19, 16, torch.float32)
    check([q * 200, k * 200, v])


def test_what_stands_at_masked_keys_has_no_influence():
    q, k, v = (tensor.clone() for tensor in packed(2, 3, 12, 16, torch.float32))
    mask, grad = torch.rand(2, 12) > 0.4, torch.randn(2, 3, 12, 16)
    hidden = ~mask[:, None, :, None].expand_as(k)

    def run(q, k, v):
        return outputs_and_gradients(lambda q, k, v: masked_attention(q, k, v, mask), [q, k, v], grad)

    before = run(q, k, v)
    k[hidden], v[hidden] = torch.nan, torch.inf
    assert all(map(torch.equal, run(q, k, v), before))


@pytest.mark.parametrize(
    "options", [{"mask": torch.ones(1, 5, dtype=torch.bool)}, {"bias": torch.zeros(5, 5)}], ids=str
)
def test_sdpa_takes_no_mask_and_no_bias(options):
    with pytest.raises(RuntimeError, match="backend 'sdpa' cannot run this call: it lets a NaN or inf at a masked key"):
        masked_attention(*packed(1, 2, 5, 16, torch.float32), **options, backend="sdpa")


@pytest.mark.parametrize("keys", [0, 1])
def test_sdpa_takes_no_single_key(keys):
    with pytest.raises(RuntimeError, match="with one key its gradients of q and k are rounding errors"):
        masked_attention(torch.randn(1, 2, 4, 8), *torch.randn(2, 1, 2, keys, 8), backend="sdpa")


def test_a_scale_of_zero_is_not_left_to_sdpa():
    q, k, v = torch.randn(3, 2, 1, 16, 128, dtype=torch.float64)
    torch.testing.assert_close(masked_attention(q, k, v, scale=0.0), v.mean(2, keepdim=True).expand_as(v))
    with pytest.raises(RuntimeError, match="at a scale of zero it may give NaN"):
        masked_attention(q, k, v, scale=0.0, backend="sdpa")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("keys", [5, 40])
def test_sdpa_loses_no_nan(keys, dtype):
    """PyTorch's kernels for the CPU make zeros of rows whose logits are all NaN or -inf."""
    given = torch.randn(2, 1, 3, keys, 8).to(dtype)
    q = torch.randn(1, 3, 4, 8).to(dtype)
    q[0, 0, 1, 0] = torch.nan
    given[0, 0, 1, :, 0] = torch.nan
    q[0, 2], given[0, 0, 2] = 1.0, -torch.inf
    grad = torch.randn(q.shape).to(dtype)
    got, plain = (
        outputs_and_gradients(form, [q, *given], grad)
        for form in (functools.partial(masked_attention, backend="sdpa"), functional.masked_attention)
    )
    for mine, expected in zip(got, plain, strict=True):
        assert torch.equal(mine.isfinite(), expected.isfinite())


def test_no_mask_calls_sdpa_with_the_views_it_was_given(monkeypatch):
    """Nothing is copied on the way, and merging the heads of the result is a view."""
    calls = []
    real = F.scaled_dot_product_attention

    def spy(*args, **kwargs):
        calls.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    q, k, v = packed(2, 3, 17, 16, torch.float32)
    out = masked_attention(q, k, v, backend="sdpa")
    (call,) = calls
    assert all(given is taken for given, taken in zip((q, k, v), call[:3], strict=True))
    merged = out.transpose(1, 2).reshape(2, 17, 48)
    assert merged.data_ptr() == out.data_ptr()


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_dropout_keeps_the_mean_and_drops_the_share(backend):
    """With v the identity the output is the dropped map itself."""
    q, k = torch.zeros(64, 4, 32, 32), torch.zeros(64, 4, 32, 32)
    v = torch.eye(32).expand(64, 4, 32, 32)
    out = masked_attention(q, k, v, dropout_p=0.25, backend=backend)
    weights = out.numel()
    dropped = out.eq(0).float().mean().item()
    assert abs(dropped - 0.25) < 5 * (0.25 * 0.75 / weights) ** 0.5
    torch.testing.assert_close(out[out != 0], torch.full_like(out[out != 0], 1 / 32 / 0.75))
    assert not torch.equal(out, masked_attention(q, k, v, dropout_p=0.25, backend=backend))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_autocast(backend):
    q, k, v = packed(2, 3, 9, 16, torch.float32)
    mask, bias = torch.rand(2, 9) > 0.3, torch.randn(3, 9, 9)
    with torch.autocast("cpu", torch.bfloat16):
        out = masked_attention(q, k.bfloat16(), v, mask, bias, backend=backend)
    assert out.dtype == torch.bfloat16
    low = [tensor.bfloat16() for tensor in (q, k, v)]
    plain = functional.masked_attention(*low, mask, bias.bfloat16())
    assert_as_accurate(out, plain, functional.masked_attention(*(t.double() for t in low), mask, bias.double()))


def test_compiles_without_graph_breaks_for_changing_sizes():
    def loss(q, k, v, mask, bias):
        plain = masked_attention(q, k, v)
        return (plain * masked_attention(plain, k, v, mask) * masked_attention(q, k, v, mask, bias)).sum()

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, tokens in ((2, 9), (3, 14)):
        tensors = [tensor.detach().requires_grad_() for tensor in packed(batch, 2, tokens, 16, torch.float32)]
        others = torch.rand(batch, tokens) > 0.3, torch.randn(2, tokens, tokens)
        got = torch.autograd.grad(compiled(*tensors, *others), tensors)
        torch.testing.assert_close(got, torch.autograd.grad(loss(*tensors, *others), tensors))


def test_export_takes_the_reference():
    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return masked_attention(q, k, v)

    program = torch.export.export(Model(), tuple(packed(1, 2, 5, 16, torch.float32)))
    targets = {str(node.target) for node in program.graph.nodes}
    assert "aten.softmax.int" in targets
    assert not any("scaled_dot_product" in target or "fastvit" in target for target in targets)


def test_reference_gradients():
    torch.manual_seed(0)
    q, k, v = (tensor.requires_grad_() for tensor in torch.randn(3, 1, 2, 4, 3, dtype=torch.float64))
    bias = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(1, 1, 4, 4) > 0.3
    mask[..., 2, :] = False

    def function(q, k, v, bias):
        return masked_attention(q, k, v, mask, bias, backend="reference")

    assert torch.autograd.gradcheck(function, (q, k, v, bias))


def test_backends_by_name():
    names = [implementation.name for implementation in OPERATORS["masked_attention"].implementations]
    assert names == ["cpp", "triton", "sdpa", "reference"]
    q, k, v = packed(1, 2, 5, 16, torch.float32)
    with pytest.raises(RuntimeError, match="triton"):
        masked_attention(q, k, v, backend="triton")
    with pytest.raises(ValueError, match="backend: .*'sdpa'"):
        masked_attention(q, k, v, backend="flash")


def test_more_heads_than_a_grid_takes_are_a_reason():
    call = Call(*torch.empty(3, 1, 70_000, 1, 8).unbind(), None, None, None, 0.0)
    assert "70000 heads are more than a grid of programs takes, 65535" in list(_masked_triton_reasons(call, True))


def test_without_a_mask_the_librarys_kernels_come_first_on_a_gpu(monkeypatch):
    """Ours is not predicted to beat them (benchmarks/results/README.md)."""
    monkeypatch.setattr(backends, "UNPROVEN", True)
    monkeypatch.setattr(backends, "triton_reasons", lambda device: [])
    seen = []
    with FakeTensorMode(), recording(seen.append), autotune.unmeasured(), torch.no_grad():
        q, k, v = torch.empty(3, 64, 6, 197, 64, device="cuda", dtype=torch.bfloat16).unbind()
        mask = torch.empty(64, 197, device="cuda", dtype=torch.bool)
        masked_attention(q, k, v)
        masked_attention(q, k, v, mask)
    assert [choice.backend for choice in seen] == ["sdpa", "triton"]


def test_fake_of_the_operator_has_the_strides_of_the_kernel():
    q, k, v = (tensor.to("meta") for tensor in packed(2, 3, 17, 16, torch.float32))
    out = torch.ops.fastvit.masked_attention_cpp(q, k, v, None, None, 0.25)
    assert out.shape == q.shape
    assert out.transpose(1, 2).is_contiguous()
