"""The two halves of a pre-norm block by the tensors it is made of: for the blocks of libraries, whose parts have names
of their own. When a block may run so is for its override to say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from fastvit import ops
from fastvit.patching.rows.blocks import merge_heads, split_heads
from fastvit.reference.functional import LayerNorm

Layer = tuple[Tensor, Tensor | None]
"""Weight and bias of a linear layer."""


class Heads(NamedTuple):
    num_heads: int
    head_dim: int


def layer_of(linear: nn.Linear) -> Layer:
    """Its tensors."""
    return linear.weight, linear.bias


def add_attention(
    x: Tensor,
    norm: nn.LayerNorm,
    projections: Sequence[Layer],
    heads: Heads,
    attend: Callable[..., Tensor],
    out: Layer | None,
    backend: str,
    scale: Tensor | None = None,
    count: int | None = None,
) -> Tensor:
    """x + scale * out(attend(q, k, v)) of norm(x).

    Args:
        projections: that of queries, keys and values together, or the three.
        attend: takes them as (B, H, N, D), and gives the same.
        out: the layer behind; None where there is none.
        scale: a LayerScale.
        count: so many of the first tokens alone, which attend to all.
    """
    of_x = LayerNorm.of(norm)
    if count is None:
        tokens = [ops.linear(x, *layer, norm=of_x, backend=backend) for layer in projections]
    else:
        whole, x = x, x[:, :count]
        of_q, *of_kv = _queries_apart(projections)
        tokens = [ops.linear(x, *of_q, norm=of_x, backend=backend)]
        tokens += [ops.linear(whole, *layer, norm=of_x, backend=backend) for layer in of_kv]
    width = heads.num_heads * heads.head_dim
    attended = merge_heads(attend(*(q for each in tokens for q in split_heads(heads, each, each.shape[2] // width))))
    if out is None:
        return x + (attended if scale is None else scale * attended)
    return ops.linear(attended, *out, scale=scale, residual=x, backend=backend)


def _queries_apart(projections: Sequence[Layer]) -> list[Layer]:
    """The layer of queries, and that of keys and values, or the two."""
    if len(projections) > 1:
        return list(projections)
    (weight, bias), width = projections[0], projections[0][0].shape[0] // 3
    return [
        (weight[:width], None if bias is None else bias[:width]),
        (weight[width:], None if bias is None else bias[width:]),
    ]


def add_mlp(
    x: Tensor,
    norm: nn.LayerNorm,
    layers: tuple[nn.Linear, str | None, nn.Linear],
    backend: str,
    scale: Tensor | None = None,
) -> Tensor:
    """x + scale * mlp(norm(x)), of a linear layer, the name of an activation and a linear layer."""
    fc1, activation, fc2 = layers
    around = {"norm": LayerNorm.of(norm), "scale": scale, "residual": x}
    return ops.mlp(x, *layer_of(fc1), *layer_of(fc2), activation, **around, backend=backend)
