"""``fastvit.ops.masked_attention`` on the CPU: every implementation against the reference in float64."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_as_accurate, poisoned_empty
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastvit import backends
from fastvit.ops import _attention, _dispatch, masked_attention
from fastvit.ops._attention import CPP_DTYPES
from fastvit.ops.masked_attention import IMPLEMENTATIONS
from fastvit.reference import functional

needs_cpp = pytest.mark.skipif(bool(backends.cpp_reasons()), reason="; ".join(backends.cpp_reasons()))

CPU_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]


def packed(batch: int, heads: int, tokens: int, head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v as the views of a packed projection (B, N, 3, H, D)."""
    qkv = torch.randn(batch, tokens, 3, heads, head_dim).to(dtype)
    return list(qkv.permute(2, 0, 3, 1, 4).unbind(0))


def outputs_and_gradients(function, tensors: list[Tensor], grad: Tensor) -> list[Tensor]:
    """The output and the gradient of every tensor under ``grad``."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def check(tensors: list[Tensor], mask: Tensor | None = None, scale: float | None = None, backend: str = "auto") -> None:
    """Forward and every gradient, and the C++ forward; ``tensors`` is q, k, v and perhaps a bias."""
    if tensors[0].dtype in CPP_DTYPES and not backends.cpp_reasons():
        check_cpp(tensors, mask, scale)

    def fused(q, k, v, bias=None):
        return masked_attention(q, k, v, mask, bias, scale, backend=backend)

    def plain(q, k, v, bias=None):
        return functional.masked_attention(q, k, v, mask, bias, scale)

    grad = torch.randn(tensors[0].shape)
    got = outputs_and_gradients(fused, tensors, grad)
    same = outputs_and_gradients(plain, tensors, grad)
    exact = outputs_and_gradients(plain, [tensor.double() for tensor in tensors], grad.to(tensors[0].dtype))
    # In float64 the oracle is no better than what it judges, so the errors of both count.
    ulps = 16.0 if tensors[0].dtype == torch.float64 else 4.0
    for name, *three in zip(("out", "dq", "dk", "dv", "dbias"), got, same, exact, strict=False):
        assert_as_accurate(*three, ulps=ulps, name=name)


def check_cpp(tensors: list[Tensor], mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """The C++ kernel's forward; returns its result."""
    with torch.no_grad(), poisoned_empty():
        got = masked_attention(*tensors[:3], mask, *tensors[3:], scale=scale, backend="cpp")
    plain = functional.masked_attention(*tensors[:3], mask, *tensors[3:], scale=scale)
    wide = [tensor.double() for tensor in tensors]
    exact = functional.masked_attention(*wide[:3], mask, *wide[3:], scale=scale)
    assert_as_accurate(got, plain, exact)
    return got


def check_where_gradients_cancel(tensors: list[Tensor], mask: Tensor | None = None) -> None:
    """For rows with one weight of 1: there dS = P * (dP - sum(P * dP)) is the difference of equal numbers, exactly 0 in
    the reference and rounding in every tiled backward. So dq and dk are held to the size of what cancels."""
    q, k, v = tensors
    if not backends.cpp_reasons():
        check_cpp(tensors, mask)
    grad = torch.randn(q.shape)

    def fused(q, k, v):
        return masked_attention(q, k, v, mask)

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


# --- The C++ kernel -------------------------------------------------------------------------------------------------


@needs_cpp
@pytest.mark.parametrize("dtype", CPP_DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [1, 2, 7, 16, 31, 33, 48, 64, 127, 128])
def test_cpp_head_dimensions(isa, head_dim, dtype):
    check_cpp(packed(1, 3, 37, head_dim, dtype))


@needs_cpp
@pytest.mark.parametrize("dtype", CPP_DTYPES, ids=str)
@pytest.mark.parametrize(
    "tokens", [(1, 1), (1, 50), (4, 197), (50, 1), (15, 16), (33, 12), (65, 129), (20, 512), (34, 513), (5, 1600)]
)
def test_cpp_token_counts(isa, tokens, dtype):
    """512 keys are one block of the kernel's, 513 and 1600 are several."""
    queries, keys = tokens
    q, k, v = packed(2, 3, max(tokens), 24, dtype)
    tensors = [q[:, :, :queries], k[:, :, :keys], v[:, :, :keys]]
    check_cpp(tensors)
    for shape in ((2, keys), (2, 1, queries, keys), (1, 3, queries, keys), (2, 3, 1, keys), (3, queries, 1)):
        check_cpp(tensors, torch.rand(shape) > 0.3)


@needs_cpp
@pytest.mark.parametrize("dtype", CPP_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 12, 197, 64), (1, 3, 577, 64), (1, 2, 1025, 48)], ids=str)
def test_cpp_sizes_of_the_models(shape, dtype):
    batch, heads, tokens, head_dim = shape
    for seed in range(3):
        torch.manual_seed(seed)
        check_cpp(packed(batch, heads, tokens, head_dim, dtype))


