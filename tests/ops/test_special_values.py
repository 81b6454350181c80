"""NaN, infinities and large numbers: where the plain form puts them, and never out of what is masked.

The oracle of attention under a mask is attention without the masked keys, query by query. An additive bias of -inf
masks as False does.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastvit import ops
from fastvit.reference import functional
from fastvit.reference.functional import BatchNorm, LayerNorm
from tests.helpers import assert_as_accurate, poisoned_empty

NAN, INF = math.nan, math.inf
DTYPES = (torch.float32, torch.bfloat16)
ACTIVATIONS = ("gelu", "quick_gelu", "silu", "relu", "gelu_tanh")

# --- Activations ----------------------------------------------------------------------------------------------------

SPECIAL = [NAN, INF, -INF, 1e30, -1e30, 3.3e38, -3.3e38, 2.1e38, -2.1e38, 100.0, -100.0, 0.0, -0.0, 1e-40, 13.5, -13.5]


def special(channels: int, dtype: torch.dtype) -> Tensor:
    """Two tokens of each special number in every channel, among ordinary ones."""
    values = torch.tensor(SPECIAL).repeat_interleave(2)[:, None].expand(-1, channels)
    ordinary = torch.linspace(-7.0, 7.0, 41)[:, None].expand(-1, channels)
    return torch.cat((values, ordinary))[None].to(dtype)


def compare(function: Callable[[Tensor], Tensor], plain: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """The result and the gradient of x where the plain form has them, NaN and infinities included."""
    results = []
    for call, given in ((function, x), (plain, x), (plain, x.double())):
        leaf = given.clone().requires_grad_()
        out = call(leaf)
        (grad,) = torch.autograd.grad(out, leaf, torch.ones_like(out))
        with torch.no_grad():
            results.append((out.detach(), grad, call(given)))
    for name, *three in zip(("out", "dx", "inference"), *results, strict=True):
        assert_as_accurate(*three, name=name)


@pytest.mark.parametrize("channels", [7, 40])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("where", ["pre_activation", "activation"])
def test_activations_around_a_convolution(isa, where, activation, dtype, channels):
    x = special(channels, dtype)
    tokens = x.shape[1]
    for batch, grid, kernel in ((1, (1, tokens), 1), (tokens, (1, 1), 3)):  # of 3x3 taps one sees the map
        weight = torch.zeros(channels, 1, kernel, kernel, dtype=dtype)
        weight[:, :, kernel // 2, kernel // 2] = 1.0
        given = x.reshape(batch, -1, channels)

        def call(form, x, weight=weight, grid=grid, **more):
            return form(x, weight.to(x.dtype), grid=grid, **{where: activation}, **more)

        def fused(x, call=call):
            return call(ops.token_depthwise_conv, x, backend="cpp")

        compare(fused, lambda x, call=call: call(functional.token_depthwise_conv, x), given)


def test_gelu_everywhere(isa):
    """Held to the rule in every tenth of a unit by itself, where the results of others would hide its errors."""
    x = torch.linspace(-13.0, 13.0, 260 * 512 + 1)[1:].view(1, -1, 64)

    def call(form, dtype):
        leaf = x.to(dtype).requires_grad_()
        weight = torch.ones(64, 1, 1, 1, dtype=dtype)
        out = form(leaf, weight, grid=(1, x.shape[1]), activation="gelu")
        return out.detach(), *torch.autograd.grad(out, leaf, torch.ones_like(out))

    forms = (functional.token_depthwise_conv, torch.float32), (functional.token_depthwise_conv, torch.float64)
    for name, *three in zip(
        ("out", "dx"), call(fused_conv, torch.float32), *(call(*form) for form in forms), strict=True
    ):
        for part, *piece in zip(range(-130, 130), *(tensor.reshape(260, -1) for tensor in three), strict=True):
            assert_as_accurate(*piece, name=f"{name} from {part / 10}")


@pytest.mark.parametrize("columns", [1, 70])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_behind_a_product(isa, activation, dtype, columns):
    x, weight = special(1, dtype), torch.ones(columns, 1, dtype=dtype)
    fused = ops.linear(x, weight, None, activation, backend="cpp")
    plain = functional.linear(x, weight, None, activation)
    exact = functional.linear(x.double(), weight.double(), None, activation)
    assert_as_accurate(fused, plain, exact)


# --- Masked keys ----------------------------------------------------------------------------------------------------


def without_masked(q: Tensor, k: Tensor, v: Tensor, sees: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Attention of each query over the keys it sees (B, H, Nq, Nk), the others removed; zeros where there are none."""
    rows = []
    for b, h, i in itertools.product(*map(range, q.shape[:3])):
        keys = sees[b, h, i].nonzero()[:, 0]
        if len(keys) == 0:
            rows.append(v[b, h, :0].sum(0))
            continue
        logits = scale * (k[b, h, keys] @ q[b, h, i])
        if bias is not None:
            logits = logits + bias.expand(sees.shape)[b, h, i, keys]
        rows.append(logits.softmax(0) @ v[b, h, keys])
    return torch.stack(rows).view_as(q)


