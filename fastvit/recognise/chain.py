"""What has been applied to an attention map, and which operator takes the whole at the product with the values.

A :class:`Chain` is plain data: it begins with two tensors whose product is the map, each step gives a new chain
(``transitions.py``), and ``attend(v)`` computes the whole by an operator of ``fastvit.ops``, without the map. What no
operator would compute exactly raises :class:`BreaksOff` with the reason; the caller then computes the map as it is
written. Nothing here knows how operations are spelled (``vocabulary.py``), nor how they are seen (``deferred.py``).

The map's axes are counted as (leading axes..., queries, keys), whatever order they lie in: ``order[i]`` is the axis at
place i. A softmax over the first operand's axis makes that one the keys. Operands stay as they were given, with the
leading axes the map had then; they are brought to (B, H, Nq, Nk) where the operator is called.

What is exact, and what is not:

- A fill by -inf or the dtype's least number is a mask; another number weighs masked keys, so the chain breaks off. The
  operators give zeros for a row without a key, plain code gives NaN or the mean of the values: that is put in.
- Scales, biases, mixes and a norm commute with one another only in part. They are folded where they do.
- A wider map (softmax in float32) is what the operators compute anyway; at the product it must be v's dtype again. A
  bias or factor that makes the map wider breaks it off, as it would be rounded.
"""

from __future__ import annotations

import math
from typing import NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit import ops
from fastvit.reference.functional import BatchNorm, LayerNorm

__all__ = [
    "Bias",
    "BreaksOff",
    "Cast",
    "Chain",
    "Factor",
    "Fill",
    "Mix",
    "Normalise",
    "Permute",
    "Product",
    "Reshape",
    "Scale",
    "Softmax",
    "Step",
]

FEW_QUERIES = 4
"""Up to so many queries, and more keys, it is class attention."""

Axes = tuple[int, ...]

_IN_ORDER = [tuple(range(count)) for count in range(65)]  # torch has no tensors of more axes


class BreaksOff(Exception):  # noqa: N818 (no error: the plain operations follow)
    """No operator computes the map after this step; the message says why."""


def break_off(reason: str) -> NoReturn:
    raise BreaksOff(reason)


# --- Steps ----------------------------------------------------------------------------------------------------------


class Scale(NamedTuple):
    """Times a number or a tensor, or divided by it."""

    by: float | Tensor
    divides: bool = False


class Bias(NamedTuple):
    """``times`` a tensor is added."""

    tensor: Tensor
    times: float = 1.0


class Fill(NamedTuple):
    """``value`` where the bool mask is True (or False, with ``outside``)."""

    mask: Tensor
    value: float
    outside: bool = False


class Softmax(NamedTuple):
    """Over the axis at this place; the result has ``dtype``."""

    place: int
    dtype: torch.dtype


class Permute(NamedTuple):
    """The axis at ``places[i]`` comes to place i."""

    places: Axes


class Reshape(NamedTuple):
    """To this shape; only leading axes may change."""

    shape: Axes


class Cast(NamedTuple):
    """To another dtype."""

    dtype: torch.dtype


class Mix(NamedTuple):
    """Heads mixed linearly: out_h = sum_g weight[h, g] map_g + bias_h, over the axis at ``place``."""

    weight: Tensor
    bias: Tensor | None
    place: int
    name: str


class Normalise(NamedTuple):
    """BatchNorm or LayerNorm over the axis at ``place``."""

    norm: BatchNorm | LayerNorm
    place: int


Step = Scale | Bias | Fill | Softmax | Permute | Reshape | Cast | Mix | Normalise


class Product(NamedTuple):
    """The map times the values.

    Attributes:
        values: (*lead, Nk, Dv), leading axes that broadcast.
        places: the axis of (*lead, Nq, Dv) at each place of the result; None: as they are counted.
        name: how it is spelled.
    """

    values: Tensor
    places: Axes | None
    name: str


class Operand(NamedTuple):
    """A tensor that broadcasts over (*lead, Nq, Nk), and the leading axes the map had when it was applied."""

    tensor: Tensor
    lead: Axes


class Factor(NamedTuple):
    """A tensor that the map is multiplied by or divided by; one number for each of some leading axes."""

    operand: Operand
    divides: bool


