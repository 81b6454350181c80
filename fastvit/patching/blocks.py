"""Pre-norm transformer blocks whole, at inference on the CPU: four calls instead of forty.

Norm and queries, keys, values; attention; projection, LayerScale and residual; norm, MLP, LayerScale and residual. A
block of which any part is hooked, wrapped, replaced or left alone by ``patch`` calls its parts one by one, as does one
that trains.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastvit import ops
from fastvit.ops._operator import any_autocast
from fastvit.patching.fusion import Fused, readable
from fastvit.patching.parts import activation_name, dropout_p
from fastvit.reference.functional import LayerNorm
from fastvit.reference.layers import DropPath

_PARTS = {"norm1": nn.LayerNorm, "norm2": nn.LayerNorm, "drop_path": DropPath}
_OF_ATTENTION = {"qkv": nn.Linear, "proj": nn.Linear, "proj_drop": nn.Dropout}
_OF_MLP = {"fc1": nn.Linear, "fc2": nn.Linear, "drop": nn.Dropout}


def at_inference(block: Any, x: Tensor) -> bool:
    """Whether a block may run whole, as far as the call and not its parts decide that."""
    return (
        not torch.is_grad_enabled()
        and not block.training
        and type(x) is Tensor
        and x.is_cpu
        and block.fastvit_backend in ("auto", "cpp")
        and not any_autocast()
        and torch._C._get_tracing_state() is None
        and not torch.compiler.is_exporting()
        and not _has_any_global_hook()
    )


def is_known(part: Any, plain: tuple[type[nn.Module], ...], backend: str, reads: Mapping[str, type[nn.Module]]) -> bool:
    """Whether a part is fused, of exactly one of these classes, and may be read down to its own parts."""
    return (
        isinstance(part, Fused)
        and part.fastvit_plain in plain
        and part.fastvit_backend == backend
        and not part.training
        and not vars(part).keys() & _OVERRIDABLE
        and readable(part, type(part))
        and all(readable(part._modules.get(name), expected) for name, expected in reads.items())
    )


_OVERRIDABLE = {"forward", "project", "merge", "linear"}
"""Methods that a block does not call, unless somebody put one on the instance."""


class BlockSeam(Fused):
    """A block of self-attention with one product for queries, keys and values, and an MLP."""

    fastvit_op = "linear"
    attentions: ClassVar[tuple[type[nn.Module], ...]]
    """The attention classes it knows, and below the class of its MLP."""
    mlps: ClassVar[tuple[type[nn.Module], ...]]

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if not (at_inference(self, x) and _is_whole(self)):
            return self.fastvit_plain.forward(self, x, mask)
        attention, mlp = self.attn, self.mlp
        q, k, v = split_heads(
            ops.linear(x, attention.qkv.weight, attention.qkv.bias, norm=LayerNorm.of(self.norm1)), attention
        )
        out = attention.attend(q, k, v, mask).transpose(1, 2).flatten(2)
        scale_1, scale_2 = getattr(self, "gamma_1", None), getattr(self, "gamma_2", None)
        x = ops.linear(out, attention.proj.weight, attention.proj.bias, scale=scale_1, residual=x)
        return ops.mlp(
            x,
            mlp.fc1.weight,
            mlp.fc1.bias,
            mlp.fc2.weight,
            mlp.fc2.bias,
            activation_name(mlp.act),
            norm=LayerNorm.of(self.norm2),
            scale=scale_2,
            residual=x,
        )


def split_heads(qkv: Tensor, attention: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(B, N, 3 * C) in the order (q|k|v, heads, head_dim) to views (B, H, N, D)."""
    batch, tokens, _ = qkv.shape
    q, k, v = qkv.view(batch, tokens, 3, attention.num_heads, attention.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def _is_whole(block: Any) -> bool:
    """Whether the block is of known parts, none of which does more than its tensors tell."""
    attention, mlp, backend = block.attn, block.mlp, block.fastvit_backend
    return (
        all(readable(block._modules.get(name), expected) for name, expected in _PARTS.items())
        and not block.drop_path.training
        and is_known(attention, block.attentions, backend, _OF_ATTENTION)
        and dropout_p(attention.proj_drop) == 0.0
        and is_known(mlp, block.mlps, backend, _OF_MLP)
        and dropout_p(mlp.drop) == 0.0
        and activation_name(mlp.act) is not None
        and getattr(block, "scale_adjustment", 1.0) == 1.0
    )
