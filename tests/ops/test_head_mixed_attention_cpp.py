"""The C++ operators of head-mixed attention as they are, layer norm and gradients included, against float64."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit import backends
from fastvit.reference.functional import attention_probabilities
from tests.helpers import assert_as_accurate, poisoned_empty

needs_cpp = pytest.mark.skipif(bool(backends.cpp_reasons()), reason="; ".join(backends.cpp_reasons()))
pytestmark = needs_cpp

DTYPES = (torch.float32, torch.bfloat16)
DTYPES_AT_INFERENCE = (*DTYPES, torch.float16)
KINDS = ("post", "talking", "pre", "layer norm", "bare layer norm")


class Mix(NamedTuple):
    """The parameters of a head-mixed attention, in the order the operators take them."""

    pre_weight: Tensor | None = None
    pre_bias: Tensor | None = None
    post_weight: Tensor | None = None
    post_bias: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    norm_eps: float = 0.0
    layer_norm: bool = False
    output_scale: float = 1.0
    centred: bool = False

    def to(self, dtype: torch.dtype) -> Mix:
        return Mix(*(field.to(dtype) if isinstance(field, Tensor) else field for field in self))


def make_mix(kind: str, heads: int) -> Mix:
    weights = [torch.eye(heads) + 0.2 * torch.randn(heads, heads) for _ in range(2)]
    biases = [0.1 * torch.randn(heads) for _ in range(2)]
    norm = {"norm_weight": 0.5 + torch.rand(heads), "norm_bias": 0.1 * torch.randn(heads), "norm_eps": 1e-5}
    return {
        "post": Mix(post_weight=weights[1], post_bias=biases[1], output_scale=-1.5),
        "talking": Mix(weights[0], biases[0], weights[1], biases[1]),
        "pre": Mix(weights[0], output_scale=0.5),
        "layer norm": Mix(post_weight=weights[1], post_bias=biases[1], layer_norm=True, output_scale=0.5, **norm),
        "bare layer norm": Mix(norm_eps=1e-3, layer_norm=True),
    }[kind]


def make_qkv(
    batch: int, heads: int, queries: int, keys: int, dim: int, dtype: torch.dtype, size: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as views of one packed (B, N, 3, H, D), as the models' projection gives them."""
    packed = (size * torch.randn(batch, max(queries, keys), 3, heads, dim)).to(dtype)
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    return q[:, :, :queries], k[:, :, :keys], v[:, :, :keys]


def plain_maps(q: Tensor, k: Tensor, mix: Mix, mask: Tensor | None, scale: float) -> Tensor:
    """The maps behind the softmax."""
    maps = (q * scale) @ k.transpose(-2, -1)
    if mix.pre_weight is not None:
        maps = F.conv2d(maps, mix.pre_weight[:, :, None, None], mix.pre_bias)
    return attention_probabilities(maps, mask)


def plain(q: Tensor, k: Tensor, v: Tensor, mix: Mix, mask: Tensor | None, scale: float) -> Tensor:
    mix = mix.to(q.dtype)
    maps = plain_maps(q, k, mix, mask, scale)
    if mix.post_weight is not None:
        maps = F.conv2d(maps, mix.post_weight[:, :, None, None], mix.post_bias)
    if mix.layer_norm:
        normed = F.layer_norm(maps.movedim(1, -1), (maps.shape[1],), mix.norm_weight, mix.norm_bias, mix.norm_eps)
        maps = normed.movedim(-1, 1)
    maps = maps * mix.output_scale
    if mask is not None:
        maps = maps.masked_fill(~mask, 0.0)
    return maps @ v


def forward(q: Tensor, k: Tensor, v: Tensor, mix: Mix, mask: Tensor | None, scale: float) -> Tensor:
    statistics = (None, None)
    with poisoned_empty():
        return torch.ops.fastvit.head_mixed_attention(q, k, v, *mix[:6], *statistics, *mix[6:], mask, scale)