@needs_cpp
@pytest.mark.parametrize("dtype", CPP_DTYPES, ids=str)
@pytest.mark.parametrize("keys", [30, 1100])
def test_cpp_rows_without_keys_are_exactly_zero(isa, keys, dtype):
    q, k, v = packed(3, 4, keys, 16, dtype)
    tensors = [q[:, :, :20], k, v]
    padding = torch.ones(3, keys, dtype=torch.bool)
    padding[1] = False
    got = check_cpp(tensors, padding)
    assert got[1].eq(0).all() and got[0].ne(0).any() and got[2].ne(0).any()
    mask = torch.rand(3, 4, 20, keys) > 0.5
    mask[:, :, 5] = False
    mask[:, :, 7, : keys - 1] = False  # a key in the last block only, in the row's own mask
    mask[:, :, 7, keys - 1] = True
    mask[:, :, 8, 1:] = False  # and one in the first only
    mask[:, :, 8, 0] = True
    mask[0, 1] = False
    got = check_cpp(tensors, mask)
    assert got[:, :, 5].eq(0).all() and got[0, 1].eq(0).all()
    torch.testing.assert_close(got[2, :, 7], v[2, :, keys - 1])
    torch.testing.assert_close(got[2, :, 8], v[2, :, 0])


@needs_cpp
def test_cpp_masked_keys_do_not_reach_the_result(isa):
    q, k, v = (tensor.clone() for tensor in packed(2, 4, 30, 16, torch.float32))
    mask = torch.rand(2, 30) > 0.5
    before = check_cpp([q, k, v], mask)
    hidden = ~mask[:, None, :, None].expand_as(k)
    k[hidden], v[hidden] = torch.nan, torch.inf
    with torch.no_grad():
        assert torch.equal(masked_attention(q, k, v, mask, backend="cpp"), before)


@needs_cpp
@pytest.mark.parametrize("dtype", CPP_DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [40, 1100])
def test_cpp_large_logits(isa, tokens, dtype):
    q, k, v = packed(1, 2, tokens, 32, dtype)
    q = q[:, :, :40]
    far_up, far_down = q.clone(), q.clone()
    far_up[..., 0], far_down[..., 0], k[..., 0] = 30.0, -30.0, 30.0  # logits of about 160 and -160
    rising = k * torch.linspace(0.1, 10, tokens)[:, None].to(dtype)  # the largest logit comes late
    for left, right in ((10.0 * q, k), (far_up, k), (far_down, k), (q, rising), (q, rising.flip(2))):
        check_cpp([left, right, v])


@needs_cpp
def test_cpp_nan_and_infinity_stay_where_the_reference_has_them(isa):
    q, k, v = (tensor.clone() for tensor in packed(2, 4, 20, 16, torch.float32))
    q[0, 1, 3, 5] = torch.nan
    q[1, 2, 4, 0] = torch.inf
    check_cpp([q, k, v])


@needs_cpp
def test_cpp_scratch_of_an_earlier_call_does_not_leak(isa):
    for dtype in CPP_DTYPES:
        q, k, v = packed(2, 4, 29, 18, dtype)
        poison = [torch.full_like(tensor, torch.nan) for tensor in (q, k, v)]
        with torch.no_grad():
            assert masked_attention(*poison, backend="cpp").isnan().all()
        check_cpp([q, k, v])
        check_cpp([q, k, v], torch.rand(2, 1, 29, 29) > 0.5)


