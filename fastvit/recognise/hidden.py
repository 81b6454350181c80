"""The hidden values of an MLP, from its first linear layer to the second, and how torch spells what lies between.

:class:`Hidden` is to MLPs what :class:`fastvit.recognise.chain.Chain` is to attention: plain data, each operation gives
a new one, and at the second linear layer ``fastvit.ops.mlp`` or ``glu_mlp`` computes the whole. A layer is a linear one
of tokens, or a 1x1 convolution of an image that lies as tokens do, one pixel's channels beside each other.

A gate is a product of two hidden values, of different layers of the same input: SwiGLU and its kin (Shazeer 2020).
Of the same values, products and sums are an activation that is written out (``curves.py``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit import ops
from fastvit.recognise.chain import Axes, break_off
from fastvit.recognise.curves import ARITHMETIC, FUNCTIONS, IDENTITY, Curve, applied, combined, name_of_curve
from fastvit.recognise.products import Args, Kwargs, arguments, is_number, multiplied_dtype
from fastvit.reference.functional import LayerNorm

__all__ = ["HIDDEN_READERS", "LAYERS", "Hidden", "Parts", "Second", "both"]

Layer = tuple[Tensor, Tensor | None]
"""Weight (M, K) and bias (M,)."""


class Second(NamedTuple):
    """The linear layer that ends an MLP: its weight (N, M) and bias, and how it is spelled."""

    weight: Tensor
    bias: Tensor | None
    name: str


class Hidden(NamedTuple):
    """norm(activation(gate(x)) * layer(x)), or activation(layer(x)) where there is no gate.

    Attributes:
        x: (..., K); of an image (B, K, h, w) the view (B, h, w, K).
        layer, gate: of tokens.
        dtype: of the values.
        image: whether they lie as (B, M, h, w).
        told: a word for each operation.
        curve: of the activation.
    """

    x: Tensor
    layer: Layer
    dtype: torch.dtype
    image: bool
    told: tuple[str, ...]
    curve: Curve = IDENTITY
    gate: Layer | None = None
    norm: LayerNorm | None = None

    @property
    def shape(self) -> Axes:
        """Of the values as they lie."""
        *lead, _ = self.x.shape
        width = self.layer[0].shape[0]
        return (lead[0], width, *lead[1:]) if self.image else (*lead, width)

    @property
    def order(self) -> Axes:
        """The axis in memory at each place."""
        return (0, 3, 1, 2) if self.image else tuple(range(self.x.dim()))

    @property
    def in_order(self) -> bool:
        """Whether the axes lie as they are counted; those of an image never do as ``contiguous`` has them."""
        if self.image:
            break_off("an image's memory is laid out anew")
        return True

    @property
    def device(self) -> torch.device:
        """Of the values."""
        return self.x.device

    def operator(self) -> str:
        """The name of the operator in ``fastvit.ops`` that takes the whole."""
        return "mlp" if self.gate is None else "glu_mlp"

    def meeting(self, second: Second, autocast: torch.dtype | None) -> Hidden:
        """The same: a linear layer gives autocast's dtype, which the next one takes."""
        return self

    def finished(self, second: Second, backend: str = "auto") -> Tensor:
        """The MLP of x; BreaksOff where it is none."""
        weight, bias, _ = second
        activation = self.activation()
        if self.gate is not None:
            layers = (*self.gate, *self.layer, weight, bias)
            out = ops.glu_mlp(self.x, *layers, activation, hidden_norm=self.norm, backend=backend)
        elif activation in (None, "sigmoid"):
            return break_off(f"between its linear layers there is {activation or 'nothing'} alone")
        else:
            out = ops.mlp(self.x, *self.layer, weight, bias, activation, backend=backend)
        return out.permute(0, 3, 1, 2) if self.image else out

    def activation(self) -> str | None:
        """The operator's name of the activation; BreaksOff where it has none."""
        try:
            return name_of_curve(self.curve)
        except KeyError:
            return break_off("between its linear layers there is no activation of a known kind alone")

    def next(self, word: str, **changes: Any) -> Hidden:
        """After one more operation."""
        return self._replace(told=(*self.told, word), **changes)


class Parts(NamedTuple):
    """The pieces of hidden values along their channels, which a call gives as a tuple."""

    chains: tuple[Hidden, ...]


def both(a: Hidden, b: Hidden, func: Callable[..., Any]) -> Hidden:
    """A call of ARITHMETIC on two hidden values."""
    if a.x is not b.x or a.image is not b.image or a.shape != b.shape or a.dtype != b.dtype:
        break_off("hidden values of different inputs, or sizes, meet")
    if a.gate is not None or b.gate is not None:
        break_off("a third factor")
    if a.layer is b.layer:
        told = (*a.told, *_new(a, b), _word(func))
        return a._replace(told=told, curve=combined(ARITHMETIC[func], a.curve, b.curve))
    if func not in _PRODUCTS:
        break_off("hidden values of two layers are added")
    if a.curve == IDENTITY:
        a, b = b, a
    if b.curve != IDENTITY:
        break_off("both factors have an activation")
    return b._replace(gate=a.layer, curve=a.curve, told=(*a.told, *_new(a, b), "gate"))


