"""Chains without any mode: what each step makes of one, what it costs an operator, and where it breaks off."""

from __future__ import annotations

import math

import pytest
import torch

from fastvit.recognise.chain import (
    Bias,
    BreaksOff,
    Cast,
    Chain,
    Fill,
    Mix,
    Normalise,
    Permute,
    Reshape,
    Scale,
    Softmax,
    Step,
)
from fastvit.recognise.transitions import follow
from fastvit.reference.functional import BatchNorm, LayerNorm
from tests.helpers import assert_as_accurate

DOUBLE = torch.float64


def operands(batch=2, heads=3, queries=5, keys=7, width=4):
    sizes = (queries, keys, keys)
    return [torch.randn(batch, heads, size, width, dtype=DOUBLE) for size in sizes]


def chain_of(q, k, *steps: Step) -> Chain:
    chain = Chain.begin(q, k)
    for step in steps:
        chain = follow(chain, step)
    return chain


def softmax(place: int = 3) -> Softmax:
    return Softmax(place, DOUBLE)


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10, equal_nan=True)


def test_scales_and_biases_keep_their_order():
    q, k, v = operands()
    one, two = torch.randn(3, 5, 7, dtype=DOUBLE), torch.randn(7, dtype=DOUBLE)
    factor = torch.rand(3, 1, 1, dtype=DOUBLE)
    chain = chain_of(q, k, Scale(0.5), Scale(factor), Bias(one), Scale(4.0, divides=True), Bias(two, -2.0), softmax())
    expected = ((q @ k.mT * 0.5 * factor + one) / 4.0 - 2.0 * two).softmax(-1) @ v
    close(chain.attend(v), expected)
    assert chain.operator() == "masked_attention"
    assert chain.told == ("q@k^T", "*c", "*tensor", "+bias", "/c", "+bias", "softmax")


@pytest.mark.parametrize("value", [-math.inf, torch.finfo(DOUBLE).min])
def test_rows_without_a_key_are_those_of_the_plain_code(value):
    q, k, v = (tensor.requires_grad_() for tensor in operands())
    mask = torch.rand(2, 1, 5, 7) > 0.5
    mask[1, :, 2] = True

    def results(out):
        return [out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))]

    got = results(chain_of(q, k, Fill(mask, value), softmax()).attend(v))
    expected = results((q @ k.mT).masked_fill(mask, value).softmax(-1) @ v)
    assert bool(expected[0][1, 0, 2].isnan().all()) == (value == -math.inf)
    for one, other in zip(got, expected, strict=True):
        close(one, other)


def test_rows_without_a_key_under_a_bias():
    q, k, v = (tensor.requires_grad_() for tensor in operands())
    bias = torch.randn(5, 7, dtype=DOUBLE)
    bias[2] = -math.inf
    bias.requires_grad_()

    def results(out):
        return [out, *torch.autograd.grad(out, (q, k, v, bias), torch.ones_like(out))]

    got = results(chain_of(q, k, Bias(bias), softmax()).attend(v))
    expected = results((q @ k.mT + bias).softmax(-1) @ v)
    assert expected[0][:, :, 2].isnan().all()
    for one, other in zip(got, expected, strict=True):
        close(one, other)


def test_a_softmax_over_the_rows_makes_them_the_keys():
    q, k, v = operands()
    bias, mask = torch.randn(7, 5, dtype=DOUBLE), torch.rand(7, 1) > 0.7
    chain = chain_of(k, q, Bias(bias), Fill(mask, -math.inf), softmax(2), Permute((0, 1, 3, 2)))
    assert chain.shape == (2, 3, 5, 7)
    expected = (k @ q.mT + bias).masked_fill(mask, -math.inf).softmax(-2).mT @ v
    chain.check_values(v)
    close(chain.attend(v), expected)


def test_leading_axes_are_followed_through_reshapes():
    q, k, v = operands(batch=4)
    bias, mask = torch.randn(3, 5, 7, dtype=DOUBLE), torch.randn(2, 1, 5, 7, dtype=DOUBLE)
    steps = (Bias(bias), Reshape((2, 2, 3, 5, 7)), Bias(mask), Reshape((4, 3, 5, 7)), softmax())
    expected = ((q @ k.mT + bias).view(2, 2, 3, 5, 7) + mask).view(4, 3, 5, 7).softmax(-1) @ v
    close(chain_of(q, k, *steps).attend(v), expected)
    flat = chain_of(q, k, Bias(bias), Reshape((12, 5, 7)), Bias(bias.repeat(4, 1, 1)), Softmax(2, DOUBLE))
    close(flat.attend(v.flatten(0, 1)), (q @ k.mT + 2 * bias).softmax(-1).flatten(0, 1) @ v.flatten(0, 1))


def test_mixes_and_norms_over_heads():
    q, k, v = operands()
    before, after = torch.randn(3, 3, dtype=DOUBLE), torch.randn(3, 3, dtype=DOUBLE)
    shift, weight = torch.randn(3, dtype=DOUBLE), torch.rand(3, dtype=DOUBLE)
    norm = LayerNorm(weight, shift, 1e-3)
    turned = Permute((0, 2, 3, 1)), Permute((0, 3, 1, 2))
    chain = chain_of(
        *(q, k, Scale(0.3), turned[0], Mix(before, shift, 3, "linear"), turned[1], Scale(2.0), softmax()),
        *(Scale(0.5), Mix(after, shift, 1, "conv2d"), turned[0], Normalise(norm, 3), turned[1], Scale(3.0)),
    )
    maps = 2.0 * (torch.einsum("hg,bgij->bhij", before, q @ k.mT * 0.3) + shift[:, None, None])
    maps = torch.einsum("hg,bgij->bhij", after, 0.5 * maps.softmax(-1)) + shift[:, None, None]
    assert chain.operator() == "head_mixed_attention"
    close(chain.attend(v), 3.0 * norm(maps) @ v)


