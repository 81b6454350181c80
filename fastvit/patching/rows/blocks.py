"""Pre-norm transformer blocks whole, at inference on the CPU: four calls instead of forty.

Norm and queries, keys, values; attention; projection, LayerScale and residual; norm, MLP, LayerScale and residual. A
block of which any part is hooked, wrapped, replaced or left alone by ``patch`` calls its parts one by one, as does one
that trains.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from fastvit import ops
from fastvit.ops._operator import any_autocast, exports_plain, is_dynamo_compiling
from fastvit.patching.fusion import Fused, Parts, are_plain, fused_backend, is_fused, is_ours, parts_of, plain_class
from fastvit.patching.replay import permanent, replayed
from fastvit.patching.rows.parts import activation_name, dropout_p
from fastvit.reference.functional import LayerNorm
from fastvit.reference.layers import DropPath


def whole_backend(block: Any, x: Tensor) -> str | None:
    """The backend for a block that may run whole, as far as the call and not its parts decide that; else None."""
    if (
        torch.is_grad_enabled()
        or block.training
        or type(x) not in (Tensor, FakeTensor)
        or not x.is_cpu
        or any_autocast()
        or torch._C._get_tracing_state() is not None
        or (torch.compiler._is_exporting_flag and exports_plain())
    ):
        return None
    backend = fused_backend(block)
    return backend if backend in ("auto", "cpp") else None


def first_backend(block: Any, x: Tensor) -> str | None:
    """The same for its first tokens alone: not where its forward is one that was put over the fused one.

    Nor where anybody listens to the attention's maps, which have a row for every token.
    """
    listened = not is_ours(type(block)) or fused_backend(block._modules.get("attn")) is None
    return None if listened else whole_backend(block, x)


class BlockOverride(Fused):
    """A block of self-attention with one product for queries, keys and values, and an MLP."""

    fastvit_op = "linear"
    fastvit_needs = ("attn", "mlp")
    attentions: ClassVar[tuple[type[nn.Module], ...]]
    """The attention classes it knows, and below the classes of MLP."""
    mlps: ClassVar[tuple[type[nn.Module], ...]]

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        out = replayed(self, _run_whole, x, mask)
        return plain_class(self).forward(self, x, mask) if out is None else out


def _run_whole(block: Any, x: Tensor, mask: Tensor | None) -> Tensor | None:
    backend = whole_backend(block, x)
    if backend is None or not (adds_attention(block, backend) and adds_mlp(block, backend)):
        return None
    return add_mlp(block, add_attention(block, x, mask, backend), backend)


def parts_of_attention(*linears: str) -> Parts:
    """What is read around and in an attention with these linear layers and ``proj``."""
    reads = {"norm1": nn.LayerNorm, "drop_path": DropPath, "attn.proj": nn.Linear, "attn.proj_drop": nn.Dropout}
    return parts_of({**reads, **{f"attn.{name}": nn.Linear for name in linears}})


_ATTENTION = parts_of_attention("qkv")
_MLP = parts_of(
    {
        "norm2": nn.LayerNorm,
        "drop_path": DropPath,
        "mlp.fc1": nn.Linear,
        "mlp.fc2": nn.Linear,
        "mlp.drop": nn.Dropout,
    }
)


def _known(block: Any, name: str) -> tuple[type, ...]:
    """The classes that a block's override knows of a part; another thread may unpatch, then it is none."""
    return getattr(block, name, (type(None),))


def adds_attention(block: Any, backend: str, parts: Parts = _ATTENTION) -> bool:
    """Whether the attention, and all around it, is known and does nothing more than its tensors tell."""
    modules = block._modules
    attention = modules.get("attn")
    return (
        is_fused(attention, backend, *_known(block, "attentions"))
        and not attention.training
        and are_plain(block, parts)
        and len(modules["norm1"].normalized_shape) == 1
        and not modules["drop_path"].training
        and (_FACTOR not in block.__dict__ or scales_positively(block))
        and dropout_p(attention._modules["proj_drop"]) == 0.0
    )


def scales_positively(block: Any) -> bool:
    """Whether DeepViT's factor in front of a block's norms may be brought behind them."""
    factor = block.scale_adjustment
    return isinstance(factor, (int, float)) and 0.0 < factor < math.inf


_FACTOR = "scale_adjustment"
_constants: dict[tuple[object, ...], Tensor] = {}
"""By value, width, dtype and device. They stay, since weights are packed with them."""


def _of_scaled(norm: LayerNorm, block: Any) -> LayerNorm:
    """norm(s x) as a norm of x: eps is as large beside the variance."""
    return norm._replace(eps=norm.eps / block.scale_adjustment**2)


def _inverse_of_factor(block: Any, x: Tensor) -> Tensor | None:
    """1 / s for every channel, None for 1."""
    factor = block.scale_adjustment
    if factor == 1.0:
        return None
    key = 1.0 / factor, x.shape[2], x.dtype, x.device
    real = type(x) is Tensor and not is_dynamo_compiling()
    if not real or key not in _constants:
        with torch.inference_mode(False):
            made = torch.full((x.shape[2],), 1.0 / factor, dtype=x.dtype, device=x.device)
        if not real or type(made) is not Tensor:
            return made
        _constants[key] = permanent(made)
    return _constants[key]


