"""Bad input to the public operators: a ValueError names the argument, and no running statistics have moved by then.

``MESSAGES`` has values by hand with the whole message. ``wrong_kinds`` makes values of a wrong kind for every argument
there is, by its annotation; of those only the name is held to. Both run with and without gradients, with statistics of
the batch and without, through the automatic choice and through each backend on the CPU by name.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastvit import backends, ops
from fastvit.reference.functional import BatchNorm, LayerNorm, Projection
from tests.ops.calls import CALLS, CHANNELS, HEADS, HIDDEN, batch_norm, boolean, fields, projection

META = {"device": "meta"}
BACKENDS = ("auto", "reference") if backends.cpp_reasons() else ("auto", "reference", "cpp")


def refusals(op: str, change: dict[str, Any]) -> Iterator[str]:
    """Messages of the ValueErrors that a call with one change gives, whatever else is asked of it."""
    has_norms = any(isinstance(leaf, BatchNorm) for leaf in fields(CALLS[op](False)))
    for batch, gradients in itertools.product((False, True) if has_norms else (False,), (False, True)):
        for backend in (change["backend"],) if "backend" in change else BACKENDS:
            arguments = {**CALLS[op](batch), "backend": backend, **change}
            running = [tensor for norm in fields(arguments) if isinstance(norm, BatchNorm) for tensor in norm[:2]]
            running = [tensor for tensor in running if isinstance(tensor, Tensor) and not tensor.is_meta]
            before = [tensor.clone() for tensor in running]
            if gradients:
                for leaf in pytree.tree_leaves(arguments):
                    if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.is_leaf:
                        leaf.requires_grad_(not any(leaf is tensor for tensor in running))
            error: Exception | None = None
            try:
                with torch.set_grad_enabled(gradients):
                    getattr(ops, op)(**arguments)
            except Exception as raised:
                error = raised
            where = f"[{batch=}, {gradients=}, {backend=}]"
            assert isinstance(error, ValueError), f"{where} gave {error!r}"
            assert all(map(torch.equal, running, before)), f"{where} moved running statistics"
            yield str(error)


# --- Values by hand, with the message -------------------------------------------------------------------------------


def _weight_cases(name: str, shape: tuple[int, ...], expected: str) -> list[tuple[str, Any, str]]:
    wide = (*shape[:-2], shape[-2] + 1, shape[-1] + 2)
    return [
        (name, torch.randn(wide), f"{name}: expected a floating tensor {expected}, got {wide} torch.float32 on cpu"),
        (
            name,
            torch.ones(shape).long(),
            f"{name}: expected a floating tensor {expected}, got {shape} torch.int64 on cpu",
        ),
        (
            name,
            torch.randn(shape, **META),
            f"{name}: expected a tensor on cpu, got {shape} torch.float32 on meta",
        ),
        (name, None, f"{name}: expected a floating tensor {expected}, got None (NoneType)"),
    ]


def _vector_cases(name: str, size: int) -> list[tuple[str, Any, str]]:
    expected = f"{name}: expected a floating tensor ({size},), got"
    return [
        (name, torch.zeros(size + 1), f"{expected} ({size + 1},) torch.float32 on cpu"),
        (name, torch.zeros(size, 1), f"{expected} ({size}, 1) torch.float32 on cpu"),
        (name, torch.zeros(size).long(), f"{expected} ({size},) torch.int64 on cpu"),
        (name, [0.0] * size, f"{expected} [0.0, 0.0, "),
        (name, torch.zeros(size, **META), f"{name}: expected a tensor on cpu, got ({size},) torch.float32 on meta"),
    ]


def _norm_cases(name: str, features: int, expected: str = "BatchNorm.of(module) or None") -> list[tuple[str, Any, str]]:
    def changed(field: str, value: Any, message: str) -> tuple[str, Any, str]:
        batch = field == "momentum"  # which nothing else looks at
        return name, batch_norm(features, batch, **{field: value}), f"{name}.{field}: expected {message}"

    floating = f"a floating tensor ({features},), got"
    return [
        (name, nn.BatchNorm2d(features), f"{name}: expected {expected}, got BatchNorm2d("),
        changed("running_mean", torch.ones(features + 1), f"{floating} ({features + 1},)"),
        changed("running_var", torch.ones(features, **META), f"a tensor on cpu, got ({features},) torch.float32"),
        changed("weight", torch.ones(features).long(), f"{floating} ({features},) torch.int64"),
        changed("bias", [0.0] * features, f"{floating} [0.0, "),
        changed("eps", "1e-5", "a number, got '1e-5' (str)"),
        changed("momentum", None, "a number, got None (NoneType)"),
        changed("use_batch_stats", "yes", "a bool, got 'yes' (str)"),
        (name, batch_norm(features, running_mean=None), f"{name}: expected running_mean and running_var, or neither"),
        (name, batch_norm(features, running_mean=None, running_var=None), f"{name}: expected running_mean and running"),
    ]


def _matrix_cases(name: str) -> list[tuple[str, Any, str]]:
    return [
        (name, torch.randn(3, 3), f"{name}: expected a floating tensor (4, 4), got (3, 3) torch.float32 on cpu"),
        (name, torch.ones(4, 4).long(), f"{name}: expected a floating tensor (4, 4), got (4, 4) torch.int64 on cpu"),
        (name, torch.ones(4, 4, **META), f"{name}: expected a tensor on cpu, got (4, 4) torch.float32 on meta"),
    ]


_BACKEND = [("backend", "fast", "backend: expected one of ['auto', ")]
_ACTIVATIONS = "expected one of [None, 'gelu', 'quick_gelu', 'silu', 'relu', 'gelu_tanh'], got"

_GATES = _ACTIVATIONS.replace("'gelu_tanh'", "'gelu_tanh', 'sigmoid'")

_GRID_CASES = [
    ("grid", 12, "grid: expected a pair of positive ints (h, w), got 12 (int)"),
    ("grid", (3, 4, 1), "grid: expected a pair of positive ints (h, w), got (3, 4, 1) (tuple)"),
    ("grid", (0, 4), "grid: expected a pair of positive ints (h, w), got (0, 4)"),
    ("grid", (3.0, 4.0), "grid: expected a pair of positive ints (h, w), got (3.0, 4.0)"),
    ("grid", (True, 12), "grid: expected a pair of positive ints (h, w), got (True, 12)"),
    ("grid", (4, 4), "grid: expected (h, w) with h * w = 13 - 1 tokens of x, got (4, 4)"),
    ("grid", (4, 2**62 + 3), "grid: expected (h, w) with h * w = 13 - 1 tokens of x, got (4, 4611686018427387907)"),
    ("grid", (2**64 + 12, 1), "grid: expected (h, w) with h * w = 13 - 1 tokens of x, got (18446744073709551628, 1)"),
    ("prefix_tokens", -1, "prefix_tokens: expected an int >= 0, got -1"),
    ("prefix_tokens", True, "prefix_tokens: expected an int >= 0, got True"),
    ("prefix_tokens", 0, "grid: expected (h, w) with h * w = 13 tokens of x, got (3, 4)"),
]
_STRIDE_CASES = [
    ("stride", 0, "stride: expected an int from 1 to 1073741824, got 0"),
    ("stride", (1, 1), "stride: expected an int from 1 to 1073741824, got (1, 1)"),
    ("stride", True, "stride: expected an int from 1 to 1073741824, got True (bool)"),
    ("stride", 2**63, "stride: expected an int from 1 to 1073741824, got 9223372036854775808"),
    ("padding", -1, "padding: expected an int from 0 to 1073741824, the same on all sides, got -1"),
    ("padding", "same", "padding: expected an int from 0 to 1073741824, the same on all sides, got 'same'"),
    ("padding", 2**62, "padding: expected an int from 0 to 1073741824, the same on all sides, got 4611686018427387904"),
]

_Q = "q: expected a floating tensor (B, H, Nq, D), got"
_K = "k: expected a tensor (B, H, Nk, D) like q (2, 4, 5, 8), got"
_BROADCAST = "expected a tensor that broadcasts to (B, H, Nq, Nk) = (2, 4, 5, 7), got"
_QKV_CASES = [
    ("q", torch.randn(2, 4, 5), f"{_Q} (2, 4, 5) torch.float32 on cpu"),
    ("q", torch.ones(2, 4, 5, 8, dtype=torch.int32), f"{_Q} (2, 4, 5, 8) torch.int32 on cpu"),
    ("q", torch.ones(2, 4, 5, 8, dtype=torch.complex64), f"{_Q} (2, 4, 5, 8) torch.complex64 on cpu"),
    ("q", [1.0], f"{_Q} [1.0] (list)"),
    ("k", torch.randn(2, 4, 7, 9), f"{_K} (2, 4, 7, 9) torch.float32 on cpu"),
    ("k", torch.randn(2, 3, 7, 8), f"{_K} (2, 3, 7, 8)"),
    ("k", torch.randn(1, 4, 7, 8), f"{_K} (1, 4, 7, 8)"),
    ("k", None, f"{_K} None (NoneType)"),
    ("k", torch.randn(2, 4, 7, 8, **META), "k: expected a tensor on cpu, got (2, 4, 7, 8) torch.float32 on meta"),
    ("v", torch.randn(2, 4, 6, 8), "v: expected a tensor of k's shape (2, 4, 7, 8), got (2, 4, 6, 8)"),
    ("v", torch.randn(2, 4, 7, 8).double(), "v: expected q's dtype torch.float32, got (2, 4, 7, 8) torch.float64"),
    ("v", None, "v: expected a tensor of k's shape (2, 4, 7, 8), got None (NoneType)"),
    ("mask", torch.ones(2, 7), "mask: expected a bool tensor, True = attend, got (2, 7) torch.float32 on cpu"),
    (
        "mask",
        boolean(3, 7),
        "mask: expected (B, Nk) = (2, 7); a mask (Nq, Nk) needs leading axes of size 1, got (3, 7)",
    ),
    ("mask", boolean(2, 6), f"mask: {_BROADCAST} (2, 6) torch.bool on cpu"),
    ("mask", boolean(3, 5, 7), f"mask: {_BROADCAST} (3, 5, 7) torch.bool on cpu"),
    ("mask", boolean(1, 2, 4, 5, 7), f"mask: {_BROADCAST} (1, 2, 4, 5, 7) torch.bool on cpu"),
    ("mask", boolean(2, 1, 5, 7, **META), "mask: expected a tensor on cpu, got (2, 1, 5, 7) torch.bool on meta"),
    ("mask", [True], "mask: expected a bool tensor, True = attend, got [True] (list)"),
    ("scale", "1", "scale: expected a number or None, got '1' (str)"),
    ("dropout_p", 1.5, "dropout_p: expected a probability from 0 to 1, got 1.5"),
    ("dropout_p", -0.1, "dropout_p: expected a probability from 0 to 1, got -0.1"),
    ("dropout_p", float("nan"), "dropout_p: expected a probability from 0 to 1, got nan"),
    *_BACKEND,
]
_BIAS_CASES = [
    ("bias", boolean(5, 7), "bias: expected a floating tensor (pass a bool mask as mask), got (5, 7) torch.bool"),
    ("bias", torch.zeros(5, 7).long(), "bias: expected a floating tensor (pass a bool mask as mask), got (5, 7) torch"),
    ("bias", torch.zeros(3, 5, 7), f"bias: {_BROADCAST} (3, 5, 7) torch.float32 on cpu"),
    ("bias", torch.zeros(5, 7, **META), "bias: expected a tensor on cpu, got (5, 7) torch.float32 on meta"),
    ("bias", 1.0, "bias: expected a floating tensor (pass a bool mask as mask), got 1.0 (float)"),
]
_EITHER_NORM = "BatchNorm.of(module), LayerNorm.of(module) or None"
_HEAD_NORM_CASES = [
    *_norm_cases("norm", HEADS, _EITHER_NORM),
    ("norm", LayerNorm(torch.ones(3), None), "norm.weight: expected a floating tensor (4,), got (3,) torch.float32"),
    ("norm", LayerNorm(None, None, "1"), "norm.eps: expected a number, got '1' (str)"),
    ("output_scale", "1", "output_scale: expected a number, got '1' (str)"),
]
_X = "x: expected a floating tensor (B, P + h*w, C), got"
_X_CASES = [
    ("x", torch.randn(13, CHANNELS), f"{_X} (13, 6) torch.float32 on cpu"),
    ("x", torch.ones(2, 13, CHANNELS).long(), f"{_X} (2, 13, 6) torch.int64 on cpu"),
    ("x", None, f"{_X} None (NoneType)"),
]
_DEPTHWISE_CASES = [
    *_weight_cases("dw_weight", (CHANNELS, 1, 3, 3), "(6, 1, k, k)"),
    (
        "dw_weight",
        torch.randn(CHANNELS, 1, 3, 5),
        "dw_weight: expected a floating tensor (6, 1, k, k), got (6, 1, 3, 5)",
    ),
    *_weight_cases("pw_weight", (8, CHANNELS), "(O, 6)"),
    *_vector_cases("dw_bias", CHANNELS),
    *_vector_cases("pw_bias", 8),
    *_norm_cases("norm", CHANNELS),
    *_STRIDE_CASES,
]


def _layer_cases(weight: str, bias: str, shape: tuple[int, int]) -> list[tuple[str, Any, str]]:
    double = "expected x's dtype torch.float32, got"
    return [
        *_weight_cases(weight, shape, f"(O, {shape[1]})"),
        (weight, torch.zeros(*shape, 1), f"{weight}: expected a floating tensor (O, {shape[1]}), got {(*shape, 1)}"),
        (weight, torch.zeros(shape).double(), f"{weight}: {double} {shape} torch.float64 on cpu"),
        *_vector_cases(bias, shape[0]),
        (bias, torch.zeros(shape[0]).double(), f"{bias}: {double} ({shape[0]},) torch.float64 on cpu"),
    ]


_LINEAR_X_CASES = [
    ("x", torch.zeros(3, 8).long(), "x: expected a floating tensor (..., K), got (3, 8) torch.int64 on cpu"),
    ("x", torch.zeros(()), "x: expected a floating tensor (..., K), got () torch.float32 on cpu"),
    ("activation", "tanh", f"activation: {_ACTIVATIONS} 'tanh' (str)"),
    ("norm", nn.LayerNorm(8), "norm: expected LayerNorm.of(module) or None, got LayerNorm("),
    ("norm", LayerNorm(torch.ones(7), None), "norm.weight: expected a floating tensor (8,), got (7,) torch.float32"),
    ("norm", LayerNorm(None, torch.ones(8).double()), "norm.bias: expected x's dtype torch.float32, got (8,) torch"),
    ("norm", LayerNorm(None, None, "1"), "norm.eps: expected a number, got '1' (str)"),
    *_vector_cases("scale", 4),
    ("scale", torch.ones(4).double(), "scale: expected x's dtype torch.float32, got (4,) torch.float64 on cpu"),
    ("residual", torch.ones(4), "residual: expected a floating tensor (3, 4), got (4,) torch.float32 on cpu"),
    ("residual", torch.ones(3, 4).long(), "residual: expected a floating tensor (3, 4), got (3, 4) torch.int64 on cpu"),
    ("residual", torch.ones(3, 4, **META), "residual: expected a tensor on cpu, got (3, 4) torch.float32 on meta"),
    ("residual", torch.ones(3, 4).double(), "residual: expected x's dtype torch.float32, got (3, 4) torch.float64"),
    *_BACKEND,
]

_AROUND_LEFF = [
    ("norm", nn.LayerNorm(CHANNELS), "norm: expected LayerNorm.of(module) or None, got LayerNorm("),
    ("norm", LayerNorm(torch.ones(7), None), "norm.weight: expected a floating tensor (6,), got (7,) torch.float32"),
    ("norm", LayerNorm(None, None, "1"), "norm.eps: expected a number, got '1' (str)"),
    ("residual", torch.ones(CHANNELS), "residual: expected a floating tensor (2, 13, 6), got (6,) torch.float32"),
    ("residual", torch.ones(2, 12, CHANNELS), "residual: expected a floating tensor (2, 13, 6), got (2, 12, 6) torch"),
    ("residual", torch.ones(2, 13, CHANNELS, **META), "residual: expected a tensor on cpu, got (2, 13, 6) torch"),
    ("residual", torch.ones(2, 13, CHANNELS).double(), "residual: expected x's dtype torch.float32, got (2, 13, 6)"),
]

MESSAGES: dict[str, list[tuple[str, Any, str]]] = {
    "masked_attention": [*_QKV_CASES, *_BIAS_CASES],
    "class_attention": [*_QKV_CASES, *_BIAS_CASES],
    "head_mixed_attention": [
        *_QKV_CASES,
        *_matrix_cases("pre_weight"),
        *_matrix_cases("post_weight"),
        ("pre_weight", None, "pre_bias: expected None without pre_weight, got (4,) torch.float32 on cpu"),
        ("post_weight", None, "post_bias: expected None without post_weight, got (4,) torch.float32 on cpu"),
        *_vector_cases("pre_bias", HEADS),
        *_vector_cases("post_bias", HEADS),
        *_HEAD_NORM_CASES,
    ],
    "re_attention": [
        *_QKV_CASES,
        *_matrix_cases("weight"),
        ("weight", None, "weight: expected a floating tensor (H, H), got None (NoneType)"),
        *_vector_cases("bias", HEADS),
        *_HEAD_NORM_CASES,
    ],
    "talking_heads_attention": [
        *_QKV_CASES,
        *_matrix_cases("pre_weight"),
        *_matrix_cases("post_weight"),
        ("pre_weight", None, "pre_weight: expected a floating tensor (H, H), got None (NoneType)"),
        ("post_weight", None, "post_weight: expected a floating tensor (H, H), got None (NoneType)"),
        *_vector_cases("pre_bias", HEADS),
        *_vector_cases("post_bias", HEADS),
    ],
    "depthwise_separable_conv": [*_X_CASES, *_GRID_CASES, *_DEPTHWISE_CASES, *_BACKEND],
    "conv_projection": [
        *_X_CASES,
        *_GRID_CASES,
        *((name, None, f"{name}: expected a Projection, got None (NoneType)") for name in "qkv"),
        *((name, {}, f"{name}: expected a Projection, got {{}} (dict)") for name in "qkv"),
        *(
            (part, projection(**{name: value}), f"{part}.{message}")
            for part, (name, value, message) in zip(itertools.cycle("qkv"), _DEPTHWISE_CASES)
        ),
        *_BACKEND,
    ],
    "leff": [
        *_X_CASES,
        *_weight_cases("up_weight", (HIDDEN, CHANNELS), "(O, 6)"),
        *_weight_cases("dw_weight", (HIDDEN, 1, 3, 3), "(12, 1, k, k)"),
        *_weight_cases("down_weight", (CHANNELS, HIDDEN), "(O, 12)"),
        (
            "dw_weight",
            torch.randn(12, 1, 2, 2),
            "dw_weight: expected an odd kernel, which keeps the grid, got (12, 1, 2",
        ),
        ("down_weight", torch.randn(5, 12), "down_weight: expected (6, 12), as many channels as x has with prefix tok"),
        *_vector_cases("up_bias", HIDDEN),
        *_vector_cases("dw_bias", HIDDEN),
        *_vector_cases("down_bias", CHANNELS),
        *_norm_cases("up_norm", HIDDEN),
        *_norm_cases("dw_norm", HIDDEN),
        *_norm_cases("down_norm", CHANNELS),
        *_GRID_CASES,
        *_AROUND_LEFF,
        ("form", "both", "form: expected one of ('official', 'paper'), got 'both' (str)"),
        *_BACKEND,
    ],
    "token_depthwise_conv": [
        *_X_CASES,
        *_weight_cases("weight", (CHANNELS, 1, 3, 3), "(6, 1, k, k)"),
        ("weight", torch.randn(CHANNELS, 3, 3), "weight: expected a floating tensor (6, 1, k, k), got (6, 3, 3)"),
        ("weight", torch.randn(CHANNELS, 2, 3, 3), "weight: expected a floating tensor (6, 1, k, k), got (6, 2, 3, 3)"),
        ("weight", torch.randn(CHANNELS, 1, 0, 0), "weight: expected a floating tensor (6, 1, k, k), got (6, 1, 0, 0)"),
        *_vector_cases("bias", CHANNELS),
        *_GRID_CASES,
        *_STRIDE_CASES,
        ("activation", "tanh", f"activation: {_ACTIVATIONS} 'tanh' (str)"),
        ("pre_activation", nn.GELU(), f"pre_activation: {_ACTIVATIONS} GELU("),
        ("residual", "yes", "residual: expected a bool, got 'yes' (str)"),
        *_norm_cases("norm", CHANNELS),
        *_norm_cases("pre_norm", CHANNELS),
        *_BACKEND,
    ],
    "linear": [*_LINEAR_X_CASES, *_layer_cases("weight", "bias", (4, 8))],
    "mlp": [
        *_LINEAR_X_CASES,
        *_layer_cases("fc1_weight", "fc1_bias", (6, 8)),
        *_layer_cases("fc2_weight", "fc2_bias", (4, 6)),
    ],
    "glu_mlp": [
        *(case for case in _LINEAR_X_CASES if case[0] != "activation"),
        ("activation", "tanh", f"activation: {_GATES} 'tanh' (str)"),
        ("hidden_norm", nn.LayerNorm(6), "hidden_norm: expected LayerNorm.of(module) or None, got LayerNorm("),
        (
            "hidden_norm",
            LayerNorm(torch.ones(8), None),
            "hidden_norm.weight: expected a floating tensor (6,), got (8,)",
        ),
        ("hidden_norm", LayerNorm(None, None, "1"), "hidden_norm.eps: expected a number, got '1' (str)"),
        *_layer_cases("gate_weight", "gate_bias", (6, 8)),
        *_layer_cases("value_weight", "value_bias", (6, 8)),
        (
            "value_weight",
            torch.zeros(7, 8),
            "value_weight: expected gate_weight's shape (6, 8), got (7, 8) torch.float32",
        ),
        *_layer_cases("fc2_weight", "fc2_bias", (4, 6)),
    ],
    "conv_batch_norm": [
        ("x", torch.zeros(3, 8, 8), "x: expected a floating tensor (B, C, H, W), got (3, 8, 8) torch.float32 on cpu"),
        (
            "x",
            torch.zeros(2, 3, 8, 8).long(),
            "x: expected a floating tensor (B, C, H, W), got (2, 3, 8, 8) torch.int64",
        ),
        ("weight", torch.zeros(6, 4, 3, 3), "weight: expected a floating tensor (O, 3, k, l), got (6, 4, 3, 3)"),
        ("weight", torch.zeros(6, 3, 3), "weight: expected a floating tensor (O, 3, k, l), got (6, 3, 3)"),
        ("weight", torch.zeros(6, 3, 9, 1), "padding: expected enough for a kernel of (9, 1) to fit the padded (8, 8)"),
        *_vector_cases("bias", CHANNELS),
        *_norm_cases("norm", CHANNELS),
        ("stride", 0, "stride: expected an int from 1 to 1073741824, or two, got 0 (int)"),
        ("stride", True, "stride: expected an int from 1 to 1073741824, or two, got True (bool)"),
        ("stride", [2], "stride: expected an int from 1 to 1073741824, or two, got [2] (list)"),
        ("padding", [0], "padding: expected an int from 0 to 1073741824, or two, got [0] (list)"),
        ("padding", (1, -1), "padding: expected an int from 0 to 1073741824, or two, got (1, -1) (tuple)"),
        ("padding", 2**62, "padding: expected an int from 0 to 1073741824, or two, got 4611686018427387904"),
        ("activation", "tanh", f"activation: {_ACTIVATIONS} 'tanh' (str)"),
        *_BACKEND,
    ],
}
"""By operator: the argument, the bad value, and how the message begins."""


@pytest.mark.parametrize(
    ("op", "name", "value", "message"),
    [pytest.param(op, *case, id=f"{op}-{case[2][:60]}") for op, cases in MESSAGES.items() for case in cases],
)
def test_the_error_says_what_was_expected_and_what_was_given(op, name, value, message):
    for found in refusals(op, {name: value}):
        assert found.startswith(message)


# --- Values of a wrong kind, for every argument ---------------------------------------------------------------------


def _tensors(good: Tensor, first: bool, optional: bool) -> Iterator[Any]:
    yield from (good.numpy(), good.tolist(), "text", 3, good.to(torch.complex64))
    yield good.float() if good.dtype == torch.bool else good.long()
    if not first:  # the others' devices are compared with its
        yield good.to("meta")
    if not optional:
        yield None


def _numbers(least: int, optional: bool) -> Iterator[Any]:
    yield from (1.0, "1", True, (1, 1), torch.ones(2), torch.tensor(1), least - 1)
    if not optional:
        yield None


WRONG: dict[str, tuple[Any, ...]] = {
    "tuple[int, int]": (
        *(None, 12, "34", (12,), (3, 4, 1), (3.0, 4.0), (True, 12), (0, 12), (-3, -4), ("3", "4"), (3, None)),
        *((4, 2**62 + 3), (2**32, 2**32), (2**63, 2), (2**70, 1), torch.ones(3)),
    ),
    "float": ("1", None, [0.5], 1j),
    "float | None": ("1", [0.5], 1j),
    "bool": ("yes", None, []),
    "str": ("text", None, 3, []),
    "str | None": ("tanh", 3, [], nn.GELU()),
    "BatchNorm": (None, "text", (1, 2), nn.BatchNorm2d(4), torch.ones(4)),
    "LayerNorm | None": ("text", (1, 2), nn.LayerNorm(8), torch.ones(8)),
    "BatchNorm | None": ("text", (1, 2), nn.BatchNorm2d(4), torch.ones(4)),
    "BatchNorm | LayerNorm | None": ("text", (1, 2), nn.LayerNorm(4), torch.ones(4)),
    "Projection": (None, {}, "text", (1, 2), tuple(projection()), torch.ones(4)),
    "int | tuple[int, int]": (None, 1.0, "1", True, -1, (1, 1, 1), (1.0, 1), (1, None), 2**63, (1, 2**70)),
}


def wrong_kinds(parameters: dict[str, str], good: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """(name, value) for each of the annotated parameters."""
    for i, (name, annotation) in enumerate(parameters.items()):
        if annotation.startswith("Tensor"):
            values = _tensors(good[name], i == 0, annotation == "Tensor | None")
        elif annotation in ("int", "int | None"):
            values = _numbers(1 if name == "stride" else 0, annotation != "int")
        else:
            values = iter(WRONG[annotation])
        yield from ((name, value) for value in values)


def annotations(function: Callable[..., Any]) -> dict[str, str]:
    return {name: str(p.annotation) for name, p in inspect.signature(function).parameters.items()}


@pytest.mark.parametrize("op", CALLS)
def test_a_value_of_a_wrong_kind_is_named(op):
    for name, value in wrong_kinds(annotations(getattr(ops, op)), CALLS[op](False)):
        if name == "dropout_after_mix":  # not looked at without dropout
            continue
        assert_named(name, op, {name: value})


def assert_named(name: str, op: str, change: dict[str, Any]) -> None:
    """A call with the change raises errors that begin with this name."""
    try:
        assert [found for found in refusals(op, change) if not re.match(rf"{re.escape(name)}[:.]", found)] == []
    except AssertionError as error:
        raise AssertionError(f"{name}: {change!r:.200}: {error}") from error


@pytest.mark.parametrize("op", [op for op in CALLS if any(isinstance(v, BatchNorm) for v in fields(CALLS[op](False)))])
def test_a_field_of_a_norm_of_a_wrong_kind_is_named(op):
    for name, norm in CALLS[op](False).items():
        if not isinstance(norm, BatchNorm):
            continue
        for field, value in itertools.product(BatchNorm._fields[:4], ("text", [1.0], torch.ones(3).numpy(), 1)):
            assert_named(f"{name}.{field}", op, {name: norm._replace(**{field: value})})


def test_a_field_of_a_projection_of_a_wrong_kind_is_named():
    fields = {name: annotation.__forward_arg__ for name, annotation in Projection.__annotations__.items()}
    for name, value in wrong_kinds(fields, projection()._asdict()):
        for part in "qkv":
            assert_named(f"{part}.{name}", "conv_projection", {part: projection(**{name: value})})


# --- The tables ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("op", CALLS)
def test_what_the_cases_start_from_is_accepted(op, batch):
    for backend in BACKENDS:
        if op == "conv_batch_norm" and backend == "cpp" and batch:
            continue
        assert all(part.isfinite().all() for part in pytree.tree_leaves(getattr(ops, op)(**CALLS[op](batch))))


def test_an_array_is_named_as_one():
    q = torch.ones(1, 2, 4, 8)
    with pytest.raises(ValueError, match=r"^q: .*got a numpy array \(1, 2, 4, 8\): torch.from_numpy\(\.\.\.\) makes"):
        ops.masked_attention(q.numpy(), q, q)


def test_tokens_that_overflow():
    """64 bits lose the product of this grid: 0, the number of tokens of x."""
    for change in ({}, {"requires_grad": True}):
        x = torch.ones(1, 0, 8, **change)
        with pytest.raises(ValueError, match=r"grid: expected \(h, w\) with h \* w = 0 tokens of x"):
            ops.token_depthwise_conv(x, torch.ones(8, 1, 1, 1), grid=(2**32, 2**32))
    with pytest.raises(ValueError, match=r"grid: expected \(h, w\) with h \* w = 4 tokens of x"):
        ops.token_depthwise_conv(torch.ones(1, 4, 8), torch.ones(8, 1, 1, 1), grid=(4, 2**62 + 1))


def test_residual_wants_the_grid_kept():
    arguments = CALLS["token_depthwise_conv"](False)
    message = r"residual: expected False, since the convolution gives a grid of \(2, 2\) from \(3, 4\), got True"
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients), pytest.raises(ValueError, match=message):
            ops.token_depthwise_conv(**arguments, stride=2, residual=True)


def test_every_operator_and_argument_is_here():
    public = {name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))}
    assert set(MESSAGES) == set(CALLS) == public
    for op in public:
        assert set(annotations(getattr(ops, op))) - {"dropout_after_mix"} <= {name for name, _, _ in MESSAGES[op]}, op