class Chain(NamedTuple):
    """A map and what has been applied to it.

    Attributes:
        q, k: (*lead, Nq, D) and (*lead, Nk, D) when the chain began.
        lead: the leading axes now.
        order: the axis at each place; the last two axes are queries and keys.
        dtype: of the map.
        told: a word for each step.
        scale, factors: of the logits. biases: added to them after that.
        masked, fill: where the bool operands are True, the logits are ``fill``.
        pre, post: mixes in front of the softmax and behind it. norm: behind the latter.
        factor, factors_after: of the finished map.
    """

    q: Tensor
    k: Tensor
    lead: Axes
    order: Axes
    dtype: torch.dtype
    told: tuple[str, ...] = ("q@k^T",)
    scale: float = 1.0
    factors: tuple[Factor, ...] = ()
    biases: tuple[tuple[Operand, float], ...] = ()
    masked: tuple[Operand, ...] = ()
    fill: float | None = None
    softmaxed: bool = False
    pre: tuple[Tensor, Tensor | None] | None = None
    post: tuple[Tensor, Tensor | None] | None = None
    norm: BatchNorm | LayerNorm | None = None
    factor: float = 1.0
    factors_after: tuple[Factor, ...] = ()

    @classmethod
    def begin(cls, q: Tensor, k: Tensor, order: Axes | None = None, scale: float = 1.0) -> Chain:
        """The map of q (*lead, Nq, D) and k (*lead, Nk, D), whose leading axes broadcast.

        Args:
            order: where the axes of the map lie; as they are counted by default.
            scale: a factor that the product itself applies.
        """
        lead = q.shape[:-2]
        if k.shape[:-2] != lead:
            lead = torch.broadcast_shapes(lead, k.shape[:-2])
            q, k = q.expand(*lead, *q.shape[-2:]), k.expand(*lead, *k.shape[-2:])
        return cls(q, k, tuple(lead), order or tuple(range(len(lead) + 2)), q.dtype, scale=float(scale))

    @property
    def shape(self) -> Axes:
        """Of the map as it lies."""
        sizes = (*self.lead, self.q.shape[-2], self.k.shape[-2])
        return sizes if self.in_order else tuple([sizes[axis] for axis in self.order])

    @property
    def device(self) -> torch.device:
        """Of the map."""
        return self.q.device

    @property
    def in_order(self) -> bool:
        """Whether the axes lie as they are counted."""
        return self.order == _IN_ORDER[len(self.order)]

    def operator(self) -> str:
        """The name of the operator in ``fastvit.ops`` that takes the chain."""
        if self.pre is not None or self.post is not None or self.norm is not None:
            return "head_mixed_attention"
        return "class_attention" if self.q.shape[-2] <= FEW_QUERIES < self.k.shape[-2] else "masked_attention"

    def meeting(self, product: Product, autocast: torch.dtype | None) -> Chain:
        """The chain as autocast, where it is on, brings its map to the values' dtype."""
        brought = autocast is not None and self.dtype != product.values.dtype == self.q.dtype
        return self._replace(dtype=product.values.dtype) if brought else self

    def finished(self, product: Product, backend: str = "auto") -> Tensor:
        """The product of the whole with the values; BreaksOff unless it is attention."""
        self.check_values(product.values)
        out = self.attend(product.values, backend)
        return out if product.places is None else out.permute(product.places)

    def check_values(self, v: Tensor) -> None:
        """BreaksOff unless the map times v (*lead, Nk, Dv) is attention."""
        if not self.softmaxed:
            break_off("no softmax came before the product with the values")
        if v.dtype != self.dtype or v.dtype != self.q.dtype:
            break_off(f"the values are {v.dtype}, the map is {self.dtype} and q is {self.q.dtype}")
        if v.shape[-2] != self.k.shape[-2] or v.dim() != len(self.lead) + 2:
            break_off(f"values of shape {tuple(v.shape)} are not one for each key of a map {self.shape}")
        if v.shape[:-2] != self.lead and any(
            size not in (1, whole) for size, whole in zip(v.shape, self.lead, strict=False)
        ):
            break_off(f"values of shape {tuple(v.shape)} are not one for each key of a map {self.shape}")

    def attend(self, v: Tensor, backend: str = "auto") -> Tensor:
        """The finished map times v (*lead, Nk, Dv), as (*lead, Nq, Dv); :meth:`check_values` comes before."""
        lead, whole = self.lead, _four(self.lead)
        v = v if v.shape[:-2] == lead else v.expand(*lead, *v.shape[-2:])
        q, k = self.q, self.k
        if whole != lead:
            q, k, v = (tensor.reshape(*whole, *tensor.shape[-2:]) for tensor in (q, k, v))
        for factor in self.factors:
            value = _spread(factor.operand, whole)
            q = q / value if factor.divides else q * value
        width, values = q.shape[-1], v.shape[-1]
        if width < values:
            q, k = (F.pad(tensor, (0, values - width)) for tensor in (q, k))
        elif values < width:
            v = F.pad(v, (0, width - values))
        call = self._mixed if self.operator() == "head_mixed_attention" else self._unmixed
        out = call(q, k, v, whole, backend)
        for factor in self.factors_after:
            value = _spread(factor.operand, whole)
            out = out / value if factor.divides else out * value
        out = out if values >= width else out[..., :values]
        return out if whole == lead else out.reshape(*lead, *out.shape[-2:])

    def _unmixed(self, q: Tensor, k: Tensor, v: Tensor, whole: Axes, backend: str) -> Tensor:
        bias = mask = masked = None
        for operand, times in self.biases:
            term = _spread(operand, whole)
            term = term if times == 1.0 else term * times
            bias = term if bias is None else bias + term
        if self.masked:
            masked = _spread(self.masked[0], whole)
            for operand in self.masked[1:]:
                masked = masked | _spread(operand, whole)
            mask = ~masked
        run = ops.class_attention if self.operator() == "class_attention" else ops.masked_attention
        out = run(q, k, v, mask=mask, bias=bias, scale=self.scale, backend=backend)
        if masked is not None or bias is not None:
            out = self._with_rows_of_no_key(out, q, k, v, masked, bias)
        return out if self.factor == 1.0 else out * self.factor

    def _with_rows_of_no_key(
        self, out: Tensor, q: Tensor, k: Tensor, v: Tensor, masked: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """What a softmax over equal numbers gives is put in: NaN of -inf, else the mean of the values."""
        if bias is None:
            assert masked is not None
            empty = masked.all(-1, keepdim=True)
        else:
            hidden = bias.detach() == -math.inf
            empty = (hidden if masked is None else hidden | masked).all(-1, keepdim=True)
        each = 1.0 / v.shape[-2] if bias is None and self.fill != -math.inf else math.nan
        total = v.sum(-2, keepdim=True)
        if bias is not None and torch.is_grad_enabled():  # NaN goes back to all that such a row was made of
            total = total + q.sum(-1, keepdim=True) + k.sum((-2, -1), keepdim=True) + bias.sum(-1, keepdim=True)
        weight = torch.zeros_like(empty, dtype=v.dtype).masked_fill(empty, each)
        return torch.where(empty, total * weight, out)

    def _mixed(self, q: Tensor, k: Tensor, v: Tensor, whole: Axes, backend: str) -> Tensor:
        pre, post = self.pre or (None, None), self.post or (None, None)
        return ops.head_mixed_attention(
            q,
            k,
            v,
            pre_weight=pre[0],
            pre_bias=pre[1],
            post_weight=post[0],
            post_bias=post[1],
            norm=self.norm,
            output_scale=self.factor,
            scale=self.scale,
            backend=backend,
        )


def _four(lead: Axes) -> Axes:
    """(B, H) that any leading axes make; heads are the last of them, if there are two or more."""
    return (*lead, *(1,) * (2 - len(lead))) if len(lead) < 3 else (math.prod(lead[:-1]), lead[-1])


def _spread(operand: Operand, whole: Axes) -> Tensor:
    """An operand as (B or 1, H or 1, ...), expanded no further than the change of leading axes needs."""
    tensor, then = operand
    tensor = tensor[(None,) * (len(then) + 2 - tensor.dim())]
    front, last = tensor.shape[:-2], tensor.shape[-2:]
    if tuple(then) == tuple(whole):
        return tensor
    if all(size == 1 for size in front):
        return tensor.reshape(1, 1, *last)
    if then[-1] == whole[1]:  # heads are the heads: what changed is in front of them
        if any(size != 1 for size in front[:-1]):
            tensor = tensor.expand(*then[:-1], *tensor.shape[-3:])
        return tensor.reshape(-1, *tensor.shape[-3:])
    return tensor.expand(*then, *last).reshape(*whole, *last)
