"""The C++ kernels of ``fastvit.ops.masked_attention``, forward and backward, against the reference in float64."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fastvit import backends
from fastvit.ops import class_attention, masked_attention
from fastvit.ops.attention import CPP_BACKWARD_DTYPES, CPP_DTYPES
from fastvit.reference import functional
from tests.helpers import assert_as_accurate, poisoned_empty
from tests.ops import attention_checks
from tests.ops.attention_checks import packed

pytestmark = pytest.mark.skipif(bool(backends.cpp_reasons()), reason="; ".join(backends.cpp_reasons()))

cpp = functools.partial(masked_attention, backend="cpp")
check = functools.partial(attention_checks.check, cpp, only_forward=[torch.float16])


@pytest.mark.parametrize("dtype", CPP_DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [1, 7, 16, 33, 48, 128])
def test_head_dimensions(isa, head_dim, dtype):
    check(packed(1, 3, 37, head_dim, dtype))


@pytest.mark.parametrize("dtype", CPP_DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [(1, 1), (4, 197), (50, 1), (15, 16), (65, 129), (34, 513), (12, 1600)])
def test_token_counts(isa, tokens, dtype):
    """512 keys are one block of the forward's, 513 and 1600 are several; 256 and 1536 are limits of the backward's."""
    queries, keys = tokens
    q, k, v = packed(2, 2, max(tokens), 24, dtype)
    tensors = [q[:, :, :queries], k[:, :, :keys], v[:, :, :keys]]
    check(tensors)
    for shape in ((2, keys), (2, 1, queries, keys)):
        check(tensors, torch.rand(shape) > 0.3)


@pytest.mark.parametrize("dtype", CPP_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 6, 197, 64), (1, 2, 577, 64), (1, 1, 1025, 48)], ids=str)
def test_sizes_of_the_models(shape, dtype):
    batch, heads, tokens, head_dim = shape
    check(packed(batch, heads, tokens, head_dim, dtype))


@pytest.mark.parametrize("dtype", CPP_DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 37, 70), (1, 3, 37, 70), (2, 1, 37, 70), (2, 3, 37, 70), (2, 3, 1, 70), (1, 1, 1, 70), (1, 3, 37, 1)],
    ids=str,
)
def test_bias_of_every_broadcast_shape(isa, shape, dtype):
    q, k, v = packed(2, 3, 70, 24, dtype)
    tensors = [q[:, :, :37], k, v, torch.randn(shape).to(dtype)]
    check(tensors)
    check(tensors, torch.rand(2, 70) > 0.3)
    check(tensors, torch.rand(2, 1, 37, 70) > 0.3)


@pytest.mark.parametrize("shape", [(1, 1, 40, 40), (1, 2, 1, 40)], ids=str)
def test_bias_gradient_over_a_long_batch(isa, shape):
    check([*packed(150, 2, 40, 8, torch.float32), torch.randn(shape)])


def test_bias_that_masks(isa):
    """-inf masks a key; a row of it gives zeros, and zero gradients."""
    tensors = packed(8, 3, 40, 16, torch.float32)
    bias = torch.randn(8, 3, 40, 40).masked_fill_(torch.rand(8, 3, 40, 40) > 0.5, -torch.inf)
    bias[:, :, 5] = -torch.inf
    out, dq, _, _, dbias = check([*tensors, bias])
    assert out[:, :, 5].eq(0).all() and dq[:, :, 5].eq(0).all() and dbias[bias == -torch.inf].eq(0).all()


@pytest.mark.parametrize("dtype", CPP_BACKWARD_DTYPES, ids=str)
@pytest.mark.parametrize("keys", [30, 1100])
def test_rows_without_keys_are_exactly_zero(isa, keys, dtype):
    q, k, v = packed(3, 4, keys, 16, dtype)
    tensors = [q[:, :, :20], k, v]
    padding = torch.ones(3, keys, dtype=torch.bool)
    padding[1] = False
    got = check(tensors, padding)
    assert all(tensor[1].eq(0).all() and tensor[0].ne(0).any() and tensor[2].ne(0).any() for tensor in got)
    mask = torch.rand(3, 4, 20, keys) > 0.5
    mask[:, :, 5] = False
    mask[:, :, 7, : keys - 1] = False  # a key in the last block only, in the row's own mask
    mask[:, :, 7, keys - 1] = True
    mask[:, :, 8, 1:] = False  # and one in the first only
    mask[:, :, 8, 0] = True
    mask[0, 1] = False
    out, dq, dk, dv = check(tensors, mask)
    for tensor in (out, dq):
        assert tensor[:, :, 5].eq(0).all() and tensor[0, 1].eq(0).all()
    assert dk[0, 1].eq(0).all() and dv[0, 1].eq(0).all()
    torch.testing.assert_close(out[2, :, 7], v[2, :, keys - 1])
    torch.testing.assert_close(out[2, :, 8], v[2, :, 0])


def test_masked_keys_do_not_reach_the_result(isa):
    q, k, v = (tensor.clone() for tensor in packed(2, 4, 30, 16, torch.float32))
    mask, grad = torch.rand(2, 30) > 0.5, torch.randn(2, 4, 30, 16)
    before = check([q, k, v], mask, grad=grad)
    hidden = ~mask[:, None, :, None].expand_as(k)
    k[hidden], v[hidden] = torch.nan, torch.inf
    after = attention_checks.outputs_and_gradients(lambda q, k, v: cpp(q, k, v, mask), [q, k, v], grad)
    assert all(map(torch.equal, after, before))


@pytest.mark.parametrize("dtype", CPP_DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [40, 1100])
def test_large_logits(isa, tokens, dtype):
    """Rows of one weight of 1 among them, where dS is the difference of equal numbers."""
    q, k, v = packed(1, 2, tokens, 32, dtype)
    q = q[:, :, :40]
    far_up, far_down = q.clone(), q.clone()
    far_up[..., 0], far_down[..., 0], k[..., 0] = 30.0, -30.0, 30.0  # logits of about 160 and -160
    rising = k * torch.linspace(0.1, 10, tokens)[:, None].to(dtype)  # the largest logit comes late
    for left, right in ((10.0 * q, k), (far_up, k), (far_down, k), (q, rising), (q, rising.flip(2))):
        check([left, right, v])


@pytest.mark.parametrize("queries", [3, 20])
def test_nan_and_infinity_stay_where_the_reference_has_them(isa, queries):
    q, k, v = (tensor.clone() for tensor in packed(2, 4, 20, 16, torch.float32))
    q[0, 1, 2, 5] = torch.nan
    q[1, 2, 1, 0] = torch.inf
    check([q[:, :, :queries], k, v])


def test_scratch_of_an_earlier_call_does_not_leak(isa):
    for dtype in CPP_BACKWARD_DTYPES:
        for queries in (4, 29):
            q, k, v = packed(2, 4, 29, 18, dtype)
            q = q[:, :, :queries]
            poison = [torch.full_like(tensor, torch.nan).requires_grad_() for tensor in (q, k, v)]
            out = cpp(*poison)
            assert out.isnan().all()
            assert all(grad.isnan().all() for grad in torch.autograd.grad(out.sum(), poison))
            check([q, k, v])
            check([q, k, v], torch.rand(2, 1, queries, 29) > 0.5)


def test_float16_has_no_backward():
    q, k, v = packed(1, 2, 9, 16, torch.float16)
    leaf = q.clone().requires_grad_()
    for op in (masked_attention, class_attention):
        with pytest.raises(RuntimeError, match="cannot run this call: it has no backward in float16"):
            op(leaf, k, v, backend="cpp")
        assert op(leaf, k, v).requires_grad
    with torch.no_grad():
        assert torch.equal(cpp(leaf, k, v), cpp(q, k, v))
    with pytest.raises(RuntimeError, match="q must be float32 or bfloat16 on the CPU, got float16"):
        torch.ops.fastvit.masked_attention_cpp_backward(v, q, k, v, None, None, 1.0, False)


@pytest.mark.parametrize(("batch", "queries"), [(1, 200), (3, 200), (1, 3)])
def test_thread_counts(isa, batch, queries):
    """Up to eight threads on one head. The forward's tiles do not depend on their number; the backward's sums do."""
    q, k, v = packed(batch, 1, 300, 32, torch.float32)
    tensors, bias = [q[:, :, :queries], k, v], torch.randn(1, 1, queries, 300)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 8):
            torch.set_num_threads(count)
            results.append(masked_attention(*tensors, backend="cpp"))
            grad = torch.randn(batch, 1, queries, 32)
            first, again = (check([*tensors, bias], grad=grad) for _ in range(2))
            assert all(map(torch.equal, first, again))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results) or queries == 3


@pytest.mark.parametrize("shape", [(0, 4, 5, 6, 8), (2, 4, 0, 6, 8), (2, 4, 5, 0, 8), (2, 0, 5, 6, 8), (2, 4, 5, 6, 0)])
@pytest.mark.parametrize("masked", [False, True])
def test_empty_sizes(shape, masked):
    batch, heads, queries, keys, head_dim = shape
    tensors = [torch.randn(batch, heads, queries, head_dim), *torch.randn(2, batch, heads, keys, head_dim)]
    mask = torch.ones(batch, 1, queries, keys, dtype=torch.bool) if masked else None
    leaves = [tensor.requires_grad_() for tensor in (*tensors, torch.randn(1, heads, queries, keys))]
    with poisoned_empty():
        got = masked_attention(*leaves[:3], mask, leaves[3], scale=1.0, backend="cpp")
        grads = torch.autograd.grad(got.sum(), leaves)
    assert got.shape == tensors[0].shape and got.eq(0).all()
    assert all(grad.shape == leaf.shape and grad.eq(0).all() for grad, leaf in zip(grads, leaves, strict=True))


@pytest.mark.parametrize("queries", [2, 21])
def test_strides(queries):
    q, k, v = packed(2, 4, 21, 18, torch.float32)
    tensors = [q[:, :, :queries], k, v]
    assert check(tensors)[0].transpose(1, 2).is_contiguous()
    for change in (
        Tensor.contiguous,
        lambda tensor: tensor.mT.contiguous().mT,
        lambda tensor: tensor[:1].expand_as(tensor),
        lambda tensor: tensor.repeat_interleave(2, 2)[:, :, ::2],
    ):
        check([change(tensor) for tensor in tensors])
        check(tensors, grad=change(torch.randn_like(tensors[0])))
    check(tensors, grad=torch.ones(()).expand_as(tensors[0]))
    mask = (torch.rand(2, queries, 42) > 0.5)[:, None, :, ::2]
    bias = torch.randn(4, 21, queries).mT
    check(tensors, mask)
    check([*tensors, bias], mask.mT.contiguous().mT)
    check([*tensors, torch.randn(1, queries, 42)[..., ::2]], mask[:, 0, 0])


def test_gradients_in_the_layout_of_their_inputs():
    """As (B, N, H, D): the projections behind take them without a copy."""
    tensors = [tensor.requires_grad_() for tensor in packed(2, 3, 20, 16, torch.float32)]
    for grad in torch.autograd.grad(cpp(*tensors).sum(), tensors):
        assert grad.transpose(1, 2).is_contiguous()


def test_only_the_gradients_asked_for():
    q, k, v = packed(1, 2, 12, 16, torch.float32)
    bias = torch.randn(2, 12, 12)
    for asked in ((q,), (k, v), (bias,)):
        leaves = {id(tensor): tensor.detach().requires_grad_() for tensor in asked}
        call = [leaves.get(id(tensor), tensor) for tensor in (q, k, v, bias)]
        grads = torch.autograd.grad(cpp(*call[:3], None, call[3]).sum(), list(leaves.values()))
        assert all(grad.shape == tensor.shape for grad, tensor in zip(grads, asked, strict=True))


@pytest.mark.parametrize("queries", [2, 9])
def test_autocast(queries):
    """Gradients come back in the inputs' own dtypes."""
    q, k, v = packed(2, 3, 9, 16, torch.float32)
    bias = torch.randn(3, queries, 9, requires_grad=True)
    leaves = [tensor.requires_grad_() for tensor in (q[:, :, :queries].detach(), k.bfloat16(), v.detach())]
    mask, grad = torch.rand(2, 9) > 0.3, torch.randn(2, 3, queries, 16).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out = masked_attention(*leaves, mask, bias, backend="cpp")
    assert out.dtype == torch.bfloat16
    got = [out, *torch.autograd.grad(out, [*leaves, bias], grad)]
    assert [tensor.dtype for tensor in got[1:]] == [tensor.dtype for tensor in (*leaves, bias)]
    low = [tensor.detach().bfloat16() for tensor in (*leaves, bias)]

    def plain(q, k, v, bias):
        return functional.masked_attention(q, k, v, mask, bias)

    expected = attention_checks.outputs_and_gradients(plain, low, grad)
    exact = attention_checks.outputs_and_gradients(plain, [tensor.double() for tensor in low], grad)
    for name, *three in zip(attention_checks.NAMES, got, expected, exact, strict=True):
        assert_as_accurate(three[0].bfloat16(), *three[1:], name=name)


