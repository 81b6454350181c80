"""lucidrains' vit-pytorch: attention of ViT, SimpleViT, DistillableViT, DeepViT, CaiT, CvT; MLPs; convolutions.

Its CvT and Twins keep maps (B, C, H, W) where the operators take tokens. A fused convolution brings its map into the
order of tokens once; in CvT the tokens then stay as they lie, in maps that are views of them, up to the attention.
vit-pytorch itself is never imported.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastvit import ops
from fastvit.patching.fusion import Fused, Row, are_plain, fused_backend, is_fused, names_used, parts_of, plain_class
from fastvit.patching.replay import replayed
from fastvit.patching.rows.blocks import whole_backend
from fastvit.patching.rows.ends import Head, count_read, methods_of
from fastvit.patching.rows.halves import Heads, add_attention, add_mlp, layer_of
from fastvit.patching.rows.mlps import in_sequence, project_in_sequence
from fastvit.patching.rows.parts import (
    check_attributes,
    check_depthwise,
    check_linear,
    check_parameters,
    dropout_p,
    is_plain_of,
    is_rearrangement,
    project,
)
from fastvit.reference.functional import BatchNorm, LayerNorm, Projection
from fastvit.reference.overrides import is_plain, obstacles


def _in_heads(tokens: Tensor, heads: int) -> Tensor:
    return tokens.unflatten(2, (heads, -1)).transpose(1, 2)


def _projected(module: nn.Module, out: Tensor, backend: str) -> Tensor:
    """Through ``to_out``: nothing, a linear, or a linear and a dropout."""
    return project_in_sequence(module.to_out, out.transpose(1, 2).flatten(2), backend)


def _packed_heads(module: nn.Module, x: Tensor, backend: str) -> Iterator[Tensor]:
    """Queries, keys and values (B, H, N, D) behind the norm."""
    packed = project(module.to_qkv, module.norm(x), backend)
    return (_in_heads(part, module.heads) for part in packed.chunk(3, dim=-1))


def _packed_attention(module: nn.Module, x: Tensor, drop: float, backend: str) -> Tensor:
    """The forward of ViT's and SimpleViT's attention."""
    q, k, v = _packed_heads(module, x, backend)
    return _projected(module, _attend(module, q, k, v, backend, drop), backend)


def _attend(module: Any, q: Tensor, k: Tensor, v: Tensor, backend: str, drop: float = 0.0) -> Tensor:
    return ops.masked_attention(q, k, v, scale=module.scale, dropout_p=drop, backend=backend)


class AttentionOverride(Fused):
    """ViT's attention, which DistillableViT shares."""

    fastvit_op = "masked_attention"
    fastvit_reads: ClassVar = {"attend": nn.Softmax, "dropout": nn.Dropout}

    def forward(self, x: Tensor) -> Tensor:
        backend = fused_backend(self)
        if backend is None:
            return plain_class(self).forward(self, x)
        return _packed_attention(self, x, dropout_p(self.dropout), backend)


class SimpleAttentionOverride(Fused):
    """SimpleViT's attention, which has no dropout."""

    fastvit_op = "masked_attention"
    fastvit_reads: ClassVar = {"attend": nn.Softmax}

    def forward(self, x: Tensor) -> Tensor:
        backend = fused_backend(self)
        if backend is None:
            return plain_class(self).forward(self, x)
        return _packed_attention(self, x, 0.0, backend)


class TalkingHeadOverride(Fused):
    """CaiT's attention: talking heads without bias, dropout before the second mix, in the class stage too."""

    fastvit_op = "head_mixed_attention"
    fastvit_reads: ClassVar = {"attend": nn.Softmax, "dropout": nn.Dropout}

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        backend = fused_backend(self)
        if backend is None:
            return plain_class(self).forward(self, x, context)
        x = self.norm(x)
        context = x if context is None else torch.cat((x, context), dim=1)
        k, v = project(self.to_kv, context, backend).chunk(2, dim=-1)
        out = ops.head_mixed_attention(
            _in_heads(project(self.to_q, x, backend), self.heads),
            _in_heads(k, self.heads),
            _in_heads(v, self.heads),
            pre_weight=self.mix_heads_pre_attn.t(),  # column g makes head g
            post_weight=self.mix_heads_post_attn.t(),
            scale=self.scale,
            dropout_p=dropout_p(self.dropout),
            backend=backend,
        )
        return _projected(self, out, backend)


