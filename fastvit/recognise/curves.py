"""What an activation computes, however it is spelled: a function of one number, by its values at a few points.

``0.5 * x * (1 + erf(x / sqrt(2)))`` is GELU as ``F.gelu`` is. Each operation on a curve gives the curve behind it; a
curve that goes through the points of a known activation is that one. The operations are smooth ones that only together
with constants beyond the outermost points could pass for another.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ARITHMETIC", "FUNCTIONS", "IDENTITY", "Curve", "applied", "combined", "name_of_curve"]

Curve = tuple[float, ...]
"""Its values at the points of IDENTITY."""

IDENTITY: Curve = (
    *(-1e5, -3e3, -97.0, -19.3, -7.1, -4.3, -2.9, -1.7, -1.1, -0.7, -0.31, -0.011),
    *(0.013, 0.29, 0.67, 1.3, 1.9, 3.1, 4.7, 6.7, 21.1, 89.0, 2e3, 1e5),
)
TOLERANCE = 1e-8
"""Relative, above 1: constants are written with ten digits and more."""


def _sigmoid(x: float) -> float:
    return 1 / (1 + _exp(-x))


def _exp(x: float) -> float:
    return math.inf if x > 700 else math.exp(x)


_KNOWN: dict[str | None, Callable[[float], float]] = {
    None: lambda x: x,
    "gelu": lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x * _sigmoid(1.702 * x),
    "silu": lambda x: x * _sigmoid(x),
    "relu": lambda x: max(x, 0.0),
    "sigmoid": _sigmoid,
}
"""The activations that operators have, by name."""


@functools.lru_cache(maxsize=1024)
def name_of_curve(curve: Curve) -> str | None:
    """The operator's name of an activation, None of the identity; KeyError where it has none."""
    for name, known in _KNOWN.items():
        expected = map(known, IDENTITY)
        if all(abs(a - b) <= TOLERANCE * max(1.0, abs(b)) for a, b in zip(curve, expected, strict=True)):
            return name
    raise KeyError(curve)


@functools.lru_cache(maxsize=1024)
def applied(function: str, curve: Curve) -> Curve:
    """The curve behind one of FUNCTIONS, by its name."""
    return tuple(map(_KNOWN.get(function) or _FORMULAS[function], curve))


@functools.lru_cache(maxsize=1024)
def combined(function: Callable[[float, float], float], left: Curve | float, right: Curve | float) -> Curve:
    """The curve of left and right, one of which may be a number."""
    lefts = left if isinstance(left, tuple) else (left,) * len(IDENTITY)
    rights = right if isinstance(right, tuple) else (right,) * len(IDENTITY)
    return tuple(map(function, lefts, rights))


def _safely(function: Callable[[float, float], float]) -> Callable[[float, float], float]:
    """NaN, which is no activation's, where Python raises."""

    @functools.wraps(function)
    def safe(a: float, b: float) -> float:
        try:
            return float(function(a, b))
        except (ArithmeticError, TypeError):  # TypeError: a root of a negative number is complex
            return math.nan

    return safe


_FORMULAS: dict[str, Callable[[float], float]] = {
    "erf": math.erf,
    "tanh": math.tanh,
    "exp": _exp,
    "neg": operator.neg,
    "square": lambda x: x * x,
}
_T = Tensor
FUNCTIONS: dict[Callable[..., Any], str] = {
    **dict.fromkeys((torch.erf, _T.erf, torch.special.erf), "erf"),
    **dict.fromkeys((torch.tanh, _T.tanh, F.tanh), "tanh"),
    **dict.fromkeys((torch.exp, _T.exp), "exp"),
    **dict.fromkeys((torch.neg, _T.neg, _T.__neg__), "neg"),
    **dict.fromkeys((torch.square, _T.square), "square"),
    **dict.fromkeys((torch.sigmoid, _T.sigmoid, F.sigmoid), "sigmoid"),
    F.silu: "silu",
}
"""Calls of one tensor."""

_add, _subtract, _multiply, _divide, _power = map(
    _safely, (operator.add, operator.sub, operator.mul, operator.truediv, operator.pow)
)
ARITHMETIC: dict[Callable[..., Any], Callable[[float, float], float]] = {
    **dict.fromkeys((torch.mul, _T.mul, _T.__mul__, _T.__rmul__, torch.multiply, _T.multiply), _multiply),
    **dict.fromkeys((torch.add, _T.add, _T.__add__, _T.__radd__), _add),
    **dict.fromkeys((torch.sub, _T.sub, _T.__sub__, torch.subtract, _T.subtract), _subtract),
    **dict.fromkeys((torch.div, _T.div, _T.__truediv__, torch.divide, _T.divide), _divide),
    **dict.fromkeys((torch.pow, _T.pow, _T.__pow__), _power),
    **dict.fromkeys((_T.__rsub__, torch.rsub), lambda a, b: _subtract(b, a)),
    _T.__rtruediv__: lambda a, b: _divide(b, a),
}
"""Calls of two numbers or tensors."""