def hold_attention(function, q, k, v, mask, bias, grad, names=("out", "dq", "dk", "dv", "dbias")):
    """The output and all gradients against the plain form without masked keys; nothing but zeros behind a mask."""
    shape = (*q.shape[:3], k.shape[2])
    sees = torch.ones(shape, dtype=torch.bool)
    if mask is not None:
        sees &= mask[:, None, None] if mask.dim() == 2 else mask
    if bias is not None:
        sees &= bias != -INF
    scale = q.shape[3] ** -0.5

    def run(call, dtype):
        given = (q, k, v, *([] if bias is None else [bias]))
        leaves = [tensor.detach().clone().to(dtype).requires_grad_() for tensor in given]
        out = call(*leaves)
        found = torch.autograd.grad(out, leaves, grad.to(dtype), allow_unused=True)
        return [out.detach(), *(torch.zeros_like(t) if g is None else g for t, g in zip(leaves, found, strict=True))]

    def plain(q, k, v, bias=None):
        return without_masked(q, k, v, sees, bias, scale)

    with poisoned_empty():
        got = run(lambda q, k, v, bias=None: function(q, k, v, mask, bias, backend="cpp"), q.dtype)
    with torch.no_grad():
        inference = function(q, k, v, mask, bias, backend="cpp")
    assert torch.equal(inference.isnan(), got[0].isnan())
    for name, *three in zip(names, got, run(plain, q.dtype), run(plain, torch.float64), strict=False):
        # inf or inf - inf: that is the order of summation
        assert_as_accurate(*(tensor.masked_fill(tensor.isinf(), NAN) for tensor in three), name=name)
    seen = sees.any((2,))[..., None]
    for name, gradient in zip(names[2:4], got[2:4], strict=True):
        assert gradient.masked_select(~seen).eq(0).all(), name


POISON = (NAN, INF, -INF)
SHAPES = [(1, 9, 8), (3, 70, 33), (9, 520, 8), (33, 40, 24)]
HIDING = ["column", "rows", "pairs", "everything"]


