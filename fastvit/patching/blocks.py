"""Pre-norm transformer blocks whole, at inference on the CPU: four calls instead of forty.

Norm and queries, keys, values; attention; projection, LayerScale and residual; norm, MLP, LayerScale and residual. A
block of which any part is hooked, wrapped, replaced or left alone by ``patch`` calls its parts one by one, as does one
that trains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from fastvit import ops
from fastvit.ops._operator import any_autocast, is_dynamo_compiling
from fastvit.patching.fusion import Fused, has_hooks_for_all, is_ours, readable
from fastvit.patching.parts import activation_name, dropout_p
from fastvit.reference.functional import LayerNorm
from fastvit.reference.layers import DropPath

_OF_MLP = {"fc1": nn.Linear, "fc2": nn.Linear, "drop": nn.Dropout}


def at_inference(block: Any, x: Tensor) -> bool:
    """Whether a block may run whole, as far as the call and not its parts decide that."""
    return (
        not torch.is_grad_enabled()
        and not block.training
        and type(x) in (Tensor, FakeTensor)
        and x.is_cpu
        and block.fastvit_backend in ("auto", "cpp")
        and not any_autocast()
        and torch._C._get_tracing_state() is None
        and not torch.compiler.is_exporting()
        and not has_hooks_for_all()
    )


def computes_first(block: Any, x: Tensor) -> bool:
    """Whether a block may compute its first tokens alone: its forward is not one that was put over the fused one."""
    return is_ours(type(block)) and at_inference(block, x)


def is_known(part: Any, plain: tuple[type[nn.Module], ...], backend: str, reads: Mapping[str, type[nn.Module]]) -> bool:
    """Whether a part is fused, of exactly one of these classes, and may be read down to its own parts."""
    return (
        isinstance(part, Fused)
        and is_ours(type(part))
        and part.fastvit_plain in plain
        and part.fastvit_backend == backend
        and not part.training
        and not vars(part).keys() & _OVERRIDABLE
        and readable(part, type(part))
        and all(readable(part._modules.get(name), expected) for name, expected in reads.items())
    )


_OVERRIDABLE = {"forward", "project", "merge", "linear", "reduce"}
"""Methods that a block does not call, unless somebody put one on the instance."""


class BlockSeam(Fused):
    """A block of self-attention with one product for queries, keys and values, and an MLP."""

    fastvit_op = "linear"
    fastvit_needs = ("attn", "mlp")
    attentions: ClassVar[tuple[type[nn.Module], ...]]
    """The attention classes it knows, and below the classes of MLP."""
    mlps: ClassVar[tuple[type[nn.Module], ...]]

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if not (at_inference(self, x) and adds_attention(self) and adds_mlp(self)):
            return self.fastvit_plain.forward(self, x, mask)
        return add_mlp(self, add_attention(self, x, mask))


def adds_attention(block: Any, **reads: type[nn.Module]) -> bool:
    """Whether the attention, and all around it, is known and does nothing more than its tensors tell.

    Args:
        reads: linear layers of the attention beside ``proj``; by default ``qkv``.
    """
    attention = block.attn
    of_attention = {**(reads or {"qkv": nn.Linear}), "proj": nn.Linear, "proj_drop": nn.Dropout}
    return (
        is_over_channels(block._modules.get("norm1"))
        and _passes(block._modules.get("drop_path"))
        and getattr(block, "scale_adjustment", 1.0) == 1.0
        and is_known(attention, block.attentions, block.fastvit_backend, of_attention)
        and dropout_p(attention.proj_drop) == 0.0
    )


def adds_mlp(block: Any) -> bool:
    """Whether the MLP, and all around it, is known and does nothing more than its tensors tell."""
    mlp = block.mlp
    return (
        is_over_channels(block._modules.get("norm2"))
        and _passes(block._modules.get("drop_path"))
        and is_known(mlp, block.mlps, block.fastvit_backend, _OF_MLP)
        and dropout_p(mlp.drop) == 0.0
        and activation_name(mlp.act) is not None
    )


def is_over_channels(norm: Any) -> bool:
    """Whether a part is a LayerNorm over channels that may be read."""
    return readable(norm, nn.LayerNorm) and len(norm.normalized_shape) == 1


def _passes(drop_path: Any) -> bool:
    return readable(drop_path, DropPath) and not drop_path.training


def add_attention(block: Any, x: Tensor, mask: Tensor | None) -> Tensor:
    """x + gamma_1 attn(norm1(x)), of an attention with one product for queries, keys and values."""
    attention = block.attn
    norm, backend = LayerNorm.of(block.norm1), block.fastvit_backend
    qkv = ops.linear(x, attention.qkv.weight, attention.qkv.bias, norm=norm, backend=backend)
    return add_projection(block, x, attention.attend(*split_heads(attention, qkv, 3), mask))


def add_attention_to_first(block: Any, x: Tensor, mask: Tensor | None, count: int) -> Tensor:
    """The first ``count`` tokens of :func:`add_attention`: queries of those, keys and values of all."""
    attention, norm, backend = block.attn, LayerNorm.of(block.norm1), block.fastvit_backend
    first, width = x[:, :count], x.shape[2]
    weight, bias = attention.qkv.weight, attention.qkv.bias
    of_q, of_kv = (None, None) if bias is None else (bias[:width], bias[width:])
    q = ops.linear(first, weight[:width], of_q, norm=norm, backend=backend)
    kv = ops.linear(x, weight[width:], of_kv, norm=norm, backend=backend)
    heads = (*split_heads(attention, q), *split_heads(attention, kv, 2))
    return add_projection(block, first, attention.attend(*heads, mask_of_first(mask, count)))


def split_heads(attention: Any, x: Tensor, count: int = 1) -> Sequence[Tensor]:
    """Tokens (B, N, count * H * D) as views (B, H, N, D), each made by one call."""
    heads, head_dim = attention.num_heads, attention.head_dim
    if is_dynamo_compiling():  # which chooses strides itself
        return x.unflatten(2, (count, heads, head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
    (batch, tokens, _), (of_batch, of_token, of_channel) = x.shape, x.stride()
    sizes, strides = (batch, heads, tokens, head_dim), (of_batch, head_dim * of_channel, of_token, of_channel)
    first, step = x.storage_offset(), heads * head_dim * of_channel
    return [x.as_strided(sizes, strides, first + index * step) for index in range(count)]


def merge_heads(out: Tensor) -> Tensor:
    """What the heads gathered (B, H, N, D) as tokens (B, N, H * D), by one call where they lie so."""
    (batch, heads, tokens, head_dim), (of_batch, of_head, of_token, of_channel) = out.shape, out.stride()
    if is_dynamo_compiling() or of_head != head_dim * of_channel:
        return out.transpose(1, 2).flatten(2)
    return out.as_strided((batch, tokens, heads * head_dim), (of_batch, of_token, of_channel))


def mask_of_first(mask: Tensor | None, count: int) -> Tensor | None:
    """The part of an attention's mask that is for the first ``count`` queries."""
    return mask if mask is None or mask.dim() == 2 or mask.shape[-2] == 1 else mask[..., :count, :]


def add_projection(block: Any, x: Tensor, out: Tensor) -> Tensor:
    """x + gamma_1 proj(out), of what the heads gathered, (B, H, N, D)."""
    proj = block.attn.proj
    scale = getattr(block, "gamma_1", None)
    return ops.linear(merge_heads(out), proj.weight, proj.bias, scale=scale, residual=x, backend=block.fastvit_backend)


def add_mlp(block: Any, x: Tensor) -> Tensor:
    """x + gamma_2 mlp(norm2(x))."""
    fc1, fc2, activation = block.mlp.fc1, block.mlp.fc2, activation_name(block.mlp.act)
    around = {"norm": LayerNorm.of(block.norm2), "scale": getattr(block, "gamma_2", None), "residual": x}
    layers = fc1.weight, fc1.bias, fc2.weight, fc2.bias
    return ops.mlp(x, *layers, activation, **around, backend=block.fastvit_backend)