def adds_mlp(block: Any, backend: str) -> bool:
    """Whether the MLP, and all around it, is known and does nothing more than its tensors tell."""
    modules = block._modules
    mlp = modules.get("mlp")
    return (
        is_fused(mlp, backend, *_known(block, "mlps"))
        and not mlp.training
        and are_plain(block, _MLP)
        and len(modules["norm2"].normalized_shape) == 1
        and not modules["drop_path"].training
        and dropout_p(mlp._modules["drop"]) == 0.0
        and activation_name(mlp._modules.get("act")) is not None
    )


def add_attention(block: Any, x: Tensor, mask: Tensor | None, backend: str) -> Tensor:
    """x + gamma_1 attn(norm1(x)), of an attention with one product for queries, keys and values."""
    attention, norm = block.attn, LayerNorm.of(block.norm1)
    if _FACTOR in block.__dict__:
        norm = _of_scaled(norm, block)
    qkv = ops.linear(x, attention.qkv.weight, attention.qkv.bias, norm=norm, backend=backend)
    return add_projection(block, x, attention.attend(*split_heads(attention, qkv, 3), mask), backend)


def add_attention_to_first(block: Any, x: Tensor, mask: Tensor | None, backend: str, count: int) -> Tensor:
    """The first ``count`` tokens of :func:`add_attention`: queries of those, keys and values of all."""
    attention, norm = block.attn, LayerNorm.of(block.norm1)
    if _FACTOR in block.__dict__:
        norm = _of_scaled(norm, block)
    first, width = x[:, :count], x.shape[2]
    weight, bias = attention.qkv.weight, attention.qkv.bias
    of_q, of_kv = (None, None) if bias is None else (bias[:width], bias[width:])
    q = ops.linear(first, weight[:width], of_q, norm=norm, backend=backend)
    kv = ops.linear(x, weight[width:], of_kv, norm=norm, backend=backend)
    heads = (*split_heads(attention, q), *split_heads(attention, kv, 2))
    return add_projection(block, first, attention.attend(*heads, mask_of_first(mask, count)), backend)


def split_heads(attention: Any, x: Tensor, count: int = 1) -> Sequence[Tensor]:
    """Tokens (B, N, count * H * D) as views (B, H, N, D), each made by one call."""
    heads, head_dim = attention.num_heads, attention.head_dim
    if is_dynamo_compiling() or torch.compiler._is_exporting_flag:  # which choose strides themselves
        return x.unflatten(2, (count, heads, head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
    (batch, tokens, _), (of_batch, of_token, of_channel) = x.shape, x.stride()
    sizes, strides = (batch, heads, tokens, head_dim), (of_batch, head_dim * of_channel, of_token, of_channel)
    first, step = x.storage_offset(), heads * head_dim * of_channel
    return [x.as_strided(sizes, strides, first + index * step) for index in range(count)]


def merge_heads(out: Tensor) -> Tensor:
    """What the heads gathered (B, H, N, D) as tokens (B, N, H * D), by one call where they lie so."""
    (batch, heads, tokens, head_dim), (of_batch, of_head, of_token, of_channel) = out.shape, out.stride()
    if is_dynamo_compiling() or torch.compiler._is_exporting_flag or of_head != head_dim * of_channel:
        return out.transpose(1, 2).flatten(2)
    return out.as_strided((batch, tokens, heads * head_dim), (of_batch, of_token, of_channel))


def mask_of_first(mask: Tensor | None, count: int) -> Tensor | None:
    """The part of an attention's mask that is for the first ``count`` queries."""
    return mask if mask is None or mask.dim() == 2 or mask.shape[-2] == 1 else mask[..., :count, :]


def add_projection(block: Any, x: Tensor, out: Tensor, backend: str) -> Tensor:
    """x + gamma_1 proj(out), of what the heads gathered, (B, H, N, D)."""
    proj = block.attn.proj
    scale = _inverse_of_factor(block, x) if _FACTOR in block.__dict__ else getattr(block, "gamma_1", None)
    return ops.linear(merge_heads(out), proj.weight, proj.bias, scale=scale, residual=x, backend=backend)


def add_mlp(block: Any, x: Tensor, backend: str) -> Tensor:
    """x + gamma_2 mlp(norm2(x))."""
    fc1, fc2, activation = block.mlp.fc1, block.mlp.fc2, activation_name(block.mlp.act)
    norm, scale = LayerNorm.of(block.norm2), getattr(block, "gamma_2", None)
    if _FACTOR in block.__dict__:
        norm, scale = _of_scaled(norm, block), _inverse_of_factor(block, x)
    around = {"norm": norm, "scale": scale, "residual": x}
    layers = fc1.weight, fc1.bias, fc2.weight, fc2.bias
    return ops.mlp(x, *layers, activation, **around, backend=backend)