def hidden_places(kind: str, heads: int, queries: int, keys: int) -> Tensor:
    """Which keys are hidden from which queries (2, heads, Nq, Nk)."""
    hidden = torch.zeros(2, heads, queries, keys, dtype=torch.bool)
    if kind == "column":
        hidden[:, :, :, :: max(2, keys // 3)] = True
    elif kind == "rows":
        hidden[0, :, :: max(2, queries // 3)] = True
    elif kind == "pairs":
        hidden |= torch.rand(hidden.shape) < 0.4
        hidden[..., 0] = True
    else:
        hidden[1] = True
        hidden[0, :, 0] = True
    return hidden


def poison(q, k, v, grad, hidden, values):
    """Puts what is not finite behind the mask: into keys no query sees, and into queries that see none."""
    unseen = hidden.all(2)
    blind = hidden.all(3)
    for tensor, places in ((k, unseen), (v, unseen), (q, blind), (grad, blind)):
        for index, place in enumerate(places.nonzero().tolist()):
            tensor[tuple(place)][index % tensor.shape[-1]] = values[index % len(values)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", HIDING)
@pytest.mark.parametrize("how", ["bias", "mask", "both"])
@pytest.mark.parametrize(("queries", "keys", "head_dim"), SHAPES)
def test_nothing_leaks_out_of_what_is_hidden(isa, queries, keys, head_dim, how, kind, dtype):
    heads = 2
    q, grad = torch.randn(2, 2, heads, queries, head_dim).to(dtype)
    k, v = torch.randn(2, 2, heads, keys, head_dim).to(dtype)
    hidden = hidden_places(kind, heads, queries, keys)
    poison(q, k, v, grad, hidden, POISON)
    mask = ~hidden if how != "bias" else None
    bias = torch.randn(hidden.shape).to(dtype) if how != "mask" else None
    if how == "bias":
        bias = bias.masked_fill(hidden, -INF)
    elif how == "both":
        half = torch.rand(hidden.shape) < 0.5
        bias, mask = bias.masked_fill(hidden & half, -INF), mask | half
    hold_attention(ops.masked_attention, q, k, v, mask, bias, grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", ["bias", "mask", "broadcast"])
@pytest.mark.parametrize(("queries", "keys", "head_dim"), SHAPES)
def test_who_sees_what_is_not_finite_alone_is_not_finite(isa, queries, keys, head_dim, how, dtype):
    """A key, a value, a query and an output's gradient that some see and others do not."""
    q, grad = torch.randn(2, 1, 2, queries, head_dim).to(dtype)
    k, v = torch.randn(2, 1, 2, keys, head_dim).to(dtype)
    hidden = torch.rand(1, 1 if how == "broadcast" else 2, queries, keys) < 0.5
    hidden[..., 1 % keys] &= hidden[..., 2 % keys]
    k[:, 0, 0, 0], v[:, 0, 1, 1], v[:, 1, 2] = NAN, INF, NAN
    if queries > 2:
        q[:, 1, 1, 0], grad[:, 0, 2, 1] = NAN, NAN
    if how == "mask":
        hold_attention(ops.masked_attention, q, k, v, ~hidden, None, grad)
    else:
        bias = torch.randn(hidden.shape).to(dtype).masked_fill(hidden, -INF)
        hold_attention(ops.masked_attention, q, k, v, None, bias, grad)


@pytest.mark.parametrize("queries", [1, 3, 21])
def test_a_nan_in_the_gradient_of_a_bias_that_all_keys_share(isa, queries):
    q, k, grad = torch.randn(3, 2, 3, queries, 8)
    v = torch.randn(2, 3, queries, 8)
    v[0, 1, 0, 2] = INF
    for rows in (1, queries):
        hold_attention(ops.masked_attention, q, k, v, None, torch.randn(2, 1, rows, 1), grad)


@pytest.mark.parametrize("queries", [1, 3, 21])
def test_the_calls_of_the_issue(isa, queries):
    """A query of NaN that sees no key, and a value of NaN behind a mask of any kind."""
    q, k, v, grad = torch.randn(4, 1, 2, queries, 8)
    q[0, 0, 0] = NAN
    bias = torch.zeros(2, queries, queries)
    bias[:, 0] = -INF
    got = ops.masked_attention(q, k, v, bias=bias, backend="cpp")
    assert got[:, :, 0].eq(0).all() and got.isfinite().all()
    hold_attention(ops.masked_attention, q, k, v, None, bias, grad)

    q, v[:, :, 0] = torch.randn(1, 2, queries, 8), NAN
    everyone = torch.ones(1, 2, queries, queries, dtype=torch.bool)
    everyone[..., 0] = False
    for mask in (everyone, everyone[:, 0, 0]):
        hold_attention(ops.masked_attention, q, k, v, mask, None, grad)


@pytest.mark.parametrize("keys", [3, 600])
@pytest.mark.parametrize("queries", [2, 21])
def test_logits_of_minus_infinity_are_no_mask(isa, queries, keys):
    """A row that sees keys is NaN where all its logits are -inf, with a mask or a bias as without."""
    q, k, v = torch.ones(1, 1, queries, 4), torch.full((1, 1, keys, 4), -INF), torch.randn(1, 1, keys, 4)
    mask = torch.ones(1, 1, queries, keys, dtype=torch.bool)
    mask[..., 0, :] = False
    bias = torch.zeros(queries, keys)
    for given in ((None, None), (mask, None), (None, bias), (mask, bias)):
        got = ops.masked_attention(q, k, v, *given, backend="cpp")
        blind = 0 if given[0] is None else 1
        assert got[..., blind:, :].isnan().all() and got[..., :blind, :].eq(0).all()
    k[..., keys // 2, :] = 1.0
    got = ops.masked_attention(q, k, v, None, bias, backend="cpp")
    torch.testing.assert_close(got, v[..., keys // 2 : keys // 2 + 1, :].expand_as(got))


@pytest.mark.parametrize("queries", [2, 21])
def test_an_infinite_key_at_a_logit_of_minus_infinity_is_seen(queries):
    """As without a mask its weight is zero, and its product with that in the gradient of the query is NaN."""
    q, grad = torch.rand(1, 2, queries, 8), torch.randn(1, 2, queries, 8)
    k, v = torch.randn(2, 1, 2, 9, 8)
    k[..., 3, 5], k[..., 4, 1] = -INF, NAN
    mask = torch.ones(1, 1, queries, 9, dtype=torch.bool)
    mask[..., 4], mask[:, :, 1, 3] = False, False

    def plain(q, k, v, mask, bias, backend):
        return functional.masked_attention(q, k, v, mask, bias)

    for function in (plain, ops.masked_attention):
        hold_attention(function, q, k, v, mask, None, grad)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("queries", [9, 20])
def test_an_infinite_key_spoils_no_gradient_of_others(isa, queries, masked):
    """Not by way of the lanes of a vector that have no query."""
    q, grad = torch.rand(1, 2, queries, 8) + 0.1, torch.randn(1, 2, queries, 8)
    k, v = torch.randn(2, 1, 2, 11, 8)
    k[..., 3, 5] = -INF
    mask = torch.ones(1, 1, queries, 11, dtype=torch.bool) if masked else None
    hold_attention(ops.masked_attention, q, k, v, mask, None, grad)
    leaf = k.requires_grad_()
    out = ops.masked_attention(q, leaf, v, mask, backend="cpp")
    assert torch.autograd.grad(out, leaf, grad)[0].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", ["bias", "mask", "keys"])
@pytest.mark.parametrize("queries", [1, 3])
def test_class_attention(isa, queries, how, dtype):
    q, grad = torch.randn(2, 2, 3, queries, 24).to(dtype)
    k, v = torch.randn(2, 2, 3, 70, 24).to(dtype)
    hidden = torch.zeros(2, 3, queries, 70, dtype=torch.bool)
    hidden[:, :, :, ::7] = True
    hidden[1, 1, 0] = True
    poison(q, k, v, grad, hidden, POISON)
    if how == "keys":
        k[:, :, ::7], v[:, :, ::7] = NAN, INF
        q, grad = torch.randn(2, 2, 3, queries, 24).to(dtype)
        k[1, 1], v[1, 1] = torch.randn(2, 70, 24).to(dtype)
        hold_attention(ops.class_attention, q, k, v, ~hidden[:, 0, 0], None, grad)
    elif how == "mask":
        hold_attention(ops.class_attention, q, k, v, ~hidden, None, grad)
    else:
        bias = torch.randn(hidden.shape).to(dtype).masked_fill(hidden, -INF)
        hold_attention(ops.class_attention, q, k, v, None, bias, grad)


# --- Head-mixed attention -------------------------------------------------------------------------------------------

MIXES = ["talking heads", "layer norm", "running", "batch"]


def mixed_without_masked(form, q, k, v, small, mask):
    """The plain form of each query over the keys it sees; zeros where there are none."""
    rows = []
    for b, i in itertools.product(range(q.shape[0]), range(q.shape[2])):
        keys = mask[b, 0, i].nonzero()[:, 0]
        some = slice(b, b + 1)
        if len(keys) == 0:
            rows.append(v[b, :, :0].sum(1))
        else:
            rows.append(form(q[some, :, i : i + 1], k[some][:, :, keys], v[some][:, :, keys], *small)[0, :, 0])
    return torch.stack(rows).view(q.shape[0], q.shape[2], *q.shape[1::2]).transpose(1, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["column", "rows", "pairs"])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(("heads", "queries", "keys"), [(3, 5, 9), (8, 20, 21)])
def test_head_mixing(isa, heads, queries, keys, mix, kind, dtype):
    q, grad = torch.randn(2, 2, heads, queries, 16).to(dtype)
    k, v = torch.randn(2, 2, heads, keys, 16).to(dtype)
    small = [torch.randn(heads, heads), torch.randn(heads), torch.randn(heads, heads), torch.randn(heads)]
    hidden = hidden_places(kind, 1, queries, keys)
    poison(q, k, v, grad, hidden.expand(2, heads, queries, keys), POISON)
    clean = [torch.where(tensor.isfinite(), tensor, 0.0) for tensor in (q, k, v, grad)]

    def form(function, q, k, v, a, b, c, d, **more):
        if mix == "talking heads":
            return function(q, k, v, pre_weight=a, pre_bias=b, post_weight=c, post_bias=d, **more)
        if mix == "layer norm":
            return function(q, k, v, post_weight=a, post_bias=b, norm=LayerNorm(c[0], d), **more)
        statistics = a.new_zeros(heads), a.new_ones(heads)
        norm = BatchNorm(*statistics, c[0], d, use_batch_stats=mix == "batch")
        return function(q, k, v, pre_weight=c, post_weight=a, post_bias=b, norm=norm, **more)

    def run(call, tensors, grad, dtype):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors]
        leaves += [tensor.to(torch.promote_types(dtype, torch.float32)).requires_grad_() for tensor in small]
        out = call(*leaves)
        found = torch.autograd.grad(out, leaves, grad.to(dtype), allow_unused=True)
        return [out.detach(), *(torch.zeros_like(t) if g is None else g for t, g in zip(leaves, found, strict=True))]

    def plain(q, k, v, *small):
        mixes = [tensor.to(q.dtype) for tensor in small]

        def one(*given):
            return form(functional.head_mixed_attention, *given)

        if mix != "batch":
            return mixed_without_masked(one, q, k, v, mixes, ~hidden)
        return form(functional.head_mixed_attention, q, k, v, *mixes, mask=~hidden)

    def fused(q, k, v, *small):
        return form(ops.head_mixed_attention, q, k, v, *small, mask=~hidden, backend="cpp")

    with poisoned_empty():
        got = run(fused, (q, k, v), grad, dtype)
    given = clean if mix == "batch" else (q, k, v, grad)  # statistics are those of masked positions too
    wanted = [run(plain, given[:3], given[3], one) for one in (dtype, torch.float64)]
    for index, three in enumerate(zip(got, *wanted, strict=True)):
        right = three if three[0].dtype == three[1].dtype else (three[0], three[1].to(three[0].dtype), three[2])
        assert_as_accurate(*right, name=f"result {index}")
    unseen = hidden.all(2)[..., None].expand_as(k)
    assert got[2][unseen].eq(0).all() and got[3][unseen].eq(0).all()


@pytest.mark.parametrize("training", [False, True])
def test_a_nan_bias_of_a_mix_shows(isa, training):
    """Batch statistics take a finite bias away again; not so NaN or infinity."""
    q, k, v = torch.randn(3, 2, 4, 6, 8)
    weight, bias = torch.randn(4, 4), torch.randn(4)
    for value in (NAN, INF):
        bias[1] = value
        norm = BatchNorm(torch.zeros(4), torch.ones(4), torch.ones(4), torch.zeros(4), use_batch_stats=True)
        leaves = [tensor.clone().requires_grad_(training) for tensor in (q, k, v, weight, bias)]
        got = ops.re_attention(*leaves, norm, backend="cpp")
        plain = functional.re_attention(*leaves, norm)
        assert torch.equal(got.isnan(), plain.isnan()) and got[:, 1].isnan().all()


# --- Convolutions and norms -----------------------------------------------------------------------------------------


def assert_finite_where_plain(call: Callable[..., tuple[Tensor, ...]], fused: Callable, plain: Callable) -> None:
    """Each result is finite where the plain form's is, and nowhere else."""
    for got, expected in zip(call(fused), call(plain), strict=True):
        assert torch.equal(got.isfinite(), expected.isfinite())


def fused_conv(*args, **options) -> Tensor:
    return ops.token_depthwise_conv(*args, backend="cpp", **options)


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2), (2, 1)])
@pytest.mark.parametrize("where", ["weight", "x", "gradient"])
def test_zeros_around_a_map_meet_nothing_in_the_backward_pass(isa, where, kernel, stride, value):
    """Zeros of padding and between strided gradients, times an infinite tap or input, would be NaN elsewhere."""
    tensors = {
        "x": torch.randn(2, 35, 20),
        "weight": torch.randn(20, 1, kernel, kernel),
        "gradient": torch.ones(
            2,
            fused_conv(torch.randn(1, 35, 20), torch.randn(20, 1, kernel, kernel), grid=(5, 7), stride=stride).shape[1],
            20,
        ),
    }
    tensors[where].view(-1)[3::97] = value
    x, weight, gradient = (tensors[name] for name in ("x", "weight", "gradient"))

    def call(form):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        out = form(*leaves, grid=(5, 7), stride=stride)
        return torch.autograd.grad(out, leaves, gradient)

    (dx, dweight), (plain_dx, plain_dweight) = call(fused_conv), call(functional.token_depthwise_conv)
    assert torch.equal(dx.isfinite(), plain_dx.isfinite()) and plain_dx.isfinite().any()
    if where != "gradient":  # zeros of x's padding are multiplied, as some of torch's own forms do
        assert torch.equal(dweight.isfinite(), plain_dweight.isfinite()) and plain_dweight.isfinite().any()
    assert dweight.isfinite()[plain_dweight == 0].all()


@pytest.mark.parametrize("kernel", [3, 5])
def test_relu_lets_no_nan_through_where_it_is_zero(isa, kernel):
    x, weight, bias = torch.randn(2, 30, 20), torch.randn(20, 1, kernel, kernel), torch.randn(20)
    bias[4] = INF  # of SiLU, whose gradient is then NaN

    def call(form):
        leaf = x.clone().requires_grad_()
        out = form(leaf, weight, bias, grid=(5, 6), pre_activation="relu", activation="silu")
        return torch.autograd.grad(out.sum(), leaf)

    assert_finite_where_plain(call, fused_conv, functional.token_depthwise_conv)


@pytest.mark.parametrize("kernel", [3, 5])
def test_a_nan_that_given_statistics_keep_from_the_gradient(isa, kernel):
    """With given statistics dx does not depend on the norm's input; NaN in that, or in its shift, stays there."""
    x, weight, bias = torch.randn(2, 30, 20), torch.randn(20, 1, kernel, kernel), torch.randn(20)
    bias[4] = NAN

    def call(form):
        leaf = x.clone().requires_grad_()
        norm = BatchNorm(torch.zeros(20), torch.ones(20), torch.ones(20), torch.zeros(20))
        return torch.autograd.grad(form(leaf, weight, bias, grid=(5, 6), norm=norm).sum(), leaf)

    assert_finite_where_plain(call, fused_conv, functional.token_depthwise_conv)


@pytest.mark.parametrize("momentum", [0.0, 0.1])
@pytest.mark.parametrize("kernel", [3, 5])
def test_nan_in_front_of_batch_statistics(isa, kernel, momentum):
    """The gradient of the convolution's bias is zero, but not of a channel with NaN; and a momentum of 0 times NaN."""
    x, weight = torch.randn(2, 30, 20), torch.randn(20, 1, kernel, kernel)
    x[0, 3, 4] = NAN

    def call(form):
        bias, mean, var = torch.zeros(20, requires_grad=True), torch.zeros(20), torch.ones(20)
        norm = BatchNorm(mean, var, None, None, use_batch_stats=True, momentum=momentum)
        out = form(x, weight, bias, grid=(5, 6), norm=norm)
        return *torch.autograd.grad(out.sum(), bias), mean, var

    assert_finite_where_plain(call, fused_conv, functional.token_depthwise_conv)


def test_an_infinite_scale_of_a_norm(isa):
    """Applied as torch's BatchNorm does, which ReLU makes visible: -inf becomes 0, NaN does not."""
    x, weight = torch.randn(2, 30, 20), torch.randn(20, 1, 3, 3)

    def call(form):
        norm = BatchNorm(None, None, torch.full((20,), -INF), torch.zeros(20), use_batch_stats=True)
        return (form(x, weight, grid=(5, 6), norm=norm, activation="relu"),)

    assert_finite_where_plain(call, fused_conv, functional.token_depthwise_conv)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_nan_shows_in_closed_forms(isa, masked, norm):
    """The gradient of a bias before the softmax, or before batch statistics, and their mean: no constants for NaN."""
    q, k, v = torch.randn(3, 2, 4, 6, 8)
    q[1, 2, 3, 1] = NAN
    mask = torch.rand(2, 1, 6, 6) < 0.7 if masked else None

    def call(form, **more):
        weights = [torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in ((4, 4), (4,)) * 2]
        leaves = [tensor.requires_grad_() for tensor in weights]
        names = ("pre_weight", "pre_bias", "post_weight", "post_bias")
        mean, var = torch.zeros(4), torch.ones(4)
        by_batch = BatchNorm(mean, var, None, None, use_batch_stats=True) if norm else None
        out = form(q, k, v, mask=mask, norm=by_batch, **dict(zip(names, leaves, strict=True)), **more)
        return *torch.autograd.grad(out.sum(), leaves), mean, var

    assert_finite_where_plain(
        call,
        lambda *args, **more: ops.head_mixed_attention(*args, backend="cpp", **more),
        functional.head_mixed_attention,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinite_weights_of_a_mix_bring_nothing_to_hidden_keys(isa, dtype):
    q, k, v = (torch.randn(1, 4, 6, 8).to(dtype).requires_grad_() for _ in range(3))
    weight = torch.eye(4)
    weight[1] = INF
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    mask[..., 4:] = False
    out = ops.head_mixed_attention(q, k, v, pre_weight=weight.to(dtype), mask=mask, backend="cpp")
    (dk,) = torch.autograd.grad(out.float().sum(), k)
    assert dk[:, :, 4:].eq(0).all() and dk.isnan().any()


def test_a_single_value_is_refused_before_running_statistics_move():
    x, weight, outer = torch.randn(1, 1, 8), torch.randn(8, 1, 3, 3), torch.randn(5, 8)
    mean = torch.zeros(8)
    norm = BatchNorm(mean, torch.ones(8), None, None, use_batch_stats=True)
    many = functional.Projection(weight, norm, outer, padding=2)
    single = functional.Projection(weight, norm, outer, padding=1)
    with pytest.raises(ValueError, match=r"v\.norm.*more than 1 value"):
        ops.conv_projection(x, many, many, single, grid=(1, 1))
    with pytest.raises(ValueError, match=r"pre_norm.*more than 1 value"):
        ops.token_depthwise_conv(x, weight, grid=(1, 1), pre_norm=norm)
    assert mean.eq(0).all()


# --- Accuracy -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [1, 3, 6, 16])
def test_layer_norm_over_heads_that_are_all_the_same(isa, heads, dtype):
    """With one key every probability is one: what a layer norm leaves of equal heads, and every gradient, is zero."""
    q, k, v, grad = torch.randn(4, 2, heads, 9, 16).to(dtype)
    leaves = [tensor.clone().requires_grad_() for tensor in (q, k[:, :, :1], v[:, :, :1])]
    for weight in (None, torch.eye(heads)):
        norm = LayerNorm(torch.randn(heads), None, 1e-12)
        with torch.no_grad():
            assert ops.head_mixed_attention(*leaves, post_weight=weight, norm=norm, backend="cpp").eq(0).all()
        out = ops.head_mixed_attention(*leaves, post_weight=weight, norm=norm, backend="cpp")
        assert all(result.eq(0).all() for result in (out, *torch.autograd.grad(out, leaves, grad)))


@pytest.mark.parametrize("size", [100.0, -1e5])
@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
@pytest.mark.parametrize("channels", [5, 48])
def test_large_biases_in_front_of_a_batch_norm(isa, channels, kernel, size):
    """The sums of a convolution do not begin with the bias, which would take their digits at every step."""
    x, weight = torch.randn(4, 64, channels), torch.randn(channels, 1, kernel, kernel)
    bias, grad = size + torch.randn(channels), torch.randn(4, 64, channels)

    def call(form, dtype, **more):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (x, weight)]
        statistics = torch.zeros(channels, dtype=dtype), torch.ones(channels, dtype=dtype)
        norm = BatchNorm(*statistics, None, None, use_batch_stats=True)
        out = form(*leaves, bias.to(dtype), grid=(8, 8), norm=norm, **more)
        found = torch.autograd.grad(out, leaves, grad.to(dtype))
        return [out.detach(), *found, *statistics]

    got = call(ops.token_depthwise_conv, torch.float32, backend="cpp")
    plain, exact = (call(functional.token_depthwise_conv, dtype) for dtype in (torch.float32, torch.float64))
    names = ("out", "dx", "dweight", "running_mean", "running_var")
    for name, *three in zip(names, got, plain, exact, strict=True):
        assert_as_accurate(*three, name=name)


def _with_a_bias(function, x, weight, bias, norm):
    """A convolution in front of a norm, by the operator or the plain form of that name."""
    options, eye = {"grid": (8, 8)}, torch.eye(x.shape[2], dtype=x.dtype)
    if function.__name__ == "token_depthwise_conv":
        return function(x, weight, bias, norm=norm, **options)
    if function.__name__ == "depthwise_separable_conv":
        return function(x, weight, norm, eye, dw_bias=bias, **options)
    return function(x, eye, None, weight, bias, eye, None, dw_norm=norm, prefix_tokens=0, **options)


@pytest.mark.parametrize("name", ["token_depthwise_conv", "depthwise_separable_conv", "leff"])
def test_a_bias_in_front_of_batch_statistics_takes_no_digits(isa, name):
    """In 16 bits, of results much smaller than it: halfway between two such numbers it would make steps of them."""
    x, weight = 1e-4 * torch.randn(4, 64, 24), torch.randn(24, 1, 3, 3)
    bias = torch.full((24,), 1.0 + 2.0**-8)

    def call(module, dtype, bias):
        statistics = torch.zeros(24, dtype=bias.dtype), torch.ones(24, dtype=bias.dtype)
        norm = BatchNorm(*statistics, None, None, use_batch_stats=True, momentum=1.0)
        out = _with_a_bias(getattr(module, name), x.to(dtype), weight.to(dtype), bias, norm)
        return out, *(each.to(torch.float64 if dtype == torch.float64 else torch.float32) for each in statistics)

    got = call(ops, torch.bfloat16, bias)
    plain = call(functional, torch.bfloat16, bias.bfloat16())
    exact = call(functional, torch.float64, bias.double())
    for result, *three in zip(("out", "running_mean", "running_var"), got, plain, exact, strict=True):
        assert_as_accurate(*three, name=result)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_bias_in_front_of_batch_statistics_that_is_not_finite(isa, value):
    x, weight = torch.randn(2, 30, 20), torch.randn(20, 1, 3, 3)

    def call(form):
        bias, statistics = torch.zeros(20), (torch.zeros(20), torch.ones(20))
        bias[3] = value
        leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
        out = form(*leaves, grid=(5, 6), norm=BatchNorm(*statistics, None, None, use_batch_stats=True))
        return out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out)), *statistics

    assert_finite_where_plain(call, fused_conv, functional.token_depthwise_conv)


def test_sums_of_the_last_norm_of_a_leff_at_batch_1():
    """The plain form has them in double there."""
    x, up, taps, down = torch.randn(1, 6400, 8), torch.randn(8, 8), torch.randn(8, 1, 3, 3), torch.randn(8, 8)
    gradient = torch.randn(1, 6400, 8) + 1.0

    def call(form, dtype, **more):
        affine = [torch.ones(8, dtype=dtype, requires_grad=True), torch.zeros(8, dtype=dtype, requires_grad=True)]
        norm = BatchNorm(torch.zeros(8, dtype=dtype), torch.ones(8, dtype=dtype), *affine)
        tensors = (tensor.to(dtype) for tensor in (x, up, taps, down))
        given, up_weight, dw_weight, down_weight = tensors
        layers = (up_weight, None, dw_weight, None, down_weight, None)
        out = form(given, *layers, grid=(80, 80), down_norm=norm, prefix_tokens=0, **more)
        return torch.autograd.grad(out, affine, gradient.to(dtype))

    got = call(ops.leff, torch.float32, backend="cpp")
    plain, exact = (call(functional.leff, dtype) for dtype in (torch.float32, torch.float64))
    for name, *three in zip(("weight", "bias"), got, plain, exact, strict=True):
        assert_as_accurate(*three, name=name)
