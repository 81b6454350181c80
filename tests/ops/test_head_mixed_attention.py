"""Attention mixed across heads against its plain twin in float64: every instruction set, mask and odd size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastvit import backends
from fastvit.ops.head_mixed_attention import head_mixed_attention, re_attention, talking_heads_attention
from fastvit.reference import functional
from fastvit.reference.functional import BatchNorm
from tests.helpers import assert_as_accurate, poisoned_empty

needs_cpp = pytest.mark.skipif(bool(backends.cpp_reasons()), reason="; ".join(backends.cpp_reasons()))
pytestmark = needs_cpp

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("re", "talking", "pre", "post", "norm", "plain")


def make_qkv(
    batch: int, heads: int, queries: int, keys: int, dim: int, dtype: torch.dtype, size: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as views of one packed (B, N, 3, H, D), as the models' projection gives them."""
    packed = (size * torch.randn(batch, max(queries, keys), 3, heads, dim)).to(dtype)
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    return q[:, :, :queries], k[:, :, :keys], v[:, :, :keys]


def make_norm(heads: int, dtype: torch.dtype) -> BatchNorm:
    return BatchNorm(
        (0.05 * torch.randn(heads)).to(dtype),
        (0.01 + 0.02 * torch.rand(heads)).to(dtype),
        (0.5 + torch.rand(heads)).to(dtype),
        torch.randn(heads).to(dtype),
    )


def make_parts(kind: str, heads: int, dtype: torch.dtype) -> dict[str, Any]:
    """The keyword arguments that make a head-mixed attention the kind named."""
    weights = [(torch.eye(heads) + 0.2 * torch.randn(heads, heads)).to(dtype) for _ in range(2)]
    biases = [(0.1 * torch.randn(heads)).to(dtype) for _ in range(2)]
    parts: dict[str, dict[str, Any]] = {
        "plain": {},
        "pre": {"pre_weight": weights[0]},
        "post": {"post_weight": weights[1], "output_scale": -1.5},
        "norm": {"norm": make_norm(heads, dtype)},
        "re": {
            "post_weight": weights[1],
            "post_bias": biases[1],
            "norm": make_norm(heads, dtype),
            "output_scale": 0.25,
        },
        "talking": {
            "pre_weight": weights[0],
            "pre_bias": biases[0],
            "post_weight": weights[1],
            "post_bias": biases[1],
        },
    }
    return parts[kind]


