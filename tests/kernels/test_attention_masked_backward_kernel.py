"""The backward kernels of masked attention in Triton's interpreter, against autograd of the reference in float64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from fastvit.kernels import attention_masked as forward
from fastvit.kernels import attention_masked_backward as backward
from fastvit.kernels import attention_masked_bias_gradient
from fastvit.kernels.attention_masked import Config

import fastvit
from fastvit.reference import functional
from tests.helpers import assert_as_accurate, poisoned_empty
from tests.kernels.test_attention_masked_kernel import packed

pytestmark = pytest.mark.interpreter

# The interpreter's time depends on programs, not on elements: few programs, tiles smaller than the sequences.
OTHERS = ((Config(16, 32, 1),), Config(16, 32, 1))
STREAMING = backward.Configs((Config(32, 16, 1),), *OTHERS)
ONE_PASS = backward.Configs((Config(32, 64, 1, one_pass=True),), *OTHERS)
both_forms = pytest.mark.parametrize("configs", [STREAMING, ONE_PASS], ids=["streaming", "one_pass"])


def reference_gradients(grad, q, k, v, mask, bias, scale, dtype):
    """The gradients of q, k, v and, unless it is None, bias, by autograd of the plain form in a dtype."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in (q, k, v, bias) if t is not None]
    out = functional.masked_attention(*leaves[:3], mask, leaves[3] if bias is not None else None, scale)
    return torch.autograd.grad(out, leaves, grad.to(dtype))