@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(masked):
    q, k, v = packed(2, 4, 9, 8, torch.float32)
    mask = torch.rand(2, 1, 9, 9) > 0.5 if masked else None
    bias = torch.randn(1, 4, 9, 9) if masked else None
    torch.library.opcheck(torch.ops.fastvit.masked_attention_cpp.default, (q, k, v, mask, bias, 0.25))
    backward = torch.ops.fastvit.masked_attention_cpp_backward.default
    torch.library.opcheck(backward, (torch.randn(2, 4, 9, 8), q, k, v, mask, bias, 0.25, masked))


@pytest.mark.parametrize("biased", [False, True])
def test_compiles_in_one_graph_for_any_batch_and_length(biased):
    """One compilation serves all sizes, few queries and many."""

    def loss(q, k, v, mask, bias):
        return masked_attention(q, k, v, mask, bias).square().sum()

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for batch, tokens in ((2, 9), (3, 20), (4, 5)):
        tensors = [tensor.detach().requires_grad_() for tensor in packed(batch, 4, tokens, 8, torch.float32)]
        mask = torch.rand(batch, tokens) > 0.3
        bias = torch.randn(4, tokens, tokens, requires_grad=True) if biased else None
        leaves = tensors if bias is None else [*tensors, bias]
        for leaf in (*leaves, mask):
            for axis in range(leaf.dim()):
                if leaf.shape[axis] in (batch, tokens) and leaf.shape[axis] != 4:
                    torch._dynamo.mark_dynamic(leaf, axis)
        got = torch.autograd.grad(compiled(*tensors, mask, bias), leaves)
        assert all(map(torch.equal, got, torch.autograd.grad(loss(*tensors, mask, bias), leaves)))
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_no_map_is_written():
    """Forward and backward allocate what they return, and scratch of a few rows of the map a thread."""
    batch, heads, tokens, head_dim = 2, 4, 700, 16
    tensors = [tensor.detach().requires_grad_() for tensor in packed(batch, heads, tokens, head_dim, torch.float32)]
    cpp(*tensors).sum().backward()  # the first call makes the scratch that later ones use
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        cpp(*tensors).sum().backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest <= 4 * batch * heads * tokens * head_dim * 4