def check_forward(q: Tensor, k: Tensor, v: Tensor, mix: Mix, mask: Tensor | None = None, scale: float = 0.3) -> None:
    exact = plain(q.double(), k.double(), v.double(), mix, mask, scale)
    assert_as_accurate(forward(q, k, v, mix, mask, scale), plain(q, k, v, mix, mask, scale), exact)


@pytest.mark.parametrize("dtype", DTYPES_AT_INFERENCE)
@pytest.mark.parametrize("kind", ["layer norm", "bare layer norm"])
def test_layer_norm_forward(isa: str, kind: str, dtype: torch.dtype) -> None:
    for heads, queries, keys in ((1, 5, 7), (4, 37, 53), (12, 17, 20), (16, 33, 9), (32, 3, 4)):
        check_forward(*make_qkv(2, heads, queries, keys, 18, dtype), make_mix(kind, heads))
    q, k, v = make_qkv(2, 6, 20, 30, 16, dtype)
    for shape in ((2, 1, 1, 30), (2, 6, 20, 30), (1, 1, 20, 30)):
        check_forward(q, k, v, make_mix(kind, 6), torch.rand(shape) < 0.6)
    check_forward(10 * q, k, v, make_mix(kind, 6))


def test_a_layer_norm_takes_no_statistics() -> None:
    q, k, v = make_qkv(1, 4, 9, 9, 8, torch.float32)
    zeros = torch.zeros(4)
    mix = make_mix("layer norm", 4)
    with pytest.raises(RuntimeError, match="a layer norm takes no norm_mean"):
        torch.ops.fastvit.head_mixed_attention(q, k, v, *mix[:6], zeros, zeros, *mix[6:], None, 1.0)


def named(tensors: tuple[Tensor, Tensor, Tensor], mix: Mix) -> dict[str, Tensor]:
    """What gradients are for."""
    parameters = {name: value for name, value in mix._asdict().items() if isinstance(value, Tensor)}
    return dict(zip(("q", "k", "v"), tensors, strict=True)) | parameters


def plain_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mix: Mix, mask: Tensor | None, scale: float
) -> dict[str, Tensor]:
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in named((q, k, v), mix).items()}
    leaf_mix = mix._replace(**{name: leaf for name, leaf in leaves.items() if name not in ("q", "k", "v")})
    out = plain(leaves["q"], leaves["k"], leaves["v"], leaf_mix, mask, scale)
    return dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), grad), strict=True))


def gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mix: Mix, mask: Tensor | None, scale: float
) -> dict[str, Tensor]:
    """By the operator; checks that what was not asked for is of size 0."""
    with poisoned_empty():
        results = torch.ops.fastvit.head_mixed_attention_backward(grad, q, k, v, *mix, mask, scale)
    tensors = (q, k, v, *mix[:6])
    assert all(result.numel() == 0 for result, of in zip(results, tensors, strict=True) if of is None)
    return {name: results[("q", "k", "v", *Mix._fields).index(name)] for name in named((q, k, v), mix)}


def reordered_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mix: Mix, mask: Tensor | None, scale: float
) -> dict[str, Tensor]:
    """The same as :func:`plain_gradients`, with the queries, the keys and the head dimension in a random order each."""
    rows, columns, dims = (torch.randperm(size) for size in (q.shape[2], *k.shape[2:]))
    if mask is not None:
        mask = mask[:, :, rows] if mask.shape[2] > 1 else mask
        mask = mask[..., columns] if mask.shape[3] > 1 else mask
    turned = grad[:, :, rows], q[:, :, rows][..., dims], k[:, :, columns][..., dims], v[:, :, columns]
    found = plain_gradients(*turned, mix, mask, scale)
    back = {"q": rows.argsort(), "k": columns.argsort(), "v": columns.argsort()}
    found |= {name: found[name][:, :, order] for name, order in back.items()}
    return found | {name: found[name][..., dims.argsort()] for name in ("q", "k")}


