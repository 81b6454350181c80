"""The class attention kernels in Triton's interpreter, forward and backward, against the reference in float64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from fastvit.kernels import attention_class as kernels
from fastvit.kernels.attention_class_backward import class_attention_backward

from fastvit import ops
from fastvit.reference import functional
from tests.helpers import assert_as_accurate, poisoned_empty

pytestmark = pytest.mark.interpreter

CONFIG = kernels.Config(16, 1)


def tokens(batch: int, heads: int, queries: int, keys: int, head_dim: int, dtype=torch.float32, size: float = 1.0):
    """q contiguous, k and v as views of a packed projection."""
    q = (torch.randn(batch, queries, heads, head_dim) * size).to(dtype).transpose(1, 2)
    k, v = (torch.randn(batch, keys, 2, heads, head_dim) * size).to(dtype).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def results(q, k, v, mask, bias, scale, grad, dtype):
    """The output and the gradients of the plain form in a dtype."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in (q, k, v, bias) if t is not None]
    out = functional.masked_attention(*leaves[:3], mask, leaves[3] if bias is not None else None, scale)
    return (out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype)))


def check(q, k, v, mask=None, bias=None, scale=None, grad=None, config=CONFIG):
    """Check one forward and backward on poisoned memory against the accuracy rule; returns the results."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    four_axes = mask[:, None, None, :] if mask is not None and mask.dim() == 2 else mask
    grad = torch.randn(q.shape).to(q.dtype) if grad is None else grad
    with poisoned_empty():
        out = kernels.class_attention_forward(q, k, v, four_axes, bias, scale, config=config)
        arguments = (grad, q, k, v, four_axes, bias, scale, bias is not None)
        gradients = class_attention_backward(*arguments, config=config)
    plain = results(q, k, v, mask, bias, scale, grad, q.dtype)
    exact = results(q, k, v, mask, bias, scale, grad, torch.float64)
    ours = (out, *gradients)
    for name, *three in zip(("out", "dq", "dk", "dv", "dbias"), ours, plain, exact, strict=False):
        assert_as_accurate(*three, name=name)
    assert all(result.transpose(1, 2).is_contiguous() for result in ours[:4])
    assert bias is not None or gradients[3].numel() == 0
    return ours


@pytest.mark.parametrize("queries", [1, 2, 4])
@pytest.mark.parametrize(
    ("head_dim", "dtype"), [(48, torch.float32), (64, torch.float16), (33, torch.bfloat16)], ids=str
)
def test_few_queries(queries, head_dim, dtype):
    check(*tokens(1, 2, queries, 50, head_dim, dtype))


@pytest.mark.parametrize(("batch", "keys"), [(1, 1), (1, 16), (1, 97), (5, 97)], ids=str)
def test_parts_of_any_number(batch, keys):
    """The keys of one image are split, those of several are not: one part of many tiles, many parts of one tile."""
    check(*tokens(batch, 2, 1, keys, 16))


def test_keys_are_split_so_that_one_image_fills_the_device(monkeypatch):
    monkeypatch.setattr(kernels.autotune, "multiprocessors", lambda device: 132)
    one, many = torch.empty(1, 8, 1, 48), torch.empty(64, 8, 1, 48)
    assert kernels._parts(one, 1024, 32) == (32, 32)
    assert kernels._parts(one, 197, 32) == (7, 32)
    assert kernels._parts(many, 197, 32) == (1, 224)
    parts, keys = kernels._parts(torch.empty(1, 1, 1, 48), 10_000, 32)
    assert parts <= kernels.MAX_PARTS
    assert parts * keys >= 10_000


@pytest.mark.parametrize("shape", [(2, 33), (1, 1, 1, 33), (2, 2, 2, 33), (2, 1, 2, 1)], ids=str)
def test_masks_with_rows_without_keys(shape):
    mask = torch.rand(shape) > 0.4
    mask[0] = False
    for result in check(*tokens(2, 2, 2, 33, 16), mask=mask)[:2]:
        assert shape[0] == 1 or result[0].eq(0).all()


@pytest.mark.parametrize("shape", [(2, 2, 2, 33), (1, 2, 1, 33), (1, 1, 1, 1), (2, 1, 2, 33)], ids=str)
def test_bias_and_its_gradient(shape):
    bias = torch.randn(shape)
    bias[..., :1] = float("-inf") if shape[3] > 1 else 1.0
    check(*tokens(2, 2, 2, 33, 16), mask=torch.rand(2, 33) > 0.3, bias=bias)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", [(2, 33), (1, 1, 1, 33), (2, 2, 3, 33)], ids=str)
def test_what_stands_at_hidden_keys_reaches_nothing(shape, biased):
    q, k, v = tokens(2, 2, 3, 33, 16)
    mask, grad = torch.rand(shape) > 0.4, torch.randn(q.shape)
    hidden = torch.zeros(33, 1, dtype=torch.bool)
    hidden[[0, 1, 10]] = hidden[16:32] = True  # a whole tile, and keys between visible ones
    mask[..., hidden[:, 0]] = False
    bias = torch.randn(2, 2, 3, 33) if biased else None
    before = check(q, k, v, mask, bias, grad=grad)
    for value in (float("nan"), float("inf"), float("-inf")):
        spoiled = (tensor.masked_fill(hidden, value) for tensor in (k, v))
        assert all(map(torch.equal, check(q, *spoiled, mask, bias, grad=grad), before))


@pytest.mark.parametrize("how", ["mask", "bias"])
def test_what_is_hidden_from_one_query_does_not_reach_it(how):
    q, k, v = tokens(2, 2, 3, 33, 16)
    k[:, 0, 4, 0], v[:, 0, 9, 1], v[:, 1, 20] = float("nan"), float("inf"), float("nan")
    hidden = torch.rand(2, 2, 3, 33) < 0.5
    if how == "mask":
        out = check(q, k, v, mask=~hidden)[0]
    else:
        out = check(q, k, v, bias=torch.randn(hidden.shape).masked_fill(hidden, float("-inf")))[0]
    assert out.isnan().any() and out.isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_large_logits_and_one_visible_key(dtype):
    check(*tokens(1, 2, 2, 50, 16, dtype, size=8.0))
    one = torch.zeros(1, 50, dtype=torch.bool)
    one[0, 20] = True
    check(*tokens(1, 2, 2, 50, 16, dtype), mask=one)


def test_layouts_scale_and_empty_sizes():
    q, k, v = (torch.randn(2, 3, n, 48)[..., ::2] for n in (2, 19, 19))
    check(q, k, v, grad=torch.ones(()).expand(2, 3, 2, 24))
    check(*tokens(1, 1, 2, 9, 16), scale=0.0)
    for batch, queries, keys in ((0, 1, 3), (2, 0, 3), (2, 1, 0)):
        check(*tokens(batch, 2, queries, keys, 16), bias=torch.randn(1, 2, 1, keys))


@pytest.mark.parametrize("masked", [False, True])
def test_many_heads_in_16_bits_take_the_tensor_cores(masked, monkeypatch):
    monkeypatch.setattr(kernels.autotune, "multiprocessors", lambda device: 2)
    calls = []
    forward = kernels.masked_attention_forward
    monkeypatch.setattr(kernels, "masked_attention_forward", lambda *a: calls.append(a) or forward(*a))
    mask = torch.rand(2, 70) > 0.3 if masked else None
    check(*tokens(2, 2, 2, 70, 48, torch.float16), mask=mask, config=None)
    assert len(calls) == 1
    check(*tokens(1, 2, 2, 70, 48, torch.float16), mask=mask if mask is None else mask[:1], config=None)
    check(*tokens(2, 2, 2, 20, 48), config=None)
    assert len(calls) == 1


def test_tensor_cores_take_no_mask_that_varies_by_query_and_no_bias(monkeypatch):
    """There NaN at a masked key would spread."""
    monkeypatch.setattr(kernels.autotune, "multiprocessors", lambda device: 2)
    calls = []
    forward = kernels.masked_attention_forward
    monkeypatch.setattr(kernels, "masked_attention_forward", lambda *a: calls.append(a) or forward(*a))
    for queries, of_tensor_cores in ((1, 1), (2, 0)):
        q, k, v = tokens(2, 2, queries, 70, 48, torch.float16)
        mask = torch.rand(2, 2, queries, 70) > 0.3
        mask[..., 3] = False
        k[:, :, 3], v[:, :, 3] = float("nan"), float("inf")
        bias = torch.zeros(1, 1, 1, 70, dtype=torch.float16).masked_fill(mask[:1, :1, :1].logical_not(), float("-inf"))
        for masked in ({"mask": mask}, {"bias": bias}):
            calls.clear()
            assert check(q, k, v, **masked, config=None)[0].isfinite().all()
            assert len(calls) == (of_tensor_cores if "mask" in masked else 0)


def test_every_shipped_configuration_is_right():
    for block_d, configs in kernels.CONFIGS.items():
        for config in configs:
            check(*tokens(1, 1, 1, 70, block_d - 3), config=config)
    check(*tokens(1, 1, 1, 70, 16), config=None)


def test_public_function_and_operators():
    q, k, v = tokens(2, 2, 2, 33, 16)
    mask, bias, grad = torch.rand(2, 33) > 0.3, torch.randn(2, 2, 33), torch.randn(2, 2, 2, 16)
    leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v, bias)]
    out = ops.class_attention(*leaves[:3], mask, leaves[3], backend="triton")
    ours = (out, *torch.autograd.grad(out, leaves, grad))
    plain = results(q, k, v, mask[:, None, None], bias, 0.25, grad, torch.float32)
    exact = results(q, k, v, mask[:, None, None], bias, 0.25, grad, torch.float64)
    for name, *three in zip(("out", "dq", "dk", "dv", "dbias"), ours, plain, exact, strict=True):
        assert_as_accurate(*three, name=name)
    arguments = (q, k, v, mask[:, None, None], bias[None], 0.25)
    torch.library.opcheck(torch.ops.fastvit.class_attention_triton.default, arguments)
    torch.library.opcheck(torch.ops.fastvit.class_attention_triton_backward.default, (grad, *arguments, True))
