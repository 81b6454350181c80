"""``fastvit.ops.class_attention``: every implementation on the CPU, forward and backward, against the reference."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fastvit import backends
from fastvit.ops import OPERATORS, class_attention
from fastvit.ops._operator import recording
from fastvit.ops.attention import CPP_BACKWARD_DTYPES, CPP_DTYPES
from fastvit.reference import functional
from tests.ops import attention_checks
from tests.ops.attention_checks import packed

needs_cpp = pytest.mark.skipif(bool(backends.cpp_reasons()), reason="; ".join(backends.cpp_reasons()))
check_cpp = functools.partial(
    attention_checks.check, functools.partial(class_attention, backend="cpp"), only_forward=[torch.float16]
)


def few(batch: int, heads: int, queries: int, tokens: int, head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    q, k, v = packed(batch, heads, tokens, head_dim, dtype)
    return [q[:, :, :queries], k, v]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["auto", "sdpa", "reference"])
def test_parity(backend, dtype):
    check = functools.partial(attention_checks.check, functools.partial(class_attention, backend=backend))
    tensors = few(2, 3, 2, 37, 16, dtype)
    check(tensors)
    if backend != "sdpa":
        check(tensors, torch.rand(2, 37) > 0.3)
        check([*tensors, torch.randn(3, 2, 37).to(dtype)])


@needs_cpp
@pytest.mark.parametrize("dtype", CPP_DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [1, 7, 16, 33, 35, 48, 64, 127, 128])
def test_head_dimensions(isa, head_dim, dtype):
    check_cpp(few(2, 3, 1, 37, head_dim, dtype))


@needs_cpp
@pytest.mark.parametrize("dtype", CPP_DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [(1, 1), (1, 12), (1, 197), (2, 16), (4, 577), (8, 63), (8, 1100)], ids=str)
def test_token_counts(isa, tokens, dtype):
    queries, keys = tokens
    tensors = few(2, 2, queries, max(queries, keys), 24, dtype)
    check_cpp(tensors)
    for shape in ((2, keys), (2, 1, queries, keys), (2, queries, 1)):
        check_cpp(tensors, torch.rand(shape) > 0.3)
    check_cpp([*tensors, torch.randn(2, 1, queries, keys).to(dtype)], torch.rand(2, keys) > 0.3)


@needs_cpp
def test_bias_without_a_gradient_of_its_own(isa):
    """The few queries' backward runs then, too."""
    tensors, mask = few(2, 3, 3, 40, 16, torch.float32), torch.rand(2, 40) > 0.3
    bias = torch.randn(3, 3, 40).masked_fill_(torch.rand(3, 3, 40) > 0.6, -torch.inf)
    bias[1, 1] = -torch.inf

    def call(function, bias, q, k, v):
        return function(q, k, v, mask, bias)

    grad = torch.randn(2, 3, 3, 16)
    run = attention_checks.outputs_and_gradients
    got = run(functools.partial(call, class_attention, bias), tensors, grad)
    plain = run(functools.partial(call, functional.class_attention, bias), tensors, grad)
    wide = [tensor.double() for tensor in tensors]
    exact = run(functools.partial(call, functional.class_attention, bias.double()), wide, grad)
    for name, *three in zip(attention_checks.NAMES, got, plain, exact, strict=False):
        attention_checks.assert_as_accurate(*three, name=name)
    assert got[0][:, 1, 1].eq(0).all() and got[1][:, 1, 1].eq(0).all()


@needs_cpp
@pytest.mark.parametrize("dtype", CPP_BACKWARD_DTYPES, ids=str)
def test_rows_without_keys_are_exactly_zero(isa, dtype):
    tensors = few(3, 4, 2, 30, 16, dtype)
    padding = torch.ones(3, 30, dtype=torch.bool)
    padding[1] = False
    assert all(tensor[1].eq(0).all() and tensor[0].ne(0).any() for tensor in check_cpp(tensors, padding))
    mask = torch.rand(3, 1, 2, 30) > 0.5
    mask[2, :, 1] = False
    out, dq, *_ = check_cpp(tensors, mask)
    assert out[2, :, 1].eq(0).all() and dq[2, :, 1].eq(0).all()


@needs_cpp
@pytest.mark.parametrize("dtype", CPP_DTYPES, ids=str)
def test_large_logits(isa, dtype):
    q, k, v = few(32, 4, 4, 60, 16, dtype)
    check_cpp([10.0 * q, k, v])
    check_cpp([30.0 * q, k, v])


@needs_cpp
@pytest.mark.parametrize("masked", [False, True])
def test_keys_split_between_threads(isa, masked):
    """Eight threads and one head: each part of the keys has its own maximum, and may have no key at all."""
    tensors = few(1, 1, 2, 2000, 64, torch.float32)
    tensors[1] = tensors[1] * torch.linspace(0.1, 4, 2000)[:, None]
    mask = torch.zeros(1, 1, 2, 2000, dtype=torch.bool) if masked else None
    if mask is not None:
        mask[..., 0, 700:900] = True
    threads = torch.get_num_threads()
    try:
        for count in (1, 8):
            torch.set_num_threads(count)
            check_cpp(tensors, mask)
    finally:
        torch.set_num_threads(threads)


@needs_cpp
def test_compiles_in_one_graph_for_any_batch_and_length():
    def loss(q, k, v, mask):
        return class_attention(q, k, v, mask).square().sum()

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for batch, tokens in ((2, 9), (3, 20), (5, 12)):
        leaves = [tensor.detach().requires_grad_() for tensor in few(batch, 4, 1, tokens, 8, torch.float32)]
        mask = torch.rand(batch, tokens) > 0.3
        for tensor, axes in zip((*leaves, mask), ((0,), (0, 2), (0, 2), (0, 1)), strict=True):
            torch._dynamo.mark_dynamic(tensor, axes)
        got = torch.autograd.grad(compiled(*leaves, mask), leaves)
        assert all(map(torch.equal, got, torch.autograd.grad(loss(*leaves, mask), leaves)))
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_dropout_keeps_to_what_has_it():
    q, k, v = few(1, 2, 1, 9, 8, torch.float32)
    seen = []
    with recording(seen.append):
        class_attention(q, k, v, dropout_p=0.5)
    assert seen[0].backend == "sdpa"
    for backend in ("cpp", "triton"):
        with pytest.raises(RuntimeError, match="dropout"):
            class_attention(q, k, v, dropout_p=0.5, backend=backend)


def test_backends_by_name():
    names = [implementation.name for implementation in OPERATORS["class_attention"].implementations]
    assert names == ["cpp", "triton", "sdpa", "reference"]


@needs_cpp
def test_cpp_is_chosen_with_every_instruction_set(isa):
    seen = []
    with recording(seen.append):
        class_attention(*few(1, 2, 1, 9, 8, torch.float32))
    assert [selection.backend for selection in seen] == ["cpp"]


def test_empty_sizes():
    for batch, keys in ((0, 5), (2, 0)):
        q, k, v = torch.randn(batch, 3, 1, 16), *torch.randn(2, batch, 3, keys, 16)
        leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
        out = class_attention(*leaves)
        assert out.shape == q.shape and out.eq(0).all()
        assert all(grad.eq(0).all() for grad in torch.autograd.grad(out.sum(), leaves))
