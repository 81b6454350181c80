"""What each operation makes of a chain, or why it breaks the chain off."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastvit.recognise.chain import (
    Bias,
    Cast,
    Chain,
    Factor,
    Fill,
    Mix,
    Normalise,
    Operand,
    Permute,
    Reshape,
    Scale,
    Softmax,
    Step,
    break_off,
)

__all__ = ["follow"]


def follow(chain: Chain, step: Step) -> Chain:
    """The chain after one more operation; BreaksOff where no operator could compute the map then."""
    return _TRANSITIONS[type(step)](chain, step)


def _next(chain: Chain, word: str, **changes: Any) -> Chain:
    return chain._replace(told=(*chain.told, word), **changes)


def _operand(chain: Chain, tensor: Tensor) -> Operand:
    """A tensor that broadcasts over the map as it lies, by the axes as they are counted."""
    sizes = zip(reversed(tensor.shape), reversed(chain.shape), strict=False)
    if tensor.dim() > len(chain.order) or any(size not in (1, whole) for size, whole in sizes):
        break_off(f"a tensor of shape {tuple(tensor.shape)} does not broadcast over a map {chain.shape}")
    if not chain.in_order:
        full = tensor[(None,) * (len(chain.order) - tensor.dim())]
        tensor = full.permute([chain.order.index(axis) for axis in range(len(chain.order))])
    return Operand(tensor, chain.lead)


def _factor(chain: Chain, step: Scale) -> Factor:
    assert isinstance(step.by, Tensor)
    if _promoted(chain, step.by) != chain.dtype:
        break_off(f"a factor of {step.by.dtype} makes a map of {chain.dtype} wider")
    operand = _operand(chain, step.by)
    shape = operand.tensor.shape[-2:]
    if any(size != 1 for size in shape):
        break_off(f"a factor of shape {tuple(step.by.shape)} differs from entry to entry of a map")
    return Factor(operand, step.divides)


def _head_axis(chain: Chain, place: int, heads: int | None = None) -> None:
    if len(chain.lead) != 2 or chain.order[place] != 1:
        break_off("it works over another axis than the heads of a map (batch, heads, queries, keys)")
    if heads is not None and heads != chain.lead[1]:
        break_off(f"it makes {heads} heads of {chain.lead[1]}")


def _promoted(chain: Chain, tensor: Tensor) -> torch.dtype:
    """The dtype of the map's sum or product with a tensor."""
    return torch.result_type(torch.empty(1, dtype=chain.dtype, device="meta"), tensor)


def _scale(chain: Chain, step: Scale) -> Chain:
    number = not isinstance(step.by, Tensor)
    word = ("/" if step.divides else "*") + ("c" if number else "tensor")
    if number and step.divides and step.by == 0.0:
        break_off("it divides by zero")
    by = (1.0 / step.by if step.divides else float(step.by)) if number else 1.0
    if chain.softmaxed:
        if number:
            return _next(chain, word, factor=chain.factor * by)
        if chain.operator() == "head_mixed_attention":
            break_off("maps mixed over heads are multiplied by a tensor")
        return _next(chain, word, factors_after=(*chain.factors_after, _factor(chain, step)))
    if chain.masked:
        break_off("masked logits are scaled")
    if not number:
        if chain.biases or chain.pre is not None:
            break_off("logits are multiplied by a tensor behind a bias or a mix")
        return _next(chain, word, factors=(*chain.factors, _factor(chain, step)))
    if not math.isfinite(by):
        break_off(f"logits are scaled by {by}")
    if chain.pre is not None:
        weight, bias = chain.pre
        return _next(chain, word, pre=(weight * by, None if bias is None else bias * by))
    biases = tuple((operand, times * by) for operand, times in chain.biases)
    return _next(chain, word, scale=chain.scale * by, biases=biases)


def _bias(chain: Chain, step: Bias) -> Chain:
    if chain.softmaxed:
        break_off("a tensor is added behind the softmax")
    if chain.pre is not None:
        break_off("a bias is added behind a mix over heads")
    if chain.masked and chain.fill != -math.inf:
        break_off("a bias is added to masked logits")
    if not step.tensor.is_floating_point():
        break_off(f"a tensor of {step.tensor.dtype} is added")
    if _promoted(chain, step.tensor) != chain.dtype or chain.dtype != chain.q.dtype:
        break_off(f"a bias of {step.tensor.dtype} on a map of {chain.dtype}, from q of {chain.q.dtype}, is rounded")
    return _next(chain, "+bias", biases=(*chain.biases, (_operand(chain, step.tensor), step.times)))