def check(q, k, v, mask=None, bias=None, scale=None, configs=None, grad=None):
    """Check the gradients of one call on poisoned memory against the accuracy rule; returns them."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    four_axes = mask[:, None, None, :] if mask is not None and mask.dim() == 2 else mask
    grad = torch.randn(q.shape).to(q.dtype) if grad is None else grad
    with poisoned_empty():
        out, lse = forward.masked_attention_forward(q, k, v, four_axes, bias, scale, need_lse=True)
        arguments = (out, lse, grad, q, k, v, four_axes, bias, scale, bias is not None)
        gradients = backward.masked_attention_backward(*arguments, configs=configs)
    plain = reference_gradients(grad, q, k, v, mask, bias, scale, q.dtype)
    oracle = reference_gradients(grad, q, k, v, mask, bias, scale, torch.float64)
    for name, ours, theirs, exact in zip(("dq", "dk", "dv", "dbias"), gradients, plain, oracle, strict=False):
        assert_as_accurate(ours, theirs, exact, name=name)
    assert all(gradient.transpose(1, 2).is_contiguous() for gradient in gradients[:3])
    assert bias is not None or gradients[3].numel() == 0
    return gradients


@both_forms
@pytest.mark.parametrize(
    ("head_dim", "dtype"), [(16, torch.float32), (33, torch.float16), (48, torch.bfloat16)], ids=str
)
def test_packed_qkv(head_dim, dtype, configs):
    check(*packed(1, 2, 37, head_dim, dtype), configs=configs)


@both_forms
@pytest.mark.parametrize("shape", [(2, 21), (1, 1, 21, 21), (2, 1, 21, 1)], ids=str)
def test_masks(shape, configs):
    q, k, v = packed(2, 1, 21, 16, torch.float32)
    check(q, k, v, mask=torch.rand(shape) > 0.4, configs=configs)


BIAS_SHAPES = [
    (2, 2, 17, 33), (1, 2, 17, 33), (2, 1, 17, 33), (1, 1, 17, 33), (1, 2, 1, 33), (2, 1, 17, 1), (1, 1, 1, 1),
]  # fmt: skip


@pytest.mark.parametrize("shape", BIAS_SHAPES, ids=str)
def test_bias_gradient_in_its_own_shape(shape):
    q = torch.randn(2, 2, 17, 16)
    k, v = torch.randn(2, 2, 2, 33, 16)
    check(q, k, v, mask=torch.rand(2, 33) > 0.4, bias=torch.randn(shape), configs=STREAMING)


def test_bias_gradient_of_many_terms_is_split(monkeypatch):
    monkeypatch.setattr(attention_masked_bias_gradient, "MAX_TERMS_PER_SUM", 2)
    q, k, v = torch.randn(3, 5, 1, 5, 16)
    check(q, k, v, bias=torch.randn(1, 1, 5, 5), configs=ONE_PASS)


def test_transposed_bias_of_another_dtype_with_masked_keys():
    q, k, v = packed(2, 2, 21, 16, torch.float32)
    bias = torch.randn(21, 21, 2).permute(2, 1, 0)[None].clone()
    bias[:, :, :, 3] = float("-inf")
    gradients = check(q, k, v, bias=bias, configs=ONE_PASS)
    assert gradients[3][..., 3].eq(0).all()
    out, lse = forward.masked_attention_forward(q, k, v, None, bias.half(), 0.25, True)
    arguments = (out, lse, torch.randn_like(q), q, k, v, None, bias.half(), 0.25)
    assert backward.masked_attention_backward(*arguments, True)[3].dtype == torch.float16
    assert backward.masked_attention_backward(*arguments, False)[3].numel() == 0


@both_forms
def test_rows_without_keys_have_zero_gradients(configs):
    q, k, v = packed(2, 2, 21, 16, torch.float32)
    keys = torch.rand(2, 21) > 0.4
    keys[0] = False
    for gradient in check(q, k, v, mask=keys, configs=configs)[:3]:
        assert gradient[0].eq(0).all()
    rows = torch.rand(2, 2, 21, 21) > 0.4
    rows[1, 0, 3] = False
    assert check(q, k, v, mask=rows, bias=torch.randn(1, 2, 21, 21), configs=configs)[0][1, 0, 3].eq(0).all()


@both_forms
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("keys", [(0, 1, 17, 34), (*range(3), *range(20, 35))], ids=["between", "around"])
def test_what_stands_at_hidden_keys_reaches_no_gradient(keys, biased, configs):
    q, k, v = packed(2, 2, 35, 16, torch.float32)
    mask, grad = torch.rand(2, 35) > 0.4, torch.randn(q.shape)
    hidden = torch.zeros(35, 1, dtype=torch.bool)
    hidden[list(keys)] = True
    mask[:, hidden[:, 0]] = False
    bias = torch.randn(1, 2, 35, 35) if biased else None
    before = check(q, k, v, mask, bias, grad=grad, configs=configs)
    for value in (float("nan"), float("inf"), float("-inf")):
        spoiled = (tensor.masked_fill(hidden, value) for tensor in (k, v))
        assert all(map(torch.equal, check(q, *spoiled, mask, bias, grad=grad, configs=configs), before))


@both_forms
def test_hidden_keys_have_no_gradient_beside_rows_of_nan(configs):
    q, k, v = (tensor.clone() for tensor in packed(2, 2, 35, 16, torch.float32))
    mask = torch.rand(2, 35) > 0.4
    mask[:, 20], mask[:, 3] = True, False
    k[:, 0, 20, 0], v[:, 1, 20, 1], k[:, :, 3] = float("nan"), float("nan"), float("nan")
    gradients = check(q, k, v, mask, configs=configs)
    assert all(gradient[:, :, 3].eq(0).all() and gradient.isnan().any() for gradient in gradients[1:3])


@both_forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_large_logits_and_rows_of_one_key(dtype, configs):
    check(*packed(1, 2, 35, 16, dtype, size=6.0), configs=configs)
    q, k, v = packed(1, 2, 35, 16, dtype)
    check(q, k, v, mask=torch.eye(35, dtype=torch.bool)[None, None] | (torch.rand(1, 1, 35, 1) > 0.7), configs=configs)


@both_forms
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 37), (17, 33)], ids=str)
def test_token_counts(queries, keys, configs):
    q = torch.randn(1, 2, queries, 16)
    k, v = torch.randn(2, 1, 2, keys, 16)
    check(q, k, v, mask=torch.rand(1, 1, queries, keys) > 0.3, configs=configs)


def test_layouts():
    def strided():
        return torch.randn(2, 3, 19, 48)[..., ::2]

    check(strided(), strided(), strided(), grad=torch.randn(2, 3, 24, 19).transpose(2, 3))
    check(strided(), strided(), strided(), grad=torch.ones(()).expand(2, 3, 19, 24))


def test_scale_and_empty_sizes():
    q, k, v = packed(1, 2, 9, 16, torch.float32)
    check(q, k, v, scale=0.3)
    check(q, k, v, scale=0.0)
    for batch, queries, keys in ((0, 4, 3), (2, 0, 3), (2, 4, 0)):
        q = torch.randn(batch, 2, queries, 16)
        k, v = torch.randn(2, batch, 2, keys, 16)
        check(q, k, v, bias=torch.randn(1, 2, 1, keys))


def test_log_sum_exp_of_the_forward():
    q, k, v = packed(2, 2, 21, 16, torch.float32, size=4.0)
    mask = torch.rand(2, 1, 21, 21) > 0.4
    mask[1, 0, 3] = False
    logits = (q.double() @ k.double().mT * 0.25).masked_fill(~mask, float("-inf"))
    plain = (q @ k.mT * 0.25).masked_fill(~mask, float("-inf"))
    for config in (Config(32, 16, 1), Config(32, 64, 1, one_pass=True)):
        with poisoned_empty():
            _, lse = forward.masked_attention_forward(q, k, v, mask, None, 0.25, need_lse=True, config=config)
        assert_as_accurate(lse, plain.logsumexp(-1), logits.logsumexp(-1))
    assert forward.masked_attention_forward(q, k, v)[1].shape == (0,)
    assert forward.masked_attention_forward(q, k[:, :, :0], v[:, :, :0], need_lse=True)[1].eq(float("-inf")).all()


def test_every_shipped_configuration_is_right():
    for (product, padded), configs in backward.CONFIGS.items():
        dtype = torch.float16 if product == "half" else torch.float32
        q, k, v = packed(1, 1, 20, padded - 3, dtype)
        for query_config in configs.queries:
            chosen = configs._replace(queries=(query_config,))
            check(q, k, v, mask=torch.rand(1, 20) > 0.3, bias=torch.randn(1, 1, 20, 20).to(dtype), configs=chosen)


def test_public_function_is_differentiable():
    q, k, v = (t.clone().requires_grad_() for t in packed(2, 2, 21, 16, torch.float32))
    mask, bias = torch.rand(2, 21) > 0.3, torch.randn(2, 21, 21, requires_grad=True)
    grad = torch.randn(2, 2, 21, 16)
    inputs = (q, k, v, bias)
    ours = torch.autograd.grad(fastvit.ops.masked_attention(q, k, v, mask, bias, backend="triton"), inputs, grad)
    plain = torch.autograd.grad(functional.masked_attention(q, k, v, mask, bias), inputs, grad)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    exact = torch.autograd.grad(functional.masked_attention(*wide[:3], mask, wide[3]), wide, grad.double())
    for name, *gradients in zip(("dq", "dk", "dv", "dbias"), ours, plain, exact, strict=True):
        assert_as_accurate(*gradients, name=name)


def test_operator():
    q, k, v = packed(1, 2, 9, 16, torch.float32)
    mask, bias = torch.rand(1, 1, 1, 9) > 0.3, torch.randn(1, 2, 9, 9)
    out, lse = torch.ops.fastvit.masked_attention_triton.default(q, k, v, mask, bias, 0.25, True)
    arguments = (out, lse, torch.randn_like(out), q, k, v, mask, bias, 0.25)
    for bias_grad in (True, False):
        torch.library.opcheck(
            torch.ops.fastvit.masked_attention_triton_backward.default,
            (*arguments, bias_grad),
            test_utils=("test_schema", "test_faketensor"),
        )