def to_dtype(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, BatchNorm):
        return BatchNorm(*(to_dtype(field, dtype) for field in value))
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def check(q: Tensor, k: Tensor, v: Tensor, **parts: Any) -> Tensor:
    """Runs the C++ kernel and holds it to the accuracy rule; returns its result."""
    with poisoned_empty():
        got = head_mixed_attention(q, k, v, **parts, backend="cpp")
    plain = functional.head_mixed_attention(q, k, v, **parts)
    exact = functional.head_mixed_attention(
        *(t.double() for t in (q, k, v)), **{name: to_dtype(value, torch.float64) for name, value in parts.items()}
    )
    assert_as_accurate(got, plain, exact)
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_on_every_instruction_set(isa: str, kind: str, dtype: torch.dtype) -> None:
    q, k, v = make_qkv(2, 6, 37, 53, 32, dtype)
    check(q, k, v, **make_parts(kind, 6, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [1, 3, 4, 6, 8, 12, 16, 32])
def test_head_counts(isa: str, heads: int, dtype: torch.dtype) -> None:
    q, k, v = make_qkv(1, heads, 18, 21, 16, dtype)
    check(q, k, v, **make_parts("re", heads, dtype))
    check(q, k, v, **make_parts("talking", heads, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 2, 7, 16, 31, 33, 35, 48, 64, 127, 128])
def test_head_dimensions(isa: str, dim: int, dtype: torch.dtype) -> None:
    q, k, v = make_qkv(1, 3, 20, 14, dim, dtype)
    check(q, k, v, **make_parts("talking", 3, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [(1, 1), (1, 50), (50, 1), (2, 3), (15, 16), (16, 17), (33, 12), (65, 129)])
def test_token_counts(isa: str, tokens: tuple[int, int], dtype: torch.dtype) -> None:
    q, k, v = make_qkv(2, 4, *tokens, 24, dtype)
    check(q, k, v, **make_parts("re", 4, dtype))
    check(q, k, v, **make_parts("talking", 4, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "kind"),
    [((2, 12, 197, 32), "re"), ((1, 12, 197, 33), "re"), ((1, 12, 577, 35), "re"), ((2, 8, 196, 48), "talking")],
)
def test_sizes_of_the_models(shape: tuple[int, int, int, int], kind: str, dtype: torch.dtype) -> None:
    batch, heads, tokens, dim = shape
    for seed in range(3):
        torch.manual_seed(seed)
        check(*make_qkv(batch, heads, tokens, tokens, dim, dtype), **make_parts(kind, heads, dtype))


MASK_SHAPES = [
    (2, 45),
    (1, 45),
    (2, 1, 1, 45),
    (1, 1, 1, 45),
    (2, 1, 1, 1),
    (2, 1, 37, 45),
    (1, 1, 37, 45),
    (2, 4, 1, 45),
    (1, 4, 37, 1),
    (2, 4, 37, 45),
    (4, 37, 45),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
def test_masks(isa: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    q, k, v = make_qkv(2, 4, 37, 45, 24, dtype)
    mask = torch.rand(shape) < 0.6
    for kind in ("re", "talking"):
        check(q, k, v, **make_parts(kind, 4, dtype), mask=mask)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["re", "talking"])
def test_rows_without_a_key_are_zero(isa: str, kind: str, dtype: torch.dtype) -> None:
    q, k, v = make_qkv(3, 4, 20, 30, 16, dtype)
    parts = make_parts(kind, 4, dtype)
    padding = torch.ones(3, 30, dtype=torch.bool)
    padding[1] = False
    got = check(q, k, v, **parts, mask=padding)
    assert not got[1].any() and got[0].any() and got[2].any()
    rows = torch.rand(3, 1, 20, 30) < 0.5
    rows[:, :, 5] = False
    got = check(q, k, v, **parts, mask=rows)
    assert not got[:, :, 5].any() and got[:, :, 6].any()
    heads = torch.rand(3, 4, 20, 30) < 0.5
    heads[:, 2] = False
    got = check(q, k, v, **parts, mask=heads)
    assert not got[:, 2].any() and got[:, 1].any()


def test_masked_keys_do_not_reach_the_result(isa: str) -> None:
    q, k, v = (t.clone() for t in make_qkv(2, 4, 20, 30, 16, torch.float32))
    mask = torch.rand(2, 30) < 0.5
    parts = make_parts("re", 4, torch.float32)
    before = head_mixed_attention(q, k, v, **parts, mask=mask, backend="cpp")
    hidden = ~mask[:, None, :, None].expand_as(k)
    k[hidden], v[hidden] = torch.nan, torch.inf
    assert torch.equal(head_mixed_attention(q, k, v, **parts, mask=mask, backend="cpp"), before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_logits(isa: str, dtype: torch.dtype) -> None:
    q, k, v = make_qkv(2, 4, 40, 40, 32, dtype)
    far_up, far_down = q.clone(), q.clone()
    far_up[..., 0], far_down[..., 0], k[..., 0] = 30.0, -30.0, 30.0  # logits of about 160 and -160
    for kind in ("re", "talking"):
        parts = make_parts(kind, 4, dtype)
        check(10.0 * q, k, v, **parts)
        check(far_up, k, v, **parts)
        check(far_down, k, v, **parts)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_hot_rows(isa: str, dtype: torch.dtype) -> None:
    dim = 48
    k = (50.0 * torch.eye(dim)).expand(1, 3, dim, dim).to(dtype)
    q = k[:, :, torch.randperm(dim)]
    v = torch.randn(1, 3, dim, dim).to(dtype)
    got = check(q, k, v)
    assert torch.equal(got, v[:, :, q[0, 0].argmax(-1)])


def test_nan_and_infinity_stay_where_the_reference_has_them(isa: str) -> None:
    q, k, v = (t.clone() for t in make_qkv(2, 4, 20, 30, 16, torch.float32))
    q[0, 1, 3, 5] = torch.nan
    q[1, 2, 4, 0] = torch.inf
    for kind in ("re", "talking", "plain"):
        check(q, k, v, **make_parts(kind, 4, torch.float32))


def test_scratch_of_an_earlier_call_does_not_leak(isa: str) -> None:
    q, k, v = make_qkv(2, 4, 21, 29, 18, torch.float32)
    for dtype in DTYPES:
        poison = torch.full_like(q, torch.nan, dtype=dtype), torch.full_like(k, torch.nan, dtype=dtype)
        parts = make_parts("talking", 4, dtype)
        assert head_mixed_attention(*poison, poison[1], **parts, backend="cpp").isnan().all()
        check(q.to(dtype), k.to(dtype), v.to(dtype), **parts)
        check(q.to(dtype), k.to(dtype), v.to(dtype), **parts, mask=torch.rand(2, 1, 21, 29) < 0.5)


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_thread_counts_agree(isa: str, batch: int) -> None:
    q, k, v = make_qkv(batch, 8, 70, 90, 32, torch.float32)
    parts = make_parts("talking", 8, torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            results.append(head_mixed_attention(q, k, v, **parts, backend="cpp"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("shape", [(0, 4, 5, 6, 8), (2, 4, 0, 6, 8), (2, 4, 5, 0, 8), (2, 0, 5, 6, 8), (2, 4, 5, 6, 0)])
@pytest.mark.parametrize("masked", [False, True])
def test_empty_sizes(shape: tuple[int, ...], masked: bool) -> None:
    batch, heads, queries, keys, dim = shape
    q, k, v = make_qkv(batch, heads, queries, keys, dim, torch.float32)
    mask = torch.ones(batch, 1, queries, keys, dtype=torch.bool) if masked else None
    got = head_mixed_attention(q, k, v, post_weight=torch.eye(heads), mask=mask, scale=1.0, backend="cpp")
    assert got.shape == q.shape and not got.any()


def test_strides() -> None:
    dtype = torch.float32
    parts = make_parts("talking", 4, dtype)
    q, k, v = make_qkv(2, 4, 21, 21, 18, dtype)
    got = check(q, k, v, **parts)
    assert got.transpose(1, 2).is_contiguous()
    for change in (
        Tensor.contiguous,
        lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
        lambda t: t[:1].expand_as(t),
    ):
        check(change(q), change(k), change(v), **parts)
    weight = torch.randn(8, 8)[::2, ::2].t()
    check(q, k, v, post_weight=weight, post_bias=torch.randn(8)[::2])
    mask = (torch.rand(2, 21, 42) < 0.5)[:, None, :, ::2]
    check(q, k, v, **parts, mask=mask)
    check(q, k, v, **parts, mask=mask[:, 0, 0, :].t().contiguous().t())


def test_float32_parameters_beside_bfloat16() -> None:
    q, k, v = make_qkv(2, 4, 21, 21, 18, torch.bfloat16)
    parts = make_parts("re", 4, torch.float32)
    got = head_mixed_attention(q, k, v, **parts, backend="cpp")
    plain = head_mixed_attention(q, k, v, **parts, backend="reference")
    exact = {name: to_dtype(value, torch.float64) for name, value in parts.items()}
    assert_as_accurate(got, plain, functional.head_mixed_attention(q.double(), k.double(), v.double(), **exact))


def test_autocast() -> None:
    q, k, v = make_qkv(2, 4, 21, 21, 18, torch.float32)
    parts = make_parts("talking", 4, torch.float32)
    exact = {name: to_dtype(value, torch.float64) for name, value in parts.items()}
    oracle = functional.head_mixed_attention(q.double(), k.double(), v.double(), **exact)
    with torch.autocast("cpu", torch.bfloat16):
        got = head_mixed_attention(q, k, v, **parts, backend="cpp")
        plain = functional.head_mixed_attention(q, k, v, **parts)
    assert_as_accurate(got, plain, oracle)


def test_twins_agree_with_their_plain_forms() -> None:
    q, k, v = make_qkv(2, 4, 21, 21, 18, torch.float32)
    mix = [torch.randn(4, 4), torch.randn(4), torch.randn(4, 4), torch.randn(4)]
    norm = make_norm(4, torch.float32)
    options: dict[str, Any] = {"mask": torch.rand(2, 21) < 0.7, "scale": 0.3}
    wide = [q.double(), k.double(), v.double()]
    assert_as_accurate(
        talking_heads_attention(q, k, v, *mix, **options, backend="cpp"),
        functional.talking_heads_attention(q, k, v, *mix, **options),
        functional.talking_heads_attention(*wide, *(t.double() for t in mix), **options),
    )
    assert_as_accurate(
        re_attention(q, k, v, *mix[:2], norm, output_scale=0.5, **options, backend="cpp"),
        functional.re_attention(q, k, v, *mix[:2], norm, output_scale=0.5, **options),
        functional.re_attention(
            *wide, mix[0].double(), mix[1].double(), to_dtype(norm, torch.float64), output_scale=0.5, **options
        ),
    )


@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(masked: bool) -> None:
    q, k, v = make_qkv(2, 4, 9, 9, 8, torch.float32)
    norm = make_norm(4, torch.float32)
    mask = torch.rand(2, 1, 9, 9) < 0.5 if masked else None
    weight, bias = torch.randn(4, 4), torch.randn(4)
    statistics = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    arguments = (q, k, v, None, None, weight, bias, *statistics, norm.eps, False, 1.0, False, mask, 0.3)
    torch.library.opcheck(torch.ops.fastvit.head_mixed_attention.default, arguments)


def test_compiles_in_one_graph_for_any_batch_and_length() -> None:
    torch._dynamo.reset()
    parts = make_parts("re", 4, torch.float32)

    def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return head_mixed_attention(q, k, v, **parts, mask=mask)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, tokens in ((2, 9), (3, 20)):
        q, k, v = make_qkv(batch, 4, tokens, tokens, 8, torch.float32)
        mask = torch.rand(batch, tokens) < 0.7
        with torch.no_grad():
            assert torch.equal(
                compiled(q, k, v, mask), head_mixed_attention(q, k, v, **parts, mask=mask, backend="cpp")
            )
    torch._dynamo.reset()


def test_refusals_give_their_reasons() -> None:
    q, k, v = make_qkv(1, 4, 9, 9, 8, torch.float32)

    def refused(match: str, *tensors: Tensor, **options: Any) -> None:
        with pytest.raises(RuntimeError, match=match):
            head_mixed_attention(*tensors, **options, backend="cpp")
        assert head_mixed_attention(*tensors, **options).shape == tensors[0].shape  # the reference takes it

    refused("dropout", q, k, v, dropout_p=0.5)
    refused("the norm is Identity, which has to be called", q, k, v, norm=BatchNorm.of(torch.nn.Identity()))
    statistics = torch.zeros(4), torch.ones(4)
    refused("a BatchNorm has no mix in front of it", q.requires_grad_(), k, v, norm=BatchNorm(*statistics, None, None))
    q = q.detach()
    refused("float64", q.double(), k.double(), v.double())
    refused("a parameter has dtype torch.float64", q, k, v, post_weight=torch.eye(4).double())
    refused("33 heads", *make_qkv(1, 33, 2, 2, 4, torch.float32))
    refused("head dimension 129", *make_qkv(1, 2, 2, 2, 129, torch.float32))
    refused("dtype torch.float64.*dropout", q.double(), k.double(), v.double(), dropout_p=0.5)
    halves = q.half(), k.half(), v.half()
    batch = BatchNorm(*statistics, None, None, use_batch_stats=True)
    refused("it takes no statistics of a batch in float16", *halves, post_weight=torch.eye(4), norm=batch)
    refused("it has no backward in float16", *halves, post_weight=torch.eye(4).requires_grad_())
    meta = [t.to("meta") for t in (q, k, v)]
    refused("on meta", *meta)


LOW_LEVEL_BAD = {
    "q must be float32, bfloat16 or float16": {"q": lambda t: t.double()},
    r"q and k must be \(B, H, N, D\)": {"q": lambda t: t[0]},
    "k has shape": {"k": lambda t: t[:, :3]},
    "v is bfloat16, q is float32": {"v": lambda t: t.bfloat16()},
    "k must have a contiguous last axis": {"k": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3)},
    "post_weight has shape": {"post_weight": lambda _: torch.eye(5)},
    "post_weight must be float32, bfloat16 or float16": {"post_weight": lambda _: torch.eye(4).double()},
    "norm_mean and norm_var": {"norm_mean": lambda _: torch.zeros(4)},
    "mask must be bool": {"mask": lambda _: torch.ones(1, 1, 1, 9)},
    "mask has shape": {"mask": lambda _: torch.ones(1, 1, 8, 9, dtype=torch.bool)},
}


@pytest.mark.parametrize("message", LOW_LEVEL_BAD)
def test_the_operator_checks_for_itself(message: str) -> None:
    q, k, v = make_qkv(1, 4, 9, 9, 8, torch.float32)
    names = ("q", "k", "v", "pre_weight", "pre_bias", "post_weight", "post_bias", "norm_weight", "norm_bias")
    arguments: dict[str, Any] = dict.fromkeys((*names, "norm_mean", "norm_var", "mask"))
    settings = {"norm_eps": 0.0, "layer_norm": False, "output_scale": 1.0, "centred": False, "scale": 1.0}
    arguments |= {"q": q, "k": k, "v": v, **settings}
    for name, change in LOW_LEVEL_BAD[message].items():
        arguments[name] = change(arguments[name])
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastvit.head_mixed_attention(**arguments)