class FeedForwardOverride(Fused):
    """The norm, and the MLP behind it with its activation inside the first product."""

    fastvit_op = "mlp"

    def forward(self, x: Tensor) -> Tensor:
        backend = fused_backend(self)
        layers = None if backend is None else in_sequence(self.net, 1)
        if backend is None or layers is None or not layers.fusible():
            return plain_class(self).forward(self, x)
        return layers.run(self.net[0](x), backend)


class TransformerOverride(Fused):
    """The blocks of ViT, SimpleViT, DistillableViT and DeepViT, each at inference on the CPU in four calls."""

    fastvit_op = "linear"

    def forward(self, x: Tensor) -> Tensor:
        count = count_read(self, _head)
        out = replayed(self, _run_whole, x, count)
        if out is not None:
            return out
        backend = whole_backend(self, x)
        if backend is None or x.dim() != 3:
            return plain_class(self).forward(self, x)
        for place, (attention, feed_forward) in enumerate(self.layers, 1 - len(self.layers)):
            read = _is_read_mlp(feed_forward, backend)
            first = count if place == 0 and read else None
            whole = _is_read(attention, backend)
            x = _add_attention(attention, x, backend, first) if whole else attention(x) + x
            x = _add_mlp(feed_forward, x, backend) if read else feed_forward(x) + x
        return self.norm(x) if "norm" in self._modules else x


def _run_whole(transformer: Any, x: Tensor, count: int | None) -> Tensor | None:
    """Where every part of every block is read."""
    backend, norm = whole_backend(transformer, x), transformer._modules.get("norm")
    if backend is None or x.dim() != 3 or not is_plain(norm, nn.LayerNorm, type(None)):
        return None
    if not all(_is_read(first, backend) and _is_read_mlp(second, backend) for first, second in transformer.layers):
        return None
    for place, (attention, feed_forward) in enumerate(transformer.layers, 1 - len(transformer.layers)):
        x = _add_attention(attention, x, backend, count if place == 0 else None)
        x = _add_mlp(feed_forward, x, backend)
    return x if norm is None else norm(x)


def _reads_class_token(model: Any, block: nn.Module) -> int | None:
    """1 where nobody but the head sees what the transformer gives."""
    norm, transformer = block._modules.get("norm"), model._modules.get("transformer")
    reads = model.pool == "cls" and model._modules.get("mlp_head") is not None
    last = (
        transformer is block
        and is_fused(block, getattr(block, "fastvit_backend", ""))
        and is_plain(norm, nn.LayerNorm, type(None))
    )
    return 1 if reads and last else None


def _head(model: nn.Module) -> Head | None:
    plain = plain_class(model)
    if (plain.__module__, plain.__name__) != ("vit_pytorch.vit", "ViT"):
        return None
    methods = methods_of(plain, ("forward",), _MODEL_NAMES)
    return None if methods is None else Head(methods, frozenset(), None, _reads_class_token)


def _is_read(attention: Any, backend: str) -> bool:
    """Whether an attention, its norm and its projections do nothing more at inference than their tensors tell."""
    return (
        isinstance(attention, (AttentionOverride, SimpleAttentionOverride, ReAttentionOverride))
        and is_fused(attention, backend)
        and are_plain(attention, attention.fastvit_parts)
        and are_plain(attention, _NORM_AND_QKV)
        and len(attention.norm.normalized_shape) == 1
        and _layers_behind(attention._modules.get("to_out")) is not None
        and not attention.training
        and not ("dropout" in attention._modules and dropout_p(attention.dropout) > 0.0)
        and not (isinstance(attention, ReAttentionOverride) and _check_head_norm(attention))
    )