def _new(a: Hidden, b: Hidden) -> tuple[str, ...]:
    """What only b tells."""
    return tuple([word for word in b.told if word not in a.told])


# --- Where one begins -----------------------------------------------------------------------------------------------


def _begin(x: Tensor, weight: Tensor, bias: Tensor | None, image: bool, word: str) -> Hidden | None:
    if not x.is_floating_point() or x.dtype != weight.dtype or x.shape[-1] != weight.shape[-1]:
        return None
    if 0 in x.shape or 0 in weight.shape or (bias is not None and bias.dtype != weight.dtype):
        return None
    return Hidden(x, (weight, bias), multiplied_dtype(x.dtype, x.device), image, (word,))


def _start_linear(args: Args, kwargs: Kwargs) -> Hidden | None:
    found = arguments("input weight bias", args, kwargs)
    x, weight = found["input"], found["weight"]
    return None if x.dim() < 2 or weight.dim() != 2 else _begin(x, weight, found.get("bias"), False, "linear")


def _start_conv2d(args: Args, kwargs: Kwargs) -> Hidden | None:
    found = arguments("input weight bias stride padding dilation groups", args, kwargs)
    x, weight = found["input"], found["weight"]
    if not _is_pointwise(found) or x.dim() != 4 or x.stride(1) != 1:
        return None
    return _begin(x.permute(0, 2, 3, 1), weight.flatten(1), found.get("bias"), True, "conv2d 1x1")


def _is_pointwise(found: Kwargs) -> bool:
    """Whether a convolution is a linear layer of each pixel."""
    ones = (found.get("stride", 1), found.get("dilation", 1), found["weight"].shape[2:], found.get("groups", 1))
    flat = [each for value in ones for each in (value if isinstance(value, (tuple, list)) else (value,))]
    padding = found.get("padding", 0)
    none = padding in (0, "valid", "same") or padding in ((0, 0), [0, 0], (0,), [0])
    return none and all(each == 1 for each in flat)


LAYERS: dict[Callable[..., Any], Callable[[Args, Kwargs], Hidden | None]] = {
    F.linear: _start_linear,
    **dict.fromkeys((F.conv2d, torch.conv2d), _start_conv2d),
}
"""Calls that may make hidden values."""


# --- What lies between ----------------------------------------------------------------------------------------------


def _word(func: Callable[..., Any]) -> str:
    return str(getattr(func, "__name__", func)).strip("_")


def _applied(values: Hidden, word: str) -> Hidden:
    if values.gate is not None:
        break_off(f"{word} of values that have a gate")
    return values.next(word, curve=applied(word, values.curve))


def _gelu(values: Hidden, place: int, args: Args, kwargs: Kwargs) -> Hidden:
    approximate = arguments("input", args, kwargs, "approximate").get("approximate", "none")
    return _applied(values, "gelu" if approximate == "none" else "gelu_tanh")


def _function(word: str) -> Callable[..., Hidden]:
    def read(values: Hidden, place: int, args: Args, kwargs: Kwargs) -> Hidden:
        arguments("input inplace", args, kwargs)
        _keeps_dtype(word)
        return _applied(values, word)

    return read


def _relu(values: Hidden, place: int, args: Args, kwargs: Kwargs) -> Hidden:
    arguments("input inplace", args, kwargs)
    if values.curve != IDENTITY:  # its curve has a corner, which must not fall between two points
        break_off("relu of values that were computed with")
    return _applied(values, "relu")


def _arithmetic(function: Callable[[float, float], float], word: str) -> Callable[..., Hidden]:
    def read(values: Hidden, place: int, args: Args, kwargs: Kwargs) -> Hidden:
        found = arguments(
            "input other", args, {"other" if name == "exponent" else name: kwargs[name] for name in kwargs}
        )
        by = found["other" if place == 0 else "input"]
        if not is_number(by) or values.gate is not None:
            break_off(f"{word} of hidden values and what is no number")
        _keeps_dtype(word)
        pair = (values.curve, float(by)) if place == 0 else (float(by), values.curve)
        return values.next(f"{word} c", curve=combined(function, *pair))

    return read


def _keeps_dtype(word: str) -> None:
    if word in _CAST_BY_AUTOCAST and torch._C._is_any_autocast_enabled():
        break_off(f"{word} under autocast")


_CAST_BY_AUTOCAST = frozenset({"exp", "pow", "rdiv", "rsub"})
"""What autocast computes in float32 on some devices, and what is rare."""


