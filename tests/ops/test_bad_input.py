"""Bad input to the public operators: the error names the argument, what was given and what is accepted.

One table for all of them; every argument of every operator that is a tensor, or is checked against one, stands in it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastvit import ops
from fastvit.reference.functional import BatchNorm, LayerNorm, Projection

HEADS, CHANNELS = 4, 6


def _batch_norm(features: int, **changes: Any) -> BatchNorm:
    return BatchNorm.of(nn.BatchNorm2d(features).eval())._replace(**changes)


def _bool(*shape: int, device: str = "cpu") -> Tensor:
    return torch.ones(shape, dtype=torch.bool, device=device)


def _attention() -> dict[str, Any]:
    return {"q": torch.randn(2, HEADS, 5, 8), "k": torch.randn(2, HEADS, 7, 8), "v": torch.randn(2, HEADS, 7, 8)}


def _square() -> Tensor:
    return torch.randn(HEADS, HEADS)


GOOD: dict[str, Callable[[], dict[str, Any]]] = {
    "masked_attention": _attention,
    "class_attention": _attention,
    "head_mixed_attention": lambda: {**_attention(), "pre_weight": _square(), "post_weight": _square()},
    "re_attention": lambda: {**_attention(), "weight": _square(), "bias": None, "norm": _batch_norm(HEADS)},
    "talking_heads_attention": lambda: {
        **_attention(),
        "pre_weight": _square(),
        "pre_bias": None,
        "post_weight": _square(),
        "post_bias": torch.randn(HEADS),
    },
    "depthwise_separable_conv": lambda: {
        "x": torch.randn(2, 13, CHANNELS),
        "dw_weight": torch.randn(CHANNELS, 1, 3, 3),
        "norm": None,
        "pw_weight": torch.randn(8, CHANNELS),
        "grid": (3, 4),
        "prefix_tokens": 1,
    },
    "conv_projection": lambda: {
        "x": torch.randn(2, 13, CHANNELS),
        **{name: Projection(torch.randn(CHANNELS, 1, 3, 3), None, torch.randn(8, CHANNELS)) for name in "qkv"},
        "grid": (3, 4),
        "prefix_tokens": 1,
    },
    "leff": lambda: {
        "x": torch.randn(2, 13, CHANNELS),
        "up_weight": torch.randn(12, CHANNELS),
        "up_bias": None,
        "dw_weight": torch.randn(12, 1, 3, 3),
        "dw_bias": None,
        "down_weight": torch.randn(CHANNELS, 12),
        "down_bias": None,
        "grid": (3, 4),
    },
    "token_depthwise_conv": lambda: {
        "x": torch.randn(2, 13, CHANNELS),
        "weight": torch.randn(CHANNELS, 1, 3, 3),
        "grid": (3, 4),
        "prefix_tokens": 1,
    },
}
"""By operator, arguments that it takes."""

META = {"device": "meta"}
_GRID = [
    ("grid", 12, "grid: got 12, accepted is a pair of positive ints (h, w)"),
    ("grid", (3, 4, 1), "grid: got (3, 4, 1), accepted is a pair"),
    ("grid", (0, 4), "grid: got (0, 4), accepted is a pair"),
    ("grid", (4, 4), "grid: (4, 4) has 16 tokens, x has 12 behind 1 prefix tokens"),
    ("prefix_tokens", -1, "prefix_tokens: got -1, accepted is an int from 0"),
    ("prefix_tokens", 0, "grid: (3, 4) has 12 tokens, x has 13 behind 0 prefix tokens"),
]


def _weight_cases(name: str, shape: tuple[int, ...], accepted: str) -> list[tuple[str, Any, str]]:
    wide = (*shape[:-2], shape[-2] + 1, shape[-1] + 2)
    return [
        (name, torch.randn(wide), f"{name}: got {wide} torch.float32 on cpu, accepted is a floating tensor {accepted}"),
        (name, torch.ones(shape).long(), f"{name}: got {shape} torch.int64 on cpu, accepted is a floating tensor"),
        (name, torch.randn(shape, **META), f"{name}: got {shape} torch.float32 on meta, x is on cpu"),
        (name, None, f"{name}: got None (NoneType), accepted is a floating tensor {accepted}"),
    ]


def _vector_cases(name: str, size: int) -> list[tuple[str, Any, str]]:
    return [
        (name, torch.zeros(size + 1), f"{name}: got ({size + 1},) torch.float32 on cpu, accepted beside x (2, 13, 6)"),
        (name, torch.zeros(size, **META), f"{name}: got ({size},) torch.float32 on meta, accepted beside x"),
    ]


_QKV = [
    ("q", torch.randn(2, 4, 5), "q: got (2, 4, 5) torch.float32 on cpu, accepted is a floating tensor (B, H, Nq, D)"),
    ("q", torch.ones(2, 4, 5, 8, dtype=torch.int32), "q: got (2, 4, 5, 8) torch.int32"),
    ("q", torch.ones(2, 4, 5, 8, dtype=torch.complex64), "q: got (2, 4, 5, 8) torch.complex64"),
    ("q", [1.0], "q: got [1.0] (list), accepted is a floating tensor"),
    ("k", torch.randn(2, 4, 7, 9), "k: got (2, 4, 7, 9) torch.float32 on cpu, accepted beside q (2, 4, 5, 8)"),
    ("k", torch.randn(2, 3, 7, 8), "k: got (2, 3, 7, 8)"),
    ("k", None, "k: got None (NoneType), accepted beside q"),
    ("k", torch.randn(2, 4, 7, 8, **META), "k: got (2, 4, 7, 8) torch.float32 on meta, q is on cpu"),
    ("v", torch.randn(2, 4, 6, 8), "v: got (2, 4, 6, 8) torch.float32 on cpu, accepted beside k (2, 4, 7, 8)"),
    ("v", torch.randn(2, 4, 7, 8).double(), "v: got (2, 4, 7, 8) torch.float64 on cpu, q is torch.float32"),
    ("v", None, "v: got None (NoneType), accepted beside k"),
    ("mask", torch.ones(2, 7), "mask: got (2, 7) torch.float32 on cpu, accepted is bool, True = attend"),
    ("mask", _bool(3, 7), "mask: got (3, 7) torch.bool on cpu, accepted with two axes is key padding (B, Nk) = (2, 7)"),
    ("mask", _bool(2, 6), "mask: got (2, 1, 1, 6) torch.bool on cpu, accepted is broadcastable"),
    ("mask", _bool(3, 5, 7), "mask: got (1, 3, 5, 7) torch.bool on cpu, accepted is broadcastable to (B, H, Nq, Nk)"),
    ("mask", _bool(1, 2, 4, 5, 7), "mask: got (1, 2, 4, 5, 7)"),
    ("mask", _bool(2, 1, 5, 7, device="meta"), "mask: got (2, 1, 5, 7) torch.bool on meta, q is on cpu"),
    ("mask", [True], "mask: got [True] (list), accepted is bool"),
    ("dropout_p", 1.5, "dropout_p: got 1.5, accepted is a probability from 0 to 1"),
    ("backend", "fast", "none named 'fast', accepted are ['auto', "),
]


_BIAS = [
    ("bias", _bool(5, 7), "bias: got (5, 7) torch.bool on cpu, accepted is floating; pass bool masks as mask"),
    ("bias", torch.zeros(3, 5, 7), "bias: got (1, 3, 5, 7) torch.float32 on cpu, accepted is broadcastable"),
    ("bias", torch.zeros(5, 7, **META), "bias: got (1, 1, 5, 7) torch.float32 on meta, q is on cpu"),
    ("bias", 1.0, "bias: got 1.0 (float), accepted is floating"),
]


def _norm_cases(name: str, features: int, accepted: str = "BatchNorm.of(module) or None") -> list[tuple[str, Any, str]]:
    wrong, moved = torch.ones(features + 1), torch.ones(features, **META)
    return [
        (name, nn.BatchNorm2d(features), f"{name}: got BatchNorm2d, accepted is {accepted}"),
        (name, _batch_norm(features, running_mean=wrong), f"{name}.running_mean: got ({features + 1},)"),
        (
            name,
            _batch_norm(features, running_var=moved),
            f"{name}.running_var: got ({features},) torch.float32 on meta",
        ),
        (
            name,
            _batch_norm(features, weight=torch.ones(features).long()),
            f"{name}.weight: got ({features},) torch.int64",
        ),
        (name, _batch_norm(features, bias=[0.0] * features), f"{name}.bias: got [0.0, "),
        (name, _batch_norm(features, running_mean=None), f"{name}: running_mean and running_var"),
    ]


def _matrix_cases(name: str) -> list[tuple[str, Any, str]]:
    return [
        (name, torch.randn(3, 3), f"{name}: got (3, 3) torch.float32 on cpu, accepted is a floating tensor (4, 4)"),
        (name, torch.ones(4, 4).long(), f"{name}: got (4, 4) torch.int64"),
        (name, torch.ones(4, 4, **META), f"{name}: got (4, 4) torch.float32 on meta, q is on cpu"),
    ]


EITHER_NORM = "BatchNorm.of(module), LayerNorm.of(module) or None"
_LAYER_NORM = ("norm", LayerNorm(torch.ones(3), None), "norm.weight: got (3,) torch.float32 on cpu, accepted is")

BAD: dict[str, list[tuple[str, Any, str]]] = {
    "masked_attention": [*_QKV, *_BIAS],
    "class_attention": [*_QKV, *_BIAS],
    "head_mixed_attention": [
        *_QKV,
        *_matrix_cases("pre_weight"),
        *_matrix_cases("post_weight"),
        ("pre_bias", torch.zeros(3), "pre_bias: got (3,) torch.float32 on cpu, accepted is a floating tensor (4,)"),
        ("post_bias", 0.5, "post_bias: got 0.5 (float), accepted is a floating tensor (4,)"),
        *_norm_cases("norm", HEADS, EITHER_NORM),
        _LAYER_NORM,
    ],
    "re_attention": [
        *_QKV,
        *_matrix_cases("weight"),
        ("weight", None, "weight: got None, accepted is a floating tensor (H, H)"),
        ("bias", torch.zeros(3), "bias: got (3,) torch.float32 on cpu, accepted is a floating tensor (4,)"),
        *_norm_cases("norm", HEADS, EITHER_NORM),
        _LAYER_NORM,
    ],
    "talking_heads_attention": [
        *_QKV,
        *_matrix_cases("pre_weight"),
        *_matrix_cases("post_weight"),
        ("pre_weight", None, "pre_weight: got None, accepted is a floating tensor (H, H)"),
        ("post_weight", None, "post_weight: got None, accepted is a floating tensor (H, H)"),
        ("pre_bias", torch.zeros(4, 1), "pre_bias: got (4, 1)"),
        ("post_bias", torch.zeros(4, **META), "post_bias: got (4,) torch.float32 on meta, q is on cpu"),
    ],
    "depthwise_separable_conv": [
        ("x", torch.randn(13, CHANNELS), "x: got (13, 6) torch.float32 on cpu, accepted is a floating tensor"),
        ("x", None, "x: got None (NoneType)"),
        *_weight_cases("dw_weight", (CHANNELS, 1, 3, 3), "(6, 1, k, k)"),
        *_weight_cases("pw_weight", (8, CHANNELS), "(O, 6)"),
        *_vector_cases("dw_bias", CHANNELS),
        *_vector_cases("pw_bias", 8),
        *_norm_cases("norm", CHANNELS),
        *_GRID,
        ("stride", 0, "stride: got 0, accepted is an int from 1"),
        ("padding", "same", "padding: got 'same', accepted is an int from 0"),
        ("backend", "fast", "none named 'fast', accepted are ['auto', "),
    ],
    "conv_projection": [
        ("x", torch.randn(13, CHANNELS), "x: got (13, 6) torch.float32 on cpu, accepted is a floating tensor"),
        *((name, None, f"{name}: got NoneType, accepted is a Projection") for name in "qkv"),
        ("k", Projection(torch.randn(5, 1, 3, 3), None, _square()), "k.dw_weight: got (5, 1, 3, 3)"),
        *_GRID,
        ("backend", "fast", "none named 'fast', accepted are ['auto', "),
    ],
    "leff": [
        ("x", torch.randn(13, CHANNELS), "x: got (13, 6) torch.float32 on cpu, accepted is a floating tensor"),
        ("x", None, "x: got None (NoneType)"),
        *_weight_cases("up_weight", (12, CHANNELS), "(O, 6)"),
        *_weight_cases("dw_weight", (12, 1, 3, 3), "(12, 1, k, k)"),
        *_weight_cases("down_weight", (CHANNELS, 12), "(O, 12)"),
        ("dw_weight", torch.randn(12, 1, 2, 2), "dw_weight: got a kernel of 2, accepted are odd ones"),
        (
            "down_weight",
            torch.randn(5, 12),
            "down_weight: gives 5 channels, accepted with prefix tokens are as many as",
        ),
        *_vector_cases("up_bias", 12),
        *_vector_cases("dw_bias", 12),
        *_vector_cases("down_bias", CHANNELS),
        *_norm_cases("up_norm", 12),
        *_norm_cases("dw_norm", 12),
        *_norm_cases("down_norm", CHANNELS),
        *_GRID,
        ("form", "both", "form: got 'both', accepted are ('official', 'paper')"),
        ("backend", "fast", "none named 'fast', accepted are ['auto', "),
    ],
    "token_depthwise_conv": [
        (
            "x",
            torch.randn(13, CHANNELS),
            "x: got (13, 6) torch.float32 on cpu, accepted is a floating tensor (B, P + h*w, C)",
        ),
        ("x", torch.ones(2, 13, CHANNELS).long(), "x: got (2, 13, 6) torch.int64"),
        ("x", None, "x: got None (NoneType)"),
        ("weight", torch.randn(CHANNELS, 3, 3), "weight: got (6, 3, 3) torch.float32 on cpu, accepted is a floating"),
        ("weight", torch.randn(5, 1, 3, 3), "weight: got (5, 1, 3, 3)"),
        (
            "weight",
            torch.ones(CHANNELS, 1, 3, 3).long(),
            "weight: got (6, 1, 3, 3) torch.int64 on cpu, accepted is a floating",
        ),
        (
            "weight",
            torch.randn(CHANNELS, 1, 3, 3, **META),
            "weight: got (6, 1, 3, 3) torch.float32 on meta, x is on cpu",
        ),
        ("weight", None, "weight: got None (NoneType), accepted is a floating tensor (6, 1, k, k)"),
        ("bias", torch.zeros(5), "bias: got (5,) torch.float32 on cpu, accepted beside x (2, 13, 6)"),
        ("bias", torch.zeros(CHANNELS).long(), "bias: got (6,) torch.int64"),
        ("bias", [0.0] * CHANNELS, "bias: got [0.0, "),
        *_GRID,
        ("stride", 0, "stride: got 0, accepted is an int from 1"),
        ("stride", (1, 1), "stride: got (1, 1), accepted is an int from 1"),
        ("padding", -1, "padding: got -1"),
        ("padding", "same", "padding: got 'same', accepted is an int from 0"),
        ("activation", "tanh", "activation: got 'tanh', accepted are [None, 'gelu', 'quick_gelu', 'silu', 'relu']"),
        ("pre_activation", nn.GELU(), "pre_activation: got GELU"),
        *_norm_cases("norm", CHANNELS),
        *_norm_cases("pre_norm", CHANNELS),
        ("backend", "fast", "none named 'fast', accepted are ['auto', "),
    ],
}
"""By operator: the argument, the bad value, and what the error says."""

CASES = [
    pytest.param(op, name, value, message, id=f"{op}-{message[:40]}")
    for op, cases in BAD.items()
    for name, value, message in cases
]


@pytest.mark.parametrize(("op", "name", "value", "message"), CASES)
def test_the_error_names_the_argument_the_value_and_what_is_accepted(op, name, value, message):
    arguments = {**GOOD[op](), name: value}
    for gradients in (True, False):  # without them operators may skip their checks at first
        with torch.set_grad_enabled(gradients), pytest.raises(ValueError, match=re.escape(message)):
            getattr(ops, op)(**arguments)


@pytest.mark.parametrize("op", GOOD)
def test_what_the_cases_start_from_is_accepted(op):
    result = getattr(ops, op)(**GOOD[op]())
    assert all(torch.isfinite(part).all() for part in (result if isinstance(result, tuple) else (result,)))


def test_residual_wants_the_grid_kept():
    message = r"residual: needs a convolution that keeps the grid \(3, 4\)"
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients), pytest.raises(ValueError, match=message):
            ops.token_depthwise_conv(**GOOD["token_depthwise_conv"](), stride=2, residual=True)


def test_every_operator_and_every_tensor_argument_is_here():
    elsewhere = {"conv_batch_norm", "linear", "mlp"}  # in the files of their own tests
    public = {name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))} - elsewhere
    assert set(BAD) == set(GOOD) == public
    for op in public:
        parameters = inspect.signature(getattr(ops, op)).parameters.values()
        tensors = {
            p.name
            for p in parameters
            if any(kind in str(p.annotation) for kind in ("Tensor", "BatchNorm", "Projection"))
        }
        assert tensors <= {name for name, _, _ in BAD[op]}, op