def check_gradients(
    kind: str,
    shape: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    mask: Tensor | None = None,
    *,
    size: float = 1.0,
    scale: float = 0.3,
    draws: int = 6,
    orders: int = 2,
) -> None:
    """All gradients of several random calls taken together: in a few numbers the plain form may be exact by chance.

    The plain form is held to be as wrong as the worst of several orders in which it adds.
    """
    got, plains, exact = [], [], []
    for _ in range(draws):
        q, k, v = make_qkv(*shape, dtype, size)
        grad, mix = torch.randn(q.shape).to(dtype), make_mix(kind, shape[1])
        call = grad, q, k, v, mix, mask, scale
        wide = [t.double() for t in (grad, q, k, v)]
        got.append(gradients(*call))
        exact.append(plain_gradients(*wide, mix.to(torch.float64), mask, scale))
        plains.append([plain_gradients(*call), *(reordered_gradients(*call) for _ in range(orders))])
    for name in got[0]:
        each = (got, exact, *zip(*plains, strict=True))
        ours, right, *others = (torch.stack([found[name] for found in of_draws]) for of_draws in each)
        assert_as_accurate(ours, others, right, name=name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_every_kind(isa: str, kind: str, dtype: torch.dtype) -> None:
    for heads, queries, keys, dim in ((4, 37, 53, 32), (12, 20, 21, 33), (1, 5, 3, 7), (32, 3, 6, 5), (6, 18, 8, 48)):
        check_gradients(kind, (2, heads, queries, keys, dim), dtype, draws=16 if heads == 1 else 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 16, 31, 64, 96, 127, 128])
def test_gradients_of_head_dimensions(isa: str, dim: int, dtype: torch.dtype) -> None:
    check_gradients("talking", (1, 3, 20, 14, dim), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [(1, 1), (1, 50), (50, 1), (2, 3), (15, 16), (16, 17), (33, 12), (65, 129)], ids=str)
def test_gradients_of_token_counts(isa: str, tokens: tuple[int, int], dtype: torch.dtype) -> None:
    for kind in ("talking", "layer norm"):
        # Of nearly equal heads the norm's gradient is rounding, which another order of adding changes tenfold.
        orders = 2 if kind == "talking" else 8
        check_gradients(kind, (2, 4, *tokens, 24), dtype, orders=orders)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(12, 197, 197, 32), (8, 196, 196, 48)], ids=str)
