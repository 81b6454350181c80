"""``fastvit.ops.masked_attention`` on the CPU against the reference; its C++ kernels have a file of their own."""

from __future__ import annotations

import functools
from typing import NamedTuple

import attention_checks
import pytest
import torch
import torch.nn.functional as F
from attention_checks import outputs_and_gradients, packed
from helpers import assert_as_accurate
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastvit import backends
from fastvit.ops import masked_attention
from fastvit.ops.masked_attention import IMPLEMENTATIONS
from fastvit.reference import functional

needs_cpp = pytest.mark.skipif(bool(backends.cpp_reasons()), reason="; ".join(backends.cpp_reasons()))

CPU_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]


def check(tensors: list[Tensor], mask: Tensor | None = None, scale: float | None = None, backend: str = "auto") -> None:
    """Forward and every gradient; ``tensors`` is q, k, v and perhaps a bias."""
    attention_checks.check(functools.partial(masked_attention, backend=backend), tensors, mask, scale)


def check_where_gradients_cancel(tensors: list[Tensor], mask: Tensor | None = None) -> None:
    """For rows with one weight of 1: there dS = P * (dP - sum(P * dP)) is the difference of equal numbers, exactly 0 in
    the reference and rounding in SDPA's backward. So its dq and dk are held to the size of what cancels."""
    q, k, v = tensors
    grad = torch.randn(q.shape)

    def fused(q, k, v):
        return masked_attention(q, k, v, mask, backend="sdpa")

    def plain(q, k, v):
        return functional.masked_attention(q, k, v, mask)

    got = outputs_and_gradients(fused, tensors, grad)
    same = outputs_and_gradients(plain, tensors, grad)
    exact = outputs_and_gradients(plain, [tensor.double() for tensor in tensors], grad)
    for name, index in (("out", 0), ("dv", 3)):
        assert_as_accurate(got[index], same[index], exact[index], name=name)
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
    for backend in ("sdpa", "reference"):
        out = masked_attention(q, k, v, bias=bias, backend=backend)
        assert torch.equal(out, masked_attention(q, k, v, bias=bias.bfloat16(), backend=backend))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", CPU_BACKENDS, ids=lambda backend: backend.name.lower())
@pytest.mark.parametrize("tokens", [7, 600])
def test_rows_without_keys_are_exactly_zero_both_ways(tokens, backend, dtype):
    """SDPA does this by itself on the CPU; 600 keys are more than one of its blocks."""
    q, k, v = (tensor.requires_grad_() for tensor in packed(2, 2, tokens, 16, dtype))
    mask = torch.rand(2, 2, tokens, tokens) > 0.4
    mask[1, 0, 3] = False
    mask[0] = False
    mask[1, 1, :, : tokens - 2] = False  # keys only in the last block
    bias = torch.zeros(2, 2, tokens, tokens, dtype=dtype).masked_fill_(~mask, float("-inf"))
    empty = ~mask.any(-1)
    for arguments in ({"mask": mask}, {"bias": bias}, {"mask": mask, "bias": bias}):
        with sdpa_kernel(backend):
            out = masked_attention(q, k, v, **arguments, backend="sdpa")
        dq, dk, dv = torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
        assert out[empty].eq(0).all()
        assert dq[empty].eq(0).all()
        assert dk[0].eq(0).all()
        assert dv[0].eq(0).all()
        assert all(tensor.isfinite().all() for tensor in (out, dq, dk, dv))
        exact = functional.masked_attention(q.double(), k.double(), v.double(), mask)
        ulps = 16.0 if dtype == torch.float64 else 4.0
        assert_as_accurate(out, functional.masked_attention(q, k, v, mask), exact, ulps=ulps)


class Elsewhere(Tensor):
    """A CPU tensor that claims another device."""

    class Device(NamedTuple):
        type: str = "elsewhere"

    device = Device()