def _channels(values: Hidden, dim: int) -> None:
    """BreaksOff unless this is the axis of channels of untouched values."""
    count = len(values.shape)
    if dim % count != (1 if values.image else count - 1) or not -count <= dim < count:
        break_off("hidden values are cut along another axis than their channels")
    if values.curve != IDENTITY or values.gate is not None:
        break_off("hidden values are cut behind their activation")


def _pieces(values: Hidden, sizes: list[int], word: str) -> tuple[Hidden, ...]:
    weight, bias = values.layer
    weights = weight.split(sizes)
    biases = (None,) * len(sizes) if bias is None else bias.split(sizes)
    layers = list(zip(weights, biases, strict=True))
    return tuple([values.next(f"{word} {at}", layer=layer) for at, layer in enumerate(layers)])


def _chunk(values: Hidden, place: int, args: Args, kwargs: Kwargs) -> Parts:
    found = arguments("input chunks dim", args, kwargs)
    _channels(values, found.get("dim", 0))
    width = values.layer[0].shape[0]
    if width % found["chunks"]:
        break_off(f"{width} channels are cut into {found['chunks']} unequal parts")
    return Parts(_pieces(values, [width // found["chunks"]] * found["chunks"], "chunk"))


def _split(values: Hidden, place: int, args: Args, kwargs: Kwargs, names: str = "input split_size dim") -> Parts:
    found = arguments(names, args, kwargs)
    _channels(values, found.get("dim", 0))
    width, sizes = values.layer[0].shape[0], found[names.split()[1]]
    sizes = [sizes] * (width // sizes) if isinstance(sizes, int) else list(sizes)
    if sum(sizes) != width:
        break_off(f"{width} channels are cut into parts of {sizes}")
    return Parts(_pieces(values, sizes, "split"))


def _glu(values: Hidden, place: int, args: Args, kwargs: Kwargs) -> Hidden:
    found = arguments("input dim", args, kwargs)
    _channels(values, found.get("dim", -1))
    width = values.layer[0].shape[0]
    if width % 2:
        break_off(f"{width} channels have no halves")
    first, second = _pieces(values, [width // 2] * 2, "glu")
    return values.next("glu", layer=first.layer, gate=second.layer, curve=applied("sigmoid", IDENTITY))


def _layer_norm(values: Hidden, place: int, args: Args, kwargs: Kwargs) -> Hidden:
    found = arguments("input normalized_shape weight bias eps", args, kwargs, "cudnn_enable")
    shape, width = found["normalized_shape"], values.layer[0].shape[0]
    if place != 0 or values.gate is None or values.image or values.norm is not None:
        break_off("a LayerNorm of hidden values without a gate")
    if (shape if isinstance(shape, int) else tuple(shape)) not in (width, (width,)):
        break_off("a LayerNorm over more than the channels")
    return values.next("LayerNorm", norm=LayerNorm(found.get("weight"), found.get("bias"), found.get("eps", 1e-5)))


def _second(values: Hidden, weight: Tensor, bias: Tensor | None, word: str) -> Second:
    if weight.shape[1] != values.layer[0].shape[0] or weight.dtype != values.x.dtype or 0 in weight.shape:
        break_off(f"a layer of {weight.dtype} {tuple(weight.shape)} follows")
    return Second(weight, bias, word)


def _linear(values: Hidden, place: int, args: Args, kwargs: Kwargs) -> Second:
    found = arguments("input weight bias", args, kwargs)
    if place != 0 or values.image or found["weight"].dim() != 2:
        break_off("hidden values are the weight of a layer, or an image's rows its input")
    return _second(values, found["weight"], found.get("bias"), "linear")


def _conv2d(values: Hidden, place: int, args: Args, kwargs: Kwargs) -> Second:
    found = arguments("input weight bias stride padding dilation groups", args, kwargs)
    if place != 0 or not values.image or not _is_pointwise(found):
        break_off("a convolution of more than one pixel")
    return _second(values, found["weight"].flatten(1), found.get("bias"), "conv2d 1x1")


_T = Tensor
_PRODUCTS = frozenset(func for func, formula in ARITHMETIC.items() if formula is ARITHMETIC[torch.mul])

HIDDEN_READERS: dict[Callable[..., Any], Callable[..., Any]] = {
    **{func: _function(word) for func, word in FUNCTIONS.items()},
    **{func: _arithmetic(formula, _word(func)) for func, formula in ARITHMETIC.items()},
    F.gelu: _gelu,
    **dict.fromkeys((F.relu, torch.relu, _T.relu), _relu),
    **dict.fromkeys((torch.chunk, _T.chunk), _chunk),
    torch.split: functools.partial(_split, names="tensor split_size_or_sections dim"),
    _T.split: _split,
    F.glu: _glu,
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.linear: _linear,
    **dict.fromkeys((F.conv2d, torch.conv2d), _conv2d),
}
"""Calls on hidden values, beside those that change nothing (``vocabulary.py``)."""