def test_nothing_but_the_inputs_is_kept():
    saved = []
    tensors = [tensor.detach().requires_grad_() for tensor in packed(2, 3, 20, 16, torch.float32)]
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        cpp(*tensors, torch.rand(2, 20) > 0.5)
    storages = {tensor.untyped_storage().data_ptr() for tensor in saved if tensor.dtype == torch.float32}
    assert storages == {tensor.untyped_storage().data_ptr() for tensor in tensors}


def test_tells_its_reasons():
    q, k, v = packed(1, 4, 9, 8, torch.float32)

    def refused(match, *tensors, **options):
        with pytest.raises(RuntimeError, match=match):
            masked_attention(*tensors, **options, backend="cpp")
        assert masked_attention(*tensors, **options).shape == tensors[0].shape  # another takes it

    refused("dropout", q, k, v, dropout_p=0.5)
    refused("float64", q.double(), k.double(), v.double())
    refused("head dimension 129", *packed(1, 2, 2, 129, torch.float32))
    refused("on meta", *(tensor.to("meta") for tensor in (q, k, v)))


LOW_LEVEL_BAD = {
    "q must be float32.* or b?float16 on the CPU, got float64": {"q": lambda tensor: tensor.double()},
    r"q and k must be \(B, H, N, D\)": {"q": lambda tensor: tensor[0]},
    "k has shape": {"k": lambda tensor: tensor[:, :3]},
    "v is bfloat16, q is float32": {"v": lambda tensor: tensor.bfloat16()},
    "expected head dimensions up to 128, got 129": {name: lambda _: torch.ones(1, 1, 2, 129) for name in "qkv"},
    "mask must be bool": {"mask": lambda _: torch.ones(1, 1, 1, 9)},
    "mask has shape": {"mask": lambda _: torch.ones(1, 1, 8, 9, dtype=torch.bool)},
    "bias has shape": {"bias": lambda _: torch.ones(1, 1, 8, 9)},
    "bias is bfloat16, q is float32": {"bias": lambda _: torch.ones(1, 1, 9, 9).bfloat16()},
}
BACKWARD_BAD = {
    **LOW_LEVEL_BAD,
    "grad has shape": {"grad": lambda tensor: tensor[:, :3]},
    "grad is bfloat16, q is float32": {"grad": lambda tensor: tensor.bfloat16()},
    "the gradient of a bias": {"bias_grad": lambda _: True},
}