@needs_cpp
@pytest.mark.parametrize("batch", [1, 3])
def test_cpp_thread_counts_agree(isa, batch):
    """Up to eight threads on one head: more than two share what one of them packed."""
    tensors = packed(batch, 1, 600, 32, torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 8):
            torch.set_num_threads(count)
            results.append(masked_attention(*tensors, backend="cpp"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


@needs_cpp
@pytest.mark.parametrize("shape", [(0, 4, 5, 6, 8), (2, 4, 0, 6, 8), (2, 4, 5, 0, 8), (2, 0, 5, 6, 8), (2, 4, 5, 6, 0)])
@pytest.mark.parametrize("masked", [False, True])
def test_cpp_empty_sizes(shape, masked):
    batch, heads, queries, keys, head_dim = shape
    q, k, v = torch.randn(batch, heads, queries, head_dim), *torch.randn(2, batch, heads, keys, head_dim)
    mask = torch.ones(batch, 1, queries, keys, dtype=torch.bool) if masked else None
    with poisoned_empty():
        got = masked_attention(q, k, v, mask, scale=1.0, backend="cpp")
    assert got.shape == q.shape and got.eq(0).all()


@needs_cpp
def test_cpp_strides():
    tensors = packed(2, 4, 21, 18, torch.float32)
    assert check_cpp(tensors).transpose(1, 2).is_contiguous()
    for change in (
        Tensor.contiguous,
        lambda tensor: tensor.mT.contiguous().mT,
        lambda tensor: tensor[:1].expand_as(tensor),
        lambda tensor: tensor.repeat_interleave(2, 2)[:, :, ::2],
    ):
        check_cpp([change(tensor) for tensor in tensors])
    mask = (torch.rand(2, 21, 42) > 0.5)[:, None, :, ::2]
    check_cpp(tensors, mask)
    check_cpp(tensors, mask.mT)
    check_cpp(tensors, mask[:, 0, 0].t().contiguous().t())


@needs_cpp
def test_cpp_autocast():
    q, k, v = packed(2, 3, 9, 16, torch.float32)
    mask = torch.rand(2, 9) > 0.3
    with torch.autocast("cpu", torch.bfloat16):
        out = masked_attention(q, k.bfloat16(), v, mask, backend="cpp")
    low = [tensor.bfloat16() for tensor in (q, k, v)]
    exact = functional.masked_attention(*(tensor.double() for tensor in low), mask)
    assert_as_accurate(out, functional.masked_attention(*low, mask), exact)


@needs_cpp
@pytest.mark.parametrize("masked", [False, True])
def test_cpp_opcheck(masked):
    q, k, v = packed(2, 4, 9, 8, torch.float32)
    mask = torch.rand(2, 1, 9, 9) > 0.5 if masked else None
    torch.library.opcheck(torch.ops.fastvit.masked_attention_cpp.default, (q, k, v, mask, None, 0.25))


@needs_cpp
def test_cpp_compiles_in_one_graph_for_any_batch_and_length():
    torch._dynamo.reset()
    compiled = torch.compile(masked_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, tokens in ((2, 9), (3, 20)):
        tensors, mask = packed(batch, 4, tokens, 8, torch.float32), torch.rand(batch, tokens) > 0.3
        with torch.no_grad():
            assert torch.equal(compiled(*tensors, mask), masked_attention(*tensors, mask, backend="cpp"))
    torch._dynamo.reset()


@needs_cpp
def test_cpp_tells_its_reasons():
    q, k, v = packed(1, 4, 9, 8, torch.float32)

    def refused(match, *tensors, **options):
        with pytest.raises(RuntimeError, match=match):
            masked_attention(*tensors, **options, backend="cpp")
        assert masked_attention(*tensors, **options).shape == tensors[0].shape  # SDPA takes it

    refused("dropout", q, k, v, dropout_p=0.5)
    refused("float64", q.double(), k.double(), v.double())
    refused("head dimension 129", *packed(1, 2, 2, 129, torch.float32))
    refused("gradients are needed", q.detach().requires_grad_(), k, v)
    refused("on meta", *(tensor.to("meta") for tensor in (q, k, v)))


@needs_cpp
def test_sdpa_goes_first_where_it_is_faster(monkeypatch):
    def chosen(queries, dtype):
        seen = []
        q, k, v = packed(1, 2, 40, 16, dtype)
        with _dispatch.recording(seen.append):
            masked_attention(q[:, :, :queries], k, v)
        return seen[0].backend

    monkeypatch.setattr(_attention, "VECTORISED", True)
    assert [chosen(queries, torch.float32) for queries in (1, 8, 9, 40)] == ["cpp"] * 4
    monkeypatch.setattr(_attention, "VECTORISED", False)
    assert chosen(40, torch.float32) == chosen(40, torch.bfloat16) == "sdpa"


LOW_LEVEL_BAD = {
    "q must be float32 or bfloat16": {"q": lambda tensor: tensor.double()},
    r"q and k must be \(B, H, N, D\)": {"q": lambda tensor: tensor[0]},
    "k has shape": {"k": lambda tensor: tensor[:, :3]},
    "v is bfloat16, q is float32": {"v": lambda tensor: tensor.bfloat16()},
    "k must have a contiguous last axis": {"k": lambda tensor: tensor.mT.contiguous().mT},
    "head dimensions up to 128": {name: lambda _: torch.ones(1, 1, 2, 129) for name in "qkv"},
    "mask must be bool": {"mask": lambda _: torch.ones(1, 1, 1, 9)},
    "mask has shape": {"mask": lambda _: torch.ones(1, 1, 8, 9, dtype=torch.bool)},
}


@needs_cpp
@pytest.mark.parametrize("message", LOW_LEVEL_BAD)
def test_cpp_operator_checks_for_itself(message):
    q, k, v = packed(1, 4, 9, 8, torch.float32)
    arguments = {"q": q, "k": k, "v": v, "mask": None, "bias": None, "scale": 1.0}
    for name, change in LOW_LEVEL_BAD[message].items():
        arguments[name] = change(arguments[name])
    with pytest.raises(RuntimeError, match=f"masked_attention_cpp: {message}"):
        torch.ops.fastvit.masked_attention_cpp(**arguments)