def test_gradients_at_sizes_of_the_models(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    for kind in ("post", "talking", "layer norm"):
        check_gradients(kind, (1, *shape), dtype, draws=1)


MASKS = [(2, 1, 1, 30), (1, 1, 1, 30), (2, 1, 1, 1), (2, 1, 20, 30), (1, 4, 20, 1), (2, 4, 1, 30), (2, 4, 20, 30)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", MASKS, ids=str)
def test_gradients_under_masks(isa: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for kind in ("talking", "layer norm"):
        check_gradients(kind, (2, 4, 20, 30, 16), dtype, torch.rand(shape) < 0.6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["talking", "layer norm"])
def test_rows_without_a_key_have_no_gradient(isa: str, kind: str, dtype: torch.dtype) -> None:
    shape = (3, 4, 20, 30, 16)
    padding = torch.ones(3, 1, 1, 30, dtype=torch.bool)
    padding[1] = False
    padding[2, :, :, 5:] = False
    rows = torch.rand(3, 1, 20, 30) < 0.5
    rows[:, :, 5] = False
    for mask in (padding, rows):
        check_gradients(kind, shape, dtype, mask)
    q, k, v = make_qkv(*shape, dtype)
    call = torch.randn(q.shape).to(dtype), q, k, v, make_mix(kind, shape[1])
    got = gradients(*call, padding, 0.3)
    assert not any(got[name][1].any() for name in ("q", "k", "v"))
    assert not got["k"][2, :, 5:].any() and not got["v"][2, :, 5:].any()
    assert not gradients(*call, rows, 0.3)["q"][:, :, 5].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [4.0, 30.0])
def test_gradients_of_large_logits(isa: str, size: float, dtype: torch.dtype) -> None:
    """Peaked rows, and with the larger size rows of one one: where two keys tie, rounding decides by how much."""
    for kind in ("post", "talking", "layer norm"):
        check_gradients(kind, (1, 4, 30, 40, 16), dtype, size=size, scale=1.0, orders=5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_of_gradients(dtype: torch.dtype) -> None:
    q, k, v = make_qkv(2, 4, 21, 21, 18, dtype)
    mix, grad = make_mix("talking", 4), torch.randn(2, 4, 42, 18).to(dtype)[:, :, ::2]
    got = gradients(grad, q, k, v, mix, None, 0.3)
    assert all(got[name].transpose(1, 2).is_contiguous() for name in ("q", "k", "v"))
    again = gradients(grad.contiguous(), q.contiguous(), k.contiguous(), v.contiguous(), mix, None, 0.3)
    assert all(torch.equal(gradient, again[name]) for name, gradient in got.items())
    one, expanded = k[:1].contiguous(), k[:1].expand_as(k)
    got = gradients(grad, q, expanded, v, mix, None, 0.3)
    again = gradients(grad, q, one.repeat(2, 1, 1, 1), v, mix, None, 0.3)
    assert all(torch.equal(gradient, again[name]) for name, gradient in got.items())


def test_gradients_of_nothing() -> None:
    mix = make_mix("talking", 4)
    for batch, queries, keys in ((0, 3, 3), (2, 0, 3), (2, 3, 0)):
        q, k, v = make_qkv(batch, 4, queries, keys, 8, torch.float32)
        got = gradients(torch.randn(q.shape), q, k, v, mix, None, 0.3)
        assert all(not gradient.any() for gradient in got.values())
        sums, moments = torch.ops.fastvit.head_map_moments(q, k, None, None, None, 0.3, torch.eye(4))
        assert not moments.any() and (keys == 0 or not sums.any())


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_nothing_but_rounding(threads: int) -> None:
    """A single batch element is split between threads, and the same number of them gives the same bits."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        check_gradients("talking", (1, 4, 70, 50, 16), torch.float32)
        q, k, v = make_qkv(1, 4, 70, 50, 16, torch.float32)
        call = (torch.randn(q.shape), q, k, v, make_mix("talking", 4), None, 0.3)
        first = gradients(*call)
        for _ in range(3):
            assert all(torch.equal(gradient, first[name]) for name, gradient in gradients(*call).items())
    finally:
        torch.set_num_threads(before)


def plain_moments(q: Tensor, k: Tensor, mix: Mix, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    mix = mix.to(q.dtype)
    centred = (plain_maps(q, k, mix, mask, scale) - 1 / k.shape[2]).transpose(0, 1).flatten(1)
    return centred.sum(1), centred @ centred.T


def moment_gradients(
    dmoments: Tensor, q: Tensor, k: Tensor, mix: Mix, mask: Tensor | None, scale: float
) -> tuple[Tensor, ...]:
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, mix.pre_weight, mix.pre_bias) if t is not None]
    pre = [*leaves[2:], None, None][:2]
    sums, moments = plain_moments(leaves[0], leaves[1], Mix(*pre), mask, scale)
    return torch.autograd.grad((sums, moments), leaves, (torch.ones_like(sums), dmoments.to(q.dtype)))


def of_moments(dmoments: Tensor, q: Tensor, k: Tensor, mix: Mix, mask: Tensor | None, scale: float) -> list[Tensor]:
    """The moments, and the gradients of everything they are made of."""
    return [*plain_moments(q, k, mix, mask, scale), *moment_gradients(dmoments, q, k, mix, mask, scale)]


MOMENT_CASES: list[tuple[tuple[int, int, int, int, int], tuple[int, ...] | None]] = [
    ((2, 4, 37, 53, 32), None),
    ((2, 12, 20, 21, 33), None),
    ((2, 1, 5, 3, 7), None),
    ((2, 32, 3, 6, 5), None),
    ((2, 4, 20, 30, 16), (2, 1, 1, 30)),
    ((2, 4, 20, 30, 16), (2, 4, 20, 30)),
    ((2, 4, 20, 30, 16), (2, 1, 1, 1)),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["post", "talking"])
def test_moments_and_their_gradients(isa: str, kind: str, dtype: torch.dtype) -> None:
    operators = torch.ops.fastvit
    for shape, mask_shape in MOMENT_CASES:
        heads = shape[1]
        mask = None if mask_shape is None else torch.rand(mask_shape) < 0.5
        got, plain, exact = [], [], []
        for _ in range(16 if heads == 1 else 3):
            q, k, _ = make_qkv(*shape, dtype, 2.0)
            mix, dmoments = make_mix(kind, heads), torch.randn(heads, heads)
            wide = q.double(), k.double(), mix.to(torch.float64), mask, 0.3
            with poisoned_empty():
                sums, moments = operators.head_map_moments(q, k, *mix[:2], mask, 0.3, torch.eye(heads))
                grads = operators.head_map_moments_backward(torch.ones(heads), dmoments, q, k, *mix[:2], mask, 0.3)
            got.append([sums, moments.float(), *(t for t in grads if t.numel())])
            plain.append(of_moments(dmoments, q, k, mix, mask, 0.3))
            exact.append(of_moments(dmoments, *wide))
        for ours, theirs, right in zip(*(zip(*each, strict=True) for each in (got, plain, exact)), strict=True):
            assert_as_accurate(torch.stack(ours), torch.stack(theirs).to(ours[0].dtype), torch.stack(right))


def test_bad_arguments_are_named() -> None:
    q, k, v = make_qkv(1, 4, 9, 9, 8, torch.float32)
    mix = make_mix("post", 4)
    ops = torch.ops.fastvit
    for match, call in {
        "grad has shape": lambda: ops.head_mixed_attention_backward(q[:, :3], q, k, v, *mix, None, 1.0),
        "grad is bfloat16": lambda: ops.head_mixed_attention_backward(q.bfloat16(), q, k, v, *mix, None, 1.0),
        "grad must have a contiguous last axis": lambda: ops.head_mixed_attention_backward(
            q[..., :1].expand_as(q), q, k, v, *mix, None, 1.0
        ),
        "are for a layer norm only": lambda: ops.head_mixed_attention_backward(
            q, q, k, v, *mix._replace(norm_bias=torch.ones(4)), None, 1.0
        ),
        "post_weight has shape": lambda: ops.head_mixed_attention_backward(
            q, q, k, v, *mix._replace(post_weight=torch.eye(3)), None, 1.0
        ),
        "dsums has shape": lambda: ops.head_map_moments_backward(
            torch.ones(3), torch.eye(4), q, k, None, None, None, 1.0
        ),
        "dmoments has shape": lambda: ops.head_map_moments_backward(
            torch.ones(4), torch.eye(3), q, k, None, None, None, 1.0
        ),
        "weight has shape": lambda: ops.head_map_moments(q, k, None, None, None, 1.0, torch.eye(3)),
        "expected at most 32 heads, got 33": lambda: ops.head_map_moments(
            *make_qkv(1, 33, 2, 2, 4, q.dtype)[:2], *(None,) * 3, 1.0, torch.eye(33)
        ),
    }.items():
        with pytest.raises(RuntimeError, match=match):
            call()


@pytest.mark.parametrize("kind", ["talking", "layer norm"])
def test_opcheck_of_gradients_and_moments(kind: str) -> None:
    q, k, v = make_qkv(2, 4, 9, 10, 8, torch.float32)
    mix = make_mix(kind, 4)
    mask = torch.rand(2, 1, 9, 10) < 0.5
    ops = torch.ops.fastvit
    torch.library.opcheck(ops.head_mixed_attention_backward.default, (torch.randn(q.shape), q, k, v, *mix, mask, 0.3))
    torch.library.opcheck(ops.head_map_moments.default, (q, k, *mix[:2], mask, 0.3, torch.eye(4)))
    small = (torch.ones(4), torch.randn(4, 4))
    torch.library.opcheck(ops.head_map_moments_backward.default, (*small, q, k, *mix[:2], mask, 0.3))
