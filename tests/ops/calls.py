"""A call of each public operator, with every tensor argument it has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastvit.reference.functional import BatchNorm, LayerNorm, Projection

HEADS, CHANNELS, HIDDEN = 4, 6, 12


def batch_norm(features: int, batch: bool = False, **changes: Any) -> BatchNorm:
    running = torch.zeros(features), torch.ones(features)
    return BatchNorm(*running, torch.ones(features), torch.zeros(features), batch)._replace(**changes)


def boolean(*shape: int, device: str = "cpu") -> Tensor:
    return torch.ones(shape, dtype=torch.bool, device=device)


def _around(inputs: int, outputs: int) -> dict[str, Any]:
    norm = LayerNorm(torch.ones(inputs), torch.zeros(inputs))
    return {"norm": norm, "scale": torch.ones(outputs), "residual": torch.randn(3, outputs)}


def attention(batch: bool) -> dict[str, Any]:
    q, k, v = torch.randn(2, HEADS, 5, 8), torch.randn(2, HEADS, 7, 8), torch.randn(2, HEADS, 7, 8)
    return {"q": q, "k": k, "v": v, "mask": boolean(2, 7)}


def square() -> Tensor:
    return torch.randn(HEADS, HEADS)


def projection(batch: bool = False, **changes: Any) -> Projection:
    part = Projection(
        dw_weight=torch.randn(CHANNELS, 1, 3, 3),
        norm=batch_norm(CHANNELS, batch),
        pw_weight=torch.randn(8, CHANNELS),
        pw_bias=torch.randn(8),
        dw_bias=torch.randn(CHANNELS),
    )
    return part._replace(**changes)


TOKENS = {"grid": (3, 4), "prefix_tokens": 1}

CALLS: dict[str, Callable[[bool], dict[str, Any]]] = {
    "masked_attention": lambda batch: {**attention(batch), "bias": torch.randn(HEADS, 5, 7)},
    "class_attention": lambda batch: {**attention(batch), "bias": torch.randn(HEADS, 5, 7)},
    "head_mixed_attention": lambda batch: {
        **attention(batch),
        "pre_weight": square(),
        "pre_bias": torch.randn(HEADS),
        "post_weight": square(),
        "post_bias": torch.randn(HEADS),
        "norm": batch_norm(HEADS, batch),
    },
    "re_attention": lambda batch: {
        **attention(batch),
        "weight": square(),
        "bias": torch.randn(HEADS),
        "norm": batch_norm(HEADS, batch),
    },
    "talking_heads_attention": lambda batch: {
        **attention(batch),
        "pre_weight": square(),
        "pre_bias": torch.randn(HEADS),
        "post_weight": square(),
        "post_bias": torch.randn(HEADS),
    },
    "depthwise_separable_conv": lambda batch: {
        "x": torch.randn(2, 13, CHANNELS),
        **projection(batch)._asdict(),
        **TOKENS,
    },
    "conv_projection": lambda batch: {
        "x": torch.randn(2, 13, CHANNELS),
        **{name: projection(batch) for name in "qkv"},
        **TOKENS,
    },
    "leff": lambda batch: {
        "x": torch.randn(2, 13, CHANNELS),
        "up_weight": torch.randn(HIDDEN, CHANNELS),
        "up_bias": torch.randn(HIDDEN),
        "dw_weight": torch.randn(HIDDEN, 1, 3, 3),
        "dw_bias": torch.randn(HIDDEN),
        "down_weight": torch.randn(CHANNELS, HIDDEN),
        "down_bias": torch.randn(CHANNELS),
        "up_norm": batch_norm(HIDDEN, batch),
        "dw_norm": batch_norm(HIDDEN, batch),
        "down_norm": batch_norm(CHANNELS, batch),
        "norm": LayerNorm(torch.randn(CHANNELS), torch.randn(CHANNELS)),
        "residual": torch.randn(2, 13, CHANNELS),
        "grid": (3, 4),
    },
    "token_depthwise_conv": lambda batch: {
        "x": torch.randn(2, 13, CHANNELS),
        "weight": torch.randn(CHANNELS, 1, 3, 3),
        "bias": torch.randn(CHANNELS),
        "pre_norm": batch_norm(CHANNELS, batch),
        "norm": batch_norm(CHANNELS, batch),
        **TOKENS,
    },
    "linear": lambda batch: (
        {"x": torch.randn(3, 8), "weight": torch.randn(4, 8), "bias": torch.randn(4)} | _around(8, 4)
    ),
    "mlp": lambda batch: (
        {
            "x": torch.randn(3, 8),
            "fc1_weight": torch.randn(6, 8),
            "fc1_bias": torch.randn(6),
            "fc2_weight": torch.randn(4, 6),
            "fc2_bias": torch.randn(4),
        }
        | _around(8, 4)
    ),
    "glu_mlp": lambda batch: (
        {
            "x": torch.randn(3, 8),
            "gate_weight": torch.randn(6, 8),
            "gate_bias": torch.randn(6),
            "value_weight": torch.randn(6, 8),
            "value_bias": torch.randn(6),
            "fc2_weight": torch.randn(4, 6),
            "fc2_bias": torch.randn(4),
            "hidden_norm": LayerNorm(torch.ones(6), torch.zeros(6)),
        }
        | _around(8, 4)
    ),
    "conv_batch_norm": lambda batch: {
        "x": torch.randn(2, 3, 8, 8),
        "weight": torch.randn(CHANNELS, 3, 3, 3),
        "bias": torch.randn(CHANNELS),
        "norm": batch_norm(CHANNELS, batch),
    },
}
"""By public operator, ``f(batch)``: arguments that it takes, with norms by statistics of the batch or running ones."""

WRONG: dict[str, tuple[str, Any]] = {
    "masked_attention": ("mask", boolean(1, 6)),
    "class_attention": ("mask", boolean(1, 6)),
    "head_mixed_attention": ("mask", boolean(1, 6)),
    "re_attention": ("bias", torch.zeros(3)),
    "talking_heads_attention": ("post_weight", torch.zeros(3, 3)),
    "depthwise_separable_conv": ("pw_weight", torch.zeros(8, 7)),
    "conv_projection": ("grid", (5, 5)),
    "leff": ("form", "both"),
    "token_depthwise_conv": ("bias", torch.zeros(5)),
    "linear": ("weight", torch.zeros(4, 9)),
    "mlp": ("fc2_bias", torch.zeros(5)),
    "glu_mlp": ("value_weight", torch.zeros(6, 9)),
    "conv_batch_norm": ("stride", 0),
}
"""By operator, an argument that is wrong, which no implementation looks at when it is asked for its reasons."""


def fields(arguments: dict[str, Any]) -> Iterator[Any]:
    """The arguments, and those of Projections."""
    for value in arguments.values():
        yield value
        if isinstance(value, Projection):
            yield from value