def test_other_devices_get_zero_rows_whatever_sdpa_makes_of_them(monkeypatch):
    """Off the CPU no row without keys may reach SDPA: one that gives NaN for them, forward and backward, shows it."""

    def brittle(q, k, v, allowed, dropout_p, scale):
        q, k, v, allowed = (tensor.as_subclass(Tensor) for tensor in (q, k, v, allowed))
        if allowed.dtype == torch.bool:
            allowed = torch.zeros(allowed.shape).masked_fill(~allowed, float("-inf"))
        return ((q * q.shape[-1] ** -0.5) @ k.mT + allowed).softmax(-1) @ v

    mask = torch.rand(2, 1, 5, 5) > 0.3
    mask[0, 0, 2] = False
    bias = torch.randn(1, 2, 5, 5)
    bias[..., 4, :] = float("-inf")
    for m, b in ((mask, None), (None, bias), (mask, bias)):

        def elsewhere(q, k, v, m=m, b=b):
            with monkeypatch.context() as patch:
                patch.setattr(F, "scaled_dot_product_attention", brittle)
                moved = (None if t is None else t.as_subclass(Elsewhere) for t in (q, k, v, m, b))
                return masked_attention(*moved, backend="sdpa")

        def plain(q, k, v, m=m, b=b):
            return functional.masked_attention(q, k, v, m, b)

        tensors = packed(2, 2, 5, 16, torch.float32)
        grad = torch.randn(2, 2, 5, 16)
        for got, expected in zip(
            outputs_and_gradients(elsewhere, tensors, grad), outputs_and_gradients(plain, tensors, grad), strict=True
        ):
            torch.testing.assert_close(got.as_subclass(Tensor), expected)


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 9), (9, 1), (4, 9)], ids=str)
def test_token_counts(queries, keys):
    tensors = [torch.randn(2, 3, queries, 16), torch.randn(2, 3, keys, 16), torch.randn(2, 3, keys, 16)]
    mask = torch.rand(2, 1, queries, keys) > 0.3
    compare = check if keys > 1 else check_where_gradients_cancel
    compare(tensors)
    compare(tensors, mask)


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
    q, k, v = (tensor * 30 for tensor in packed(1, 2, 19, 16, torch.float32))
    check_where_gradients_cancel([q, k, v], torch.rand(1, 19) > 0.3)


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


def test_key_padding_is_not_written_out_in_full(monkeypatch):
    shapes = []
    real = F.scaled_dot_product_attention

    def spy(q, k, v, mask, *args, **kwargs):
        shapes.append((tuple(mask.shape), mask.untyped_storage().nbytes()))
        return real(q, k, v, mask, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    masked_attention(*packed(2, 3, 17, 16, torch.float32), torch.rand(2, 17) > 0.3, backend="sdpa")
    assert shapes == [((2, 1, 1, 17), 2 * 17)]


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


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
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
    assert [implementation.name for implementation in IMPLEMENTATIONS] == ["cpp", "sdpa", "triton", "reference"]
    q, k, v = packed(1, 2, 5, 16, torch.float32)
    with pytest.raises(RuntimeError, match="triton"):
        masked_attention(q, k, v, backend="triton")
    with pytest.raises(ValueError, match="backend: .*'sdpa'"):
        masked_attention(q, k, v, backend="flash")


def test_fake_of_the_operator_has_the_strides_of_the_kernel():
    q, k, v = (tensor.to("meta") for tensor in packed(2, 3, 17, 16, torch.float32))
    out = torch.ops.fastvit.masked_attention_cpp(q, k, v, None, None, 0.25)
    assert out.shape == q.shape
    assert out.transpose(1, 2).is_contiguous()


BAD = [
    ({"q": torch.randn(2, 3, 5)}, r"q: got \(2, 3, 5\)"),
    ({"q": torch.ones(2, 3, 5, 16, dtype=torch.int64)}, "q: .* accepted is a floating"),
    ({"k": torch.randn(2, 3, 7, 8)}, r"k: got \(2, 3, 7, 8\)"),
    ({"k": torch.randn(1, 3, 7, 16)}, "k: got"),
    ({"v": torch.randn(2, 3, 6, 16)}, "v: got"),
    ({"v": torch.randn(2, 3, 7, 16, dtype=torch.float64)}, "v: got .*float64"),
    ({"k": torch.randn(2, 3, 7, 16, device="meta")}, "k: got .*meta"),
    ({"mask": torch.ones(2, 7)}, "mask: got .*accepted is bool"),
    ({"mask": torch.ones(5, 7, dtype=torch.bool)}, "mask: got .*key padding"),
    ({"mask": torch.ones(2, 6, dtype=torch.bool)}, "mask: got .*broadcastable"),
    ({"mask": torch.ones(1, 1, 1, 5, 7, dtype=torch.bool)}, "mask: got .*broadcastable"),
    ({"mask": torch.ones(2, 7, dtype=torch.bool, device="meta")}, "mask: got .*meta"),
    ({"bias": torch.ones(5, 7, dtype=torch.bool)}, "bias: got .*pass bool masks as mask"),
    ({"bias": torch.ones(5, 6)}, "bias: got .*broadcastable"),
    ({"dropout_p": 1.5}, "dropout_p: got 1.5"),
    ({"dropout_p": -0.1}, "dropout_p: got -0.1"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD)
def test_bad_input_is_named(wrong, message):
    good = {"q": torch.randn(2, 3, 5, 16), "k": torch.randn(2, 3, 7, 16), "v": torch.randn(2, 3, 7, 16)}
    with pytest.raises(ValueError, match=message):
        masked_attention(**{**good, **wrong})