@pytest.mark.parametrize("message", BACKWARD_BAD)
def test_operators_check_for_themselves(message):
    q, k, v = packed(1, 4, 9, 8, torch.float32)
    arguments = {"q": q, "k": k, "v": v, "mask": None, "bias": None, "scale": 1.0}
    of_backward = {"grad": torch.randn(1, 4, 9, 8), "bias_grad": False}
    for name, change in BACKWARD_BAD[message].items():
        group = of_backward if name in of_backward else arguments
        group[name] = change(group[name])
    if message in LOW_LEVEL_BAD:
        with pytest.raises(RuntimeError, match=f"masked_attention_cpp: {message}"):
            torch.ops.fastvit.masked_attention_cpp(**arguments)
    with pytest.raises(RuntimeError, match=f"masked_attention_cpp_backward: {message}"):
        torch.ops.fastvit.masked_attention_cpp_backward(**of_backward, **arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_take_any_strides(dtype):
    q, k, v = packed(2, 3, 9, 8, dtype)
    grad = torch.randn(2, 3, 9, 8).to(dtype)
    dense = [tensor.contiguous() for tensor in (grad, q, k, v)]
    turned = [tensor.mT.contiguous().mT for tensor in dense]
    for tensors in (turned, [dense[0], *turned[1:3], dense[3]], [turned[0], *dense[1:]]):
        for run, first in (
            (torch.ops.fastvit.masked_attention_cpp, 1),
            (torch.ops.fastvit.masked_attention_cpp_backward, 0),
        ):
            rest = (None, None, 0.3) if first else (None, None, 0.3, False)
            torch.testing.assert_close(run(*tensors[first:], *rest), run(*dense[first:], *rest), rtol=0, atol=0)


def test_scale():
    for scale in (0.7, 0.0, -math.pi):
        check(packed(1, 2, 9, 16, torch.float32), scale=scale)