def _fill(chain: Chain, step: Fill) -> Chain:
    if step.mask.dtype != torch.bool:
        break_off(f"a mask of {step.mask.dtype} fills the map")
    if chain.softmaxed:
        break_off("the map is masked behind the softmax")
    if chain.pre is not None:
        break_off("maps mixed over heads are masked")
    if step.value not in (-math.inf, torch.finfo(chain.dtype).min):
        break_off(f"masked logits are filled with {step.value}, which weighs them: it is no mask")
    if chain.biases and step.value != -math.inf:
        break_off(f"logits with a bias are filled with {step.value}")
    if chain.fill not in (None, step.value):
        break_off(f"masked logits are filled with {chain.fill} and with {step.value}")
    operand = _operand(chain, ~step.mask if step.outside else step.mask)
    return _next(chain, "mask", masked=(*chain.masked, operand), fill=step.value)


def _softmax(chain: Chain, step: Softmax) -> Chain:
    if chain.softmaxed:
        break_off("a second softmax")
    axis, count = chain.order[step.place], len(chain.order)
    if axis < count - 2:
        break_off(f"the softmax is over axis {step.place}, which is neither queries nor keys")
    chain = _next(chain, "softmax" if axis == count - 1 else "softmax over the rows", softmaxed=True, dtype=step.dtype)
    return chain if axis == count - 1 else _transposed(chain)


def _transposed(chain: Chain) -> Chain:
    """The same map, of which the axis of the first operand counts as the keys."""
    n = len(chain.order)
    swap = {n - 2: n - 1, n - 1: n - 2}

    def turned(operand: Operand) -> Operand:
        full = operand.tensor[(None,) * max(0, 2 - operand.tensor.dim())]
        return Operand(full.transpose(-2, -1), operand.lead)

    return chain._replace(
        q=chain.k,
        k=chain.q,
        order=tuple(swap.get(axis, axis) for axis in chain.order),
        biases=tuple((turned(operand), times) for operand, times in chain.biases),
        masked=tuple(map(turned, chain.masked)),
    )


def _permute(chain: Chain, step: Permute) -> Chain:
    return _next(chain, "permute", order=tuple(chain.order[place] for place in step.places))


def _reshape(chain: Chain, step: Reshape) -> Chain:
    if step.shape == chain.shape:
        return chain
    if not chain.in_order or len(step.shape) < 3 or step.shape[-2:] != chain.shape[-2:]:
        break_off(f"a map {chain.shape} is reshaped to {step.shape}")
    if 0 in step.shape:
        break_off("the map is empty")
    if chain.pre is not None or chain.post is not None or chain.norm is not None:
        break_off("maps mixed over heads are reshaped")
    lead = step.shape[:-2]
    q, k = (tensor.reshape(*lead, *tensor.shape[-2:]) for tensor in (chain.q, chain.k))
    return _next(chain, "reshape", q=q, k=k, lead=lead, order=tuple(range(len(step.shape))))


def _cast(chain: Chain, step: Cast) -> Chain:
    if not step.dtype.is_floating_point:
        break_off(f"the map becomes {step.dtype}")
    return chain if step.dtype == chain.dtype else _next(chain, "cast", dtype=step.dtype)


def _mix(chain: Chain, step: Mix) -> Chain:
    _head_axis(chain, step.place, step.weight.shape[0])
    if chain.biases or chain.masked or chain.factors_after or chain.norm is not None:
        break_off("maps with a bias, a mask, a tensor's factor or a norm are mixed over heads")
    if not step.weight.dtype == chain.dtype == chain.q.dtype:
        break_off(f"maps of {chain.dtype}, from q of {chain.q.dtype}, are mixed by weights of {step.weight.dtype}")
    word = f"{step.name} over heads"
    if not chain.softmaxed:
        if chain.pre is not None:
            break_off("heads are mixed twice in front of the softmax")
        return _next(chain, word, pre=(step.weight, step.bias))
    if chain.post is not None:
        break_off("heads are mixed twice behind the softmax")
    weight = step.weight if chain.factor == 1.0 else step.weight * chain.factor
    return _next(chain, word, post=(weight, step.bias), factor=1.0)


def _normalise(chain: Chain, step: Normalise) -> Chain:
    _head_axis(chain, step.place)
    if not chain.softmaxed or chain.masked or chain.biases or chain.norm is not None:
        break_off("a norm over heads stands elsewhere than behind the softmax of logits without mask and bias")
    if chain.factor != 1.0 or chain.factors_after:
        break_off("a norm over heads comes behind a factor")
    if chain.dtype != chain.q.dtype:
        break_off(f"maps of {chain.dtype} are normalised, q is {chain.q.dtype}")
    return _next(chain, f"{type(step.norm).__name__} over heads", norm=step.norm)


_TRANSITIONS: dict[type, Callable[[Chain, Any], Chain]] = {
    Scale: _scale,
    Bias: _bias,
    Fill: _fill,
    Softmax: _softmax,
    Permute: _permute,
    Reshape: _reshape,
    Cast: _cast,
    Mix: _mix,
    Normalise: _normalise,
}