_NORM_AND_QKV = parts_of({"norm": nn.LayerNorm, "to_qkv": nn.Linear})


def _layers_behind(out: Any) -> list[nn.Linear] | None:
    """The linear layer behind an attention, if there is one; None where more than that is to be called."""
    if is_plain(out, nn.Sequential) and len(out) == 2 and is_plain(out[1], nn.Dropout) and dropout_p(out[1]) == 0.0:
        out = out[0]
    if is_plain(out, nn.Linear):
        return [out]
    return [] if is_plain(out, nn.Identity) else None


def _add_attention(attention: Any, x: Tensor, backend: str, count: int | None = None) -> Tensor:
    behind, mixes = _layers_behind(attention.to_out), isinstance(attention, ReAttentionOverride)
    heads = Heads(attention.heads, attention.to_qkv.out_features // (3 * attention.heads))
    attend = functools.partial(_re_attend if mixes else _attend, attention, backend=backend)
    out = layer_of(behind[0]) if behind else None
    return add_attention(x, attention.norm, [layer_of(attention.to_qkv)], heads, attend, out, backend, count=count)


def _is_read_mlp(feed_forward: Any, backend: str) -> bool:
    """The same of the norm and the MLP behind it."""
    if not (isinstance(feed_forward, FeedForwardOverride) and is_fused(feed_forward, backend)):
        return False
    layers = in_sequence(feed_forward._modules.get("net"), 1)
    return (
        layers is not None
        and layers.fusible()
        and is_plain(feed_forward.net[0], nn.LayerNorm)
        and len(feed_forward.net[0].normalized_shape) == 1
    )


def _add_mlp(feed_forward: Any, x: Tensor, backend: str) -> Tensor:
    layers = in_sequence(feed_forward.net, 1)
    assert layers is not None
    return add_mlp(x, feed_forward.net[0], (layers.fc1, layers.named_activation(), layers.fc2), backend)


def _check_transformer(module: nn.Module) -> list[str]:
    found = check_attributes(module, "layers") + check_parameters(module, "x")
    if found:
        return found
    # With the norms inside its attention and MLP, which older versions wrap, the residual is the transformer's.
    known = all(
        len(pair) == 2 and hasattr(pair[0], "norm") and hasattr(pair[0], "to_qkv") and hasattr(pair[1], "net")
        for pair in module.layers
    )
    return [] if known else ["its layers are not pairs of an attention and a feed-forward with norms of their own"]


def check_feed_forward(module: nn.Module) -> list[str]:
    """Reasons why a module is not vit-pytorch's norm and MLP in a Sequential."""
    layers = in_sequence(module.net, 1)
    if layers is None:
        return ["net is not a plain nn.Sequential of norm, linear, activation and linear, dropouts behind the linears"]
    return layers.reasons("the first linear", "the activation", "the second linear")


class ConvProjectionOverride(Fused):
    """CvT's depthwise convolution and BatchNorm on tokens; the 1x1 convolution behind them gets a view as its map."""

    fastvit_op = "conv_projection"
    fastvit_reads: ClassVar = {"net": nn.Sequential, "net.0": nn.Conv2d, "net.1": nn.BatchNorm2d}

    def forward(self, x: Tensor) -> Tensor:
        backend = fused_backend(self)
        if backend is None:
            return plain_class(self).forward(self, x)
        conv, norm = self.net[0], self.net[1]
        grid = tuple(x.shape[2:])
        tokens = ops.token_depthwise_conv(
            x.flatten(2).transpose(1, 2),
            conv.weight,
            conv.bias,
            grid=grid,
            stride=conv.stride[0],
            padding=conv.padding[0],
            norm=BatchNorm.of(norm),
            backend=backend,
        )
        height = (grid[0] + 2 * conv.padding[0] - conv.kernel_size[0]) // conv.stride[0] + 1
        return self.net[2](tokens.transpose(1, 2).unflatten(2, (height, -1)))


class PEGOverride(Fused):
    """Twins' position encoding generator: convolution and residual in one, the map left in the order it came in."""

    fastvit_op = "token_depthwise_conv"

    def forward(self, x: Tensor) -> Tensor:
        backend = fused_backend(self)
        if backend is None or not _adds_plainly(self.proj):
            return plain_class(self).forward(self, x)
        conv = self.proj.fn
        tokens = ops.token_depthwise_conv(
            x.flatten(2).transpose(1, 2),
            conv.weight,
            conv.bias,
            grid=tuple(x.shape[2:]),
            padding=conv.padding[0],
            residual=True,
            backend=backend,
        )
        out = tokens.transpose(1, 2).unflatten(2, x.shape[2:])
        return out.contiguous() if x.is_contiguous() else out


def _adds_plainly(residual: nn.Module) -> bool:
    return is_plain_of(residual, "vit_pytorch") and is_plain(residual._modules.get("fn"), nn.Conv2d)


class ConvAttentionOverride(Fused):
    """CvT's attention behind its projections; where they are fused as well, q, k and v are views of their tokens."""

    fastvit_op = "masked_attention"
    fastvit_reads: ClassVar = {"attend": nn.Softmax, "dropout": nn.Dropout}

    def forward(self, x: Tensor) -> Tensor:
        backend = fused_backend(self)
        if backend is None:
            return plain_class(self).forward(self, x)
        height, width = x.shape[2:]
        q, k, v = (_in_heads(tokens, self.heads) for tokens in _conv_projections(self, self.norm(x), backend))
        out = ops.masked_attention(q, k, v, scale=self.scale, dropout_p=dropout_p(self.dropout), backend=backend)
        return self.to_out(out.transpose(2, 3).reshape(x.shape[0], -1, height, width))


def _conv_projections(module: Any, x: Tensor, backend: str) -> tuple[Tensor, ...]:
    """Queries, keys and values (B, N, C) of a map, from one reading of it where no part in between is to be called.

    Keys and values share a convolution, whose norm would count a batch of training twice.
    """
    parts = (module.to_q, module.to_kv)
    if any(not _is_projection(part, backend) or part.net[1].training for part in parts):
        maps = (module.to_q(x), *module.to_kv(x).chunk(2, dim=1))
        return tuple(_with_adjacent_channels(part.flatten(2).transpose(1, 2)) for part in maps)
    (query,), (key, value) = _as_projections(module.to_q, 1), _as_projections(module.to_kv, 2)
    tokens, grid = x.flatten(2).transpose(1, 2), (x.shape[2], x.shape[3])
    return ops.conv_projection(tokens, query, key, value, grid=grid, backend=backend)


_PROJECTION = parts_of({**ConvProjectionOverride.fastvit_reads, "net.2": nn.Conv2d})


def _is_projection(part: Any, backend: str) -> bool:
    """Whether a projection does no more than its tensors tell, and is fused as the attention is."""
    if not (isinstance(part, ConvProjectionOverride) and is_fused(part, backend) and are_plain(part, _PROJECTION)):
        return False
    pointwise = part.net[2]
    return (pointwise.kernel_size, pointwise.padding, pointwise.groups) == ((1, 1), (0, 0), 1)


def _as_projections(part: Any, count: int) -> list[Projection]:
    """A projection whose 1x1 convolution gives so many tensors one behind the other, one by one."""
    conv, norm, pointwise = part.net
    weights = pointwise.weight.flatten(1).chunk(count)
    biases = [None] * count if pointwise.bias is None else pointwise.bias.chunk(count)
    shared = (conv.stride[0], conv.padding[0], conv.bias)
    return [
        Projection(conv.weight, BatchNorm.of(norm), weight, bias, *shared)
        for weight, bias in zip(weights, biases, strict=True)
    ]


def _with_adjacent_channels(tokens: Tensor) -> Tensor:
    return tokens if tokens.stride(2) == 1 else tokens.contiguous()


class ReAttentionOverride(Fused):
    """DeepViT's re-attention: a mix without bias, and a LayerNorm over heads between two rearrangements."""

    fastvit_op = "head_mixed_attention"
    fastvit_reads: ClassVar = {"dropout": nn.Dropout, "reattn_norm": nn.Sequential, "reattn_norm.1": nn.LayerNorm}

    def forward(self, x: Tensor) -> Tensor:
        backend = fused_backend(self)
        if backend is None or _check_head_norm(self):
            return plain_class(self).forward(self, x)
        q, k, v = _packed_heads(self, x, backend)
        return _projected(self, _re_attend(self, q, k, v, backend), backend)


def _re_attend(module: Any, q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    return ops.re_attention(
        q,
        k,
        v,
        module.reattn_weights.t(),  # column g makes head g
        None,
        LayerNorm.of(module.reattn_norm[1]),
        scale=module.scale,
        dropout_p=dropout_p(module.dropout),
        backend=backend,
    )


def _check_head_norm(module: nn.Module) -> list[str]:
    parts = list(module.reattn_norm)
    if len(parts) != 3 or obstacles(parts[1], nn.LayerNorm) or parts[1].normalized_shape != (module.heads,):
        return ["reattn_norm is not a plain nn.LayerNorm over heads between two rearrangements"]
    return [
        f"reattn_norm.{at} is not the rearrangement to and from heads last, without hooks"
        for at, pattern in ((0, "b h i j -> b i j h"), (2, "b i j h -> b h i j"))
        if not is_rearrangement(parts[at]) or getattr(parts[at], "pattern", None) != pattern
    ]


def _check_attention(module: nn.Module) -> list[str]:
    found = check_attributes(module, "heads", "scale", "norm", "to_qkv", "to_out") + check_parameters(module, "x")
    return found or _check_softmax(module) + _check_heads(module, "to_qkv", 3)


def _check_heads(module: nn.Module, name: str, parts: int) -> list[str]:
    """The scale tells the head dimension, which is no attribute of its own."""
    return check_linear(module, name, parts * module.heads * round(module.scale**-2))


def _check_softmax(module: nn.Module) -> list[str]:
    dim = module.attend.dim
    return [] if dim == -1 else [f"attend is a softmax over axis {dim}, expected -1"]


def _check_talking_heads(module: nn.Module) -> list[str]:
    found = check_attributes(module, "heads", "scale", "norm", "to_q", "to_kv", "to_out")
    found += check_parameters(module, "x", "context")
    if found:
        return found
    square = (module.heads, module.heads)
    for name in ("mix_heads_pre_attn", "mix_heads_post_attn"):
        weight = getattr(module, name, None)
        if not isinstance(weight, Tensor) or weight.shape != square:
            found.append(f"{name} does not map heads to heads")
    return found + _check_softmax(module) + _check_heads(module, "to_q", 1) + _check_heads(module, "to_kv", 2)


def _check_conv_attention(module: nn.Module) -> list[str]:
    found = check_attributes(module, "heads", "scale", "norm", "to_q", "to_kv", "to_out")
    return (found + check_parameters(module, "x")) or _check_softmax(module)


def _check_conv_projection(module: nn.Module) -> list[str]:
    if len(module.net) != 3:
        return [f"net has {len(module.net)} parts, expected are convolution, BatchNorm and 1x1 convolution"]
    return check_parameters(module, "x") + check_depthwise("net.0", module.net[0], module.net[1])


def _check_peg(module: nn.Module) -> list[str]:
    found = check_attributes(module, "proj") or check_attributes(module.proj, "fn")
    found = found or check_parameters(module, "x") + check_parameters(module.proj, "x", "kwargs")
    found = found or check_depthwise("proj.fn", module.proj.fn)
    if found:
        return found
    conv = module.proj.fn
    unknown = sorted(names_used(type(module.proj).forward.__code__) - {"fn"})
    if unknown:
        found.append(f"forward of proj uses {', '.join(unknown)}, which is not known")
    if conv.stride != (1, 1) or conv.padding[0] != conv.kernel_size[0] // 2:
        found.append("proj.fn does not keep the size of the map")
    return found if found or _adds_plainly(module.proj) else ["proj has forward hooks, which would not be called"]


def check_re_attention(module: nn.Module) -> list[str]:
    """Reasons why a module is not vit-pytorch's re-attention."""
    found = check_attributes(module, "heads", "scale", "norm", "to_qkv", "to_out") + check_parameters(module, "x")
    if found:
        return found
    weight = getattr(module, "reattn_weights", None)
    if not isinstance(weight, Tensor) or weight.shape != (module.heads, module.heads):
        found.append("reattn_weights does not map heads to heads")
    return found + _check_head_norm(module) + _check_heads(module, "to_qkv", 3)


# Every global and attribute name that the forwards of the versions read (up to vit-pytorch 1.26) use.
_COMMON_NAMES = frozenset(
    {"norm", "chunk", "map", "rearrange", "heads", "torch", "matmul", "transpose", "scale", "attend", "to_out"}
)
_ATTENTION_NAMES = _COMMON_NAMES | {"to_qkv", "dropout"}
_TALKING_HEAD_NAMES = _COMMON_NAMES | {
    "shape",
    "exists",
    "cat",
    "to_q",
    "to_kv",
    "einsum",
    "dropout",
    "mix_heads_pre_attn",
    "mix_heads_post_attn",
}
_FREE_NAMES = frozenset({"shape", "chunk", "map", "rearrange", "einsum"})
RE_ATTENTION_NAMES = frozenset(
    {"norm", "to_qkv", "heads", "scale", "softmax", "dropout", "reattn_weights", "reattn_norm", "to_out"}
)
_CONV_ATTENTION_NAMES = _COMMON_NAMES | {"shape", "to_q", "to_kv", "einsum", "dropout"}

_MODEL_NAMES = frozenset(
    "cat cls_token dropout mean mlp_head pool pos_embedding repeat shape to_latent to_patch_embedding torch "
    "transformer".split()
)

ROWS = (
    Row("vit_pytorch.vit.Attention", AttentionOverride, _check_attention, _ATTENTION_NAMES),
    Row("vit_pytorch.simple_vit.Attention", SimpleAttentionOverride, _check_attention, _COMMON_NAMES | {"to_qkv"}),
    Row("vit_pytorch.cait.Attention", TalkingHeadOverride, _check_talking_heads, _TALKING_HEAD_NAMES),
    Row("vit_pytorch.cvt.Attention", ConvAttentionOverride, _check_conv_attention, _CONV_ATTENTION_NAMES),
    Row("vit_pytorch.cvt.DepthWiseConv2d", ConvProjectionOverride, _check_conv_projection, frozenset({"net"})),
    Row("vit_pytorch.twins_svt.PEG", PEGOverride, _check_peg, frozenset({"proj"})),
    *(
        Row(f"vit_pytorch.{name}.FeedForward", FeedForwardOverride, check_feed_forward, frozenset({"net"}))
        for name in ("vit", "simple_vit", "deepvit")
    ),
    *(
        Row(f"vit_pytorch.{name}.Transformer", TransformerOverride, _check_transformer, frozenset({"layers", "norm"}))
        for name in ("vit", "simple_vit", "deepvit")
    ),
    Row("vit_pytorch.deepvit.Attention", ReAttentionOverride, check_re_attention, RE_ATTENTION_NAMES | _FREE_NAMES),
)