def test_values_of_another_width_and_one_head_for_all():
    q, k, v = operands()
    maps = (q @ k.mT).softmax(-1)
    for width in (2, 9):
        other = torch.randn(2, 3, 7, width, dtype=DOUBLE)
        close(chain_of(q, k, softmax()).attend(other), maps @ other)
    close(chain_of(q, k[:, :1], softmax()).attend(v[:, :1]), (q @ k[:, :1].mT).softmax(-1) @ v[:, :1])


def test_few_queries_are_class_attention():
    q, k, v = operands(queries=1)
    chain = chain_of(q, k, softmax())
    assert chain.operator() == "class_attention"
    close(chain.attend(v), (q @ k.mT).softmax(-1) @ v)


def test_a_wider_softmax_is_no_obstacle():
    q, k, v = (tensor.bfloat16() for tensor in operands(queries=33, keys=40, width=16))
    steps = (Scale(0.25), Cast(torch.float32), Softmax(3, torch.float32), Cast(torch.bfloat16))
    chain = chain_of(q, k, *steps)
    chain.check_values(v)
    plain = (q @ k.mT * 0.25).float().softmax(-1).bfloat16() @ v
    exact = (q.double() @ k.double().mT * 0.25).softmax(-1) @ v.double()
    assert_as_accurate(chain.attend(v), plain, exact)
    with pytest.raises(BreaksOff, match=r"the values are torch.bfloat16, the map is torch.float32"):
        chain_of(q, k, *steps[:3]).check_values(v)


Q, K, V = operands()
MASK = torch.zeros(5, 7, dtype=torch.bool)
SQUARE = torch.randn(3, 3, dtype=DOUBLE)
NORM = BatchNorm(torch.zeros(3), torch.ones(3), None, None)
MIX = Mix(SQUARE, None, 1, "conv2d")


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        ([Fill(MASK, -1e4)], "filled with -10000.0, which weighs them"),
        ([Fill(MASK.double(), -math.inf)], "a mask of torch.float64"),
        ([Fill(MASK, -math.inf), Scale(2.0)], "masked logits are scaled"),
        ([Fill(MASK, -math.inf), Fill(MASK, torch.finfo(DOUBLE).min)], "filled with -inf and with"),
        ([Bias(torch.zeros(7, dtype=DOUBLE)), Fill(MASK, torch.finfo(DOUBLE).min)], "with a bias are filled"),
        ([Bias(torch.zeros(6, dtype=DOUBLE))], r"\(6,\) does not broadcast over a map \(2, 3, 5, 7\)"),
        ([Bias(torch.zeros(7, dtype=torch.long))], "a tensor of torch.int64 is added"),
        ([Scale(torch.ones(5, 7, dtype=DOUBLE))], "differs from entry to entry"),
        ([Scale(math.inf)], "scaled by inf"),
        ([Scale(0.0, divides=True)], "divides by zero"),
        ([softmax(), softmax()], "a second softmax"),
        ([Softmax(1, DOUBLE)], "neither queries nor keys"),
        ([softmax(), Bias(torch.zeros(7, dtype=DOUBLE))], "added behind the softmax"),
        ([softmax(), Fill(MASK, -math.inf)], "masked behind the softmax"),
        ([Reshape((2, 3, 35))], "is reshaped"),
        ([MIX, MIX], "mixed twice in front"),
        ([softmax(), MIX, MIX], "mixed twice behind"),
        ([Mix(SQUARE, None, 2, "linear")], "another axis than the heads"),
        ([Mix(torch.zeros(4, 3, dtype=DOUBLE), None, 1, "conv2d")], "makes 4 heads of 3"),
        ([Bias(torch.zeros(7, dtype=DOUBLE)), MIX], "with a bias, a mask"),
        ([MIX, Bias(torch.zeros(7, dtype=DOUBLE))], "added behind a mix"),
        ([Normalise(NORM, 1)], "elsewhere than behind the softmax"),
        ([softmax(), Scale(2.0), Normalise(NORM, 1)], "behind a factor"),
        ([Cast(torch.int8)], "becomes torch.int8"),
    ],
)
def test_where_a_chain_breaks_off(steps, reason):
    with pytest.raises(BreaksOff, match=reason):
        chain_of(Q, K, *steps)


def test_what_is_no_product_with_values():
    with pytest.raises(BreaksOff, match="no softmax"):
        chain_of(Q, K).check_values(V)
    for values in (V[:, :, 1:], V[:1].expand(3, -1, -1, -1), V[0]):
        with pytest.raises(BreaksOff, match="not one for each key"):
            chain_of(Q, K, softmax()).check_values(values)
    bias = torch.zeros(7, dtype=DOUBLE)
    single = [tensor.float() for tensor in (Q, K)]
    with pytest.raises(BreaksOff, match="is rounded"):
        chain_of(*single, Bias(bias))
    with pytest.raises(BreaksOff, match="makes a map of torch.float32 wider"):
        chain_of(*single, Scale(torch.ones(1, dtype=DOUBLE)))
