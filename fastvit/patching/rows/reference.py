"""Our own models' blocks. Each does its slow part in one method, and that method is all an override replaces."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastvit import ops
from fastvit.ops._operator import is_dynamo_compiling
from fastvit.patching.fusion import Fused, Row, are_plain, fused_backend, is_fused, parts_of, plain_class
from fastvit.patching.normalization import NormalizingConv2d
from fastvit.patching.replay import replayed
from fastvit.patching.rows.blocks import (
    BlockOverride,
    add_attention,
    add_attention_to_first,
    add_mlp,
    add_projection,
    adds_attention,
    adds_mlp,
    first_backend,
    mask_of_first,
    parts_of_attention,
    scales_positively,
    split_heads,
    whole_backend,
)
from fastvit.patching.rows.parts import activation_name, check_activation, project
from fastvit.reference.cait import TalkingHeadAttention
from fastvit.reference.ceit import LeFF, leff_arguments
from fastvit.reference.cpvt import SpatialReductionAttention
from fastvit.reference.cvt import ConvAttention, ConvProjection
from fastvit.reference.deepvit import ReAttention, ReAttentionBlock
from fastvit.reference.functional import LEFF_FORMS, BatchNorm, LayerNorm, Projection
from fastvit.reference.layers import Attention, Mlp, dropout_p
from fastvit.reference.overrides import is_plain
from fastvit.reference.pyramid import tokens_to_map

_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
"""At inference they are one."""


class ProjectingOverride(Fused):
    """The linear layers around an attention."""

    def linear(self, layer: nn.Module, x: Tensor) -> Tensor:
        backend = fused_backend(self)
        return plain_class(self).linear(self, layer, x) if backend is None else project(layer, x, backend)


class AttentionOverride(ProjectingOverride):
    """Attention without its N x N map."""

    fastvit_op = "masked_attention"
    fastvit_reads: ClassVar = {"attn_drop": nn.Dropout}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        backend = fused_backend(self)
        if backend is None:
            return plain_class(self).attend(self, q, k, v, mask)
        return ops.masked_attention(
            q, k, v, mask, scale=self.scale, dropout_p=dropout_p(self.attn_drop), backend=backend
        )


class ConvProjectionOverride(Fused):
    """CvT's depthwise convolution and BatchNorm on tokens as they lie."""

    fastvit_op = "conv_projection"
    fastvit_reads: ClassVar = {"conv": nn.Conv2d}

    def convolve(self, x: Tensor, grid: tuple[int, int], prefix_tokens: int) -> Tensor:
        backend = fused_backend(self)
        if backend is None:
            return plain_class(self).convolve(self, x, grid, prefix_tokens)
        return ops.token_depthwise_conv(
            x,
            self.conv.weight,
            grid=grid,
            stride=self.stride,
            prefix_tokens=prefix_tokens,
            norm=BatchNorm.of(self.bn),
            backend=backend,
        )


class ConvAttentionOverride(ProjectingOverride):
    """CvT's attention; its three projections read their tokens once where their convolutions are fused as well."""

    fastvit_op = "masked_attention"
    fastvit_reads: ClassVar = {"attn_drop": nn.Dropout}

    attend = AttentionOverride.attend

    def project(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        backend = fused_backend(self)
        if backend is None or not _are_projections(self, backend):
            return plain_class(self).project(self, x, grid)
        q, k, v = (_projection(self, name) for name in "qkv")
        return ops.conv_projection(x, q, k, v, grid=grid, prefix_tokens=self.prefix_tokens, backend=backend)


def _projection(attention: Any, name: str) -> Projection:
    part, linear = getattr(attention, f"conv_proj_{name}"), getattr(attention, f"proj_{name}")
    return Projection(part.conv.weight, BatchNorm.of(part.bn), linear.weight, linear.bias, part.stride)


def _are_projections(attention: Any, backend: str) -> bool:
    """Whether the parts of the projections do no more than their tensors tell, and are fused as the attention is."""
    modules = attention._modules
    for name in ("conv_proj_q", "conv_proj_k", "conv_proj_v"):
        part = modules.get(name)
        if not (is_fused(part, backend, ConvProjection) and is_plain(part._modules.get("conv"), nn.Conv2d)):
            return False
    return are_plain(attention, _PROJECTIONS)


_PROJECTIONS = parts_of({"proj_q": nn.Linear, "proj_k": nn.Linear, "proj_v": nn.Linear})


class LeFFOverride(Fused):
    """CeiT's feed-forward whole, or its BN, GELU, depthwise convolution, BN, GELU where its linears must be called."""

    fastvit_op = "leff"

    def transform(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        backend = fused_backend(self)
        if backend is None:
            return plain_class(self).transform(self, x, grid)
        settings = {"prefix_tokens": self.prefix_tokens, "form": self.form, "backend": backend}
        return ops.leff(x, **leff_arguments(self), grid=grid, **settings)

    def convolve(self, x: Tensor, grid: tuple[int, int], prefix_tokens: int) -> Tensor:
        backend = fused_backend(self)
        if backend is None or not is_plain(self.conv2, nn.Conv2d):
            return plain_class(self).convolve(self, x, grid, prefix_tokens)
        return ops.token_depthwise_conv(
            x,
            self.conv2.weight,
            self.conv2.bias,
            grid=grid,
            prefix_tokens=prefix_tokens,
            pre_norm=BatchNorm.of(self.bn1) if self.with_bn else None,
            pre_activation="gelu",
            norm=BatchNorm.of(self.bn2) if self.with_bn else None,
            activation="gelu",
            backend=backend,
        )


class ReAttentionOverride(ProjectingOverride):
    """DeepViT's attention with mixed and normalised maps."""

    fastvit_op = "head_mixed_attention"
    fastvit_reads: ClassVar = {"reatten_matrix": nn.Conv2d, "attn_drop": nn.Dropout}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        backend = fused_backend(self)
        if backend is None:
            return plain_class(self).attend(self, q, k, v, mask)
        return ops.re_attention(
            q,
            k,
            v,
            self.reatten_matrix.weight.flatten(1),
            self.reatten_matrix.bias,
            norm=BatchNorm.of(self.var_norm),
            output_scale=self.reatten_scale,
            mask=mask,
            scale=self.scale,
            dropout_p=dropout_p(self.attn_drop),
            backend=backend,
        )


class TalkingHeadOverride(ProjectingOverride):
    """CaiT's talking heads without their N x N maps."""

    fastvit_op = "head_mixed_attention"
    fastvit_reads: ClassVar = {"proj_l": nn.Linear, "proj_w": nn.Linear, "attn_drop": nn.Dropout}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        backend = fused_backend(self)
        if backend is None:
            return plain_class(self).attend(self, q, k, v, mask)
        return ops.talking_heads_attention(
            q,
            k,
            v,
            self.proj_l.weight,
            self.proj_l.bias,
            self.proj_w.weight,
            self.proj_w.bias,
            mask=mask,
            scale=self.scale,
            dropout_p=dropout_p(self.attn_drop),
            backend=backend,
        )


class ClassAttentionOverride(ProjectingOverride):
    """CaiT's class attention, which has no dropout."""

    fastvit_op = "class_attention"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        backend = fused_backend(self)
        if backend is None:
            return plain_class(self).attend(self, q, k, v, mask)
        return ops.class_attention(q, k, v, mask, scale=self.scale, backend=backend)


class LastQueryAttentionOverride(Fused):
    """CeiT's attention of the last class token to those of all layers."""

    fastvit_op = "class_attention"
    fastvit_reads: ClassVar = {"attn_drop": nn.Dropout}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        backend = fused_backend(self)
        if backend is None:
            return plain_class(self).attend(self, q, k, v, mask)
        return ops.class_attention(
            q, k, v, mask, scale=self.scale, dropout_p=dropout_p(self.attn_drop), backend=backend
        )


class ReferenceBlockOverride(BlockOverride):
    """A block of ViT, DeiT, DeepViT, CaiT or CPVT in four calls."""

    forward = BlockOverride.forward  # a row is judged by the methods that its own class replaces
    attentions = (Attention, ReAttention, TalkingHeadAttention)
    mlps = (Mlp,)

    def forward_first(self, x: Tensor, mask: Tensor | None = None, *, count: int) -> Tensor:
        out = replayed(self, _run_first, x, mask, count)
        return plain_class(self).forward_first(self, x, mask, count=count) if out is None else out


def _run_first(block: Any, x: Tensor, mask: Tensor | None, count: int) -> Tensor | None:
    backend = first_backend(block, x)
    if backend is None or not (adds_attention(block, backend) and adds_mlp(block, backend)):
        return None
    return add_mlp(block, add_attention_to_first(block, x, mask, backend, count), backend)


class ConvBlockOverride(Fused):
    """A block of CvT: the norm, the projections, and then as other blocks."""

    fastvit_op = "linear"
    fastvit_needs = ("attn", "mlp")
    attentions = (ConvAttention,)
    mlps = (Mlp,)

    def forward(self, x: Tensor, grid: tuple[int, int], mask: Tensor | None = None) -> Tensor:
        out = replayed(self, _run_conv_block, x, grid, mask)
        return plain_class(self).forward(self, x, grid, mask) if out is None else out

    def forward_first(self, x: Tensor, grid: tuple[int, int], mask: Tensor | None = None, *, count: int) -> Tensor:
        out = replayed(self, _run_first_of_conv_block, x, grid, mask, count)
        return plain_class(self).forward_first(self, x, grid, mask, count=count) if out is None else out


def _run_conv_block(block: Any, x: Tensor, grid: tuple[int, int], mask: Tensor | None) -> Tensor | None:
    backend = whole_backend(block, x)
    if backend is None or not (adds_attention(block, backend, _CONV_ATTENTION) and adds_mlp(block, backend)):
        return None
    attention = block.attn
    heads = (split_heads(attention, part)[0] for part in attention.project(block.norm1(x), grid))
    return add_mlp(block, add_projection(block, x, attention.attend(*heads, mask), backend), backend)


def _run_first_of_conv_block(
    block: Any, x: Tensor, grid: tuple[int, int], mask: Tensor | None, count: int
) -> Tensor | None:
    backend = first_backend(block, x)
    known = backend and adds_attention(block, backend, _CONV_ATTENTION) and adds_mlp(block, backend)
    if not (backend and known and _passes_first(block.attn, count, backend)):
        return None
    attention, first, normed = block.attn, x[:, :count], block.norm1(x)
    settings = {"grid": grid, "prefix_tokens": attention.prefix_tokens, "backend": backend}
    q = ops.linear(normed[:, :count], attention.proj_q.weight, attention.proj_q.bias, backend=backend)
    parts = (_projection(attention, name)._asdict() for name in "kv")
    k, v = (ops.depthwise_separable_conv(normed, **part, **settings) for part in parts)
    heads = (split_heads(attention, part)[0] for part in (q, k, v))
    out = attention.attend(*heads, mask_of_first(mask, count))
    return add_mlp(block, add_projection(block, first, out, backend), backend)


def _passes_first(attention: Any, count: int, backend: str) -> bool:
    """Whether the first tokens skip the convolution of the queries, and nobody waits for its other results."""
    norm = attention.conv_proj_q.bn
    skips = count <= attention.prefix_tokens and is_plain(norm, *_NORMS) and not norm.training
    return skips and _are_projections(attention, backend)


_CONV_ATTENTION = parts_of_attention("proj_q", "proj_k", "proj_v")


class LeFFBlockOverride(Fused):
    """A block of CeiT: its attention as in other blocks, then the LeFF."""

    fastvit_op = "linear"
    fastvit_needs = ("attn",)
    attentions = (Attention,)

    def forward(self, x: Tensor, grid: tuple[int, int], mask: Tensor | None = None) -> Tensor:
        out = replayed(self, _run_leff_block, x, grid, mask)
        if out is not None:
            return out
        backend = whole_backend(self, x)
        if backend is None or not adds_attention(self, backend):
            return plain_class(self).forward(self, x, grid, mask)
        x = add_attention(self, x, mask, backend)
        return x + self.leff(self.norm2(x), grid)

    def forward_first(self, x: Tensor, grid: tuple[int, int], mask: Tensor | None = None, *, count: int) -> Tensor:
        out = replayed(self, _run_first_of_leff_block, x, mask, count)
        return plain_class(self).forward_first(self, x, grid, mask, count=count) if out is None else out


def _run_leff_block(block: Any, x: Tensor, grid: tuple[int, int], mask: Tensor | None) -> Tensor | None:
    backend = whole_backend(block, x)
    if backend is None or not (adds_attention(block, backend) and _reads_leff(block, backend)):
        return None
    leff = block.leff
    x = add_attention(block, x, mask, backend)
    settings = {"grid": grid, "prefix_tokens": leff.prefix_tokens, "form": leff.form}
    around = {"norm": LayerNorm.of(block.norm2), "residual": x}
    return ops.leff(x, **leff_arguments(leff), **settings, **around, backend=backend)


def _run_first_of_leff_block(block: Any, x: Tensor, mask: Tensor | None, count: int) -> Tensor | None:
    backend = first_backend(block, x)
    if backend is None or not (adds_attention(block, backend) and _skips_leff(block, backend, count)):
        return None
    x = add_attention_to_first(block, x, mask, backend, count)
    return x + block.norm2(x) if block.leff.form == "official" else x


def _reads_leff(block: Any, backend: str) -> bool:
    """Whether the LeFF, and the norm in front of it, may be read."""
    leff = block.leff
    if not (are_plain(block, _NORM_2) and is_fused(leff, backend, LeFF) and are_plain(leff, _CONVOLUTIONS)):
        return False
    if len(block.norm2.normalized_shape) != 1:
        return False
    norms = (leff.bn1, leff.bn2, leff.bn3) if leff.with_bn else ()
    return all(is_plain(norm, *_NORMS) for norm in norms)


def _skips_leff(block: Any, backend: str, count: int) -> bool:
    """Whether the first tokens pass the LeFF by, and nobody waits for its parts."""
    leff = block.leff
    return (
        _reads_leff(block, backend)
        and not leff.training
        and not any(part.training for part in leff.children())
        and count <= leff.prefix_tokens
        and leff.form in LEFF_FORMS
    )


_NORM_2 = parts_of({"norm2": nn.LayerNorm})
_CONVOLUTIONS = parts_of({"conv1": nn.Conv2d, "conv2": nn.Conv2d, "conv3": nn.Conv2d})


class PyramidBlockOverride(Fused):
    """A block of PCPVT: its attention, by parts where it must be, then the MLP as in other blocks."""

    fastvit_op = "linear"
    fastvit_needs = ("mlp",)
    attentions = (SpatialReductionAttention,)
    mlps = (Mlp,)

    def forward(self, x: Tensor, grid: tuple[int, int], mask: Tensor | None = None) -> Tensor:
        out = replayed(self, _run_pyramid_block, x, grid, mask)
        if out is not None:
            return out
        backend = whole_backend(self, x)
        if backend is None or not adds_mlp(self, backend):
            return plain_class(self).forward(self, x, grid, mask)
        return add_mlp(self, x + self.attn(self.norm1(x), grid, mask), backend)


def _run_pyramid_block(block: Any, x: Tensor, grid: tuple[int, int], mask: Tensor | None) -> Tensor | None:
    backend = whole_backend(block, x)
    whole = backend and adds_mlp(block, backend) and adds_attention(block, backend, _REDUCED_ATTENTION)
    if not (backend and whole and _reduces(block.attn)):
        return None
    return add_mlp(block, _add_reduced_attention(block, x, grid, mask, backend), backend)


_REDUCED_ATTENTION = parts_of_attention("q", "kv")


def _reduces(attention: Any) -> bool:
    """Whether the norm behind the spatial reduction may be read."""
    return attention.sr_ratio == 1 or is_plain(attention._modules.get("norm"), nn.LayerNorm)


def _add_reduced_attention(block: Any, x: Tensor, grid: tuple[int, int], mask: Tensor | None, backend: str) -> Tensor:
    attention = block.attn
    normed = reduced = x
    norm_of_q: LayerNorm | None = LayerNorm.of(block.norm1)
    norm_of_kv = norm_of_q
    if attention.sr_ratio > 1:  # the convolution reads what the norm gives
        normed = block.norm1(x)
        reduced = _reduced(block, normed, grid, backend)
        norm_of_q, norm_of_kv = None, LayerNorm.of(attention.norm)
    q = ops.linear(normed, attention.q.weight, attention.q.bias, norm=norm_of_q, backend=backend)
    kv = ops.linear(reduced, attention.kv.weight, attention.kv.bias, norm=norm_of_kv, backend=backend)
    heads = (*split_heads(attention, q), *split_heads(attention, kv, 2))
    return add_projection(block, x, attention.attend(*heads, mask), backend)


def _reduced(block: Any, x: Tensor, grid: tuple[int, int], backend: str) -> Tensor:
    """The strided convolution of tokens."""
    conv, image = block.attn._modules.get("sr"), _as_map(x, grid)
    if not (is_plain(conv, nn.Conv2d) and _is_usual(conv, image)):
        return _as_tokens(block.attn.sr(image))
    around = {"stride": conv.stride, "padding": conv.padding}
    return _as_tokens(ops.conv_batch_norm(image, conv.weight, conv.bias, None, **around, backend=backend))


def _as_map(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens (B, h*w, C) as a map (B, C, h, w), by one call."""
    (batch, tokens, channels), (of_batch, of_token, of_channel) = x.shape, x.stride()
    # A graph has strides of its own; a wrong grid raises.
    if is_dynamo_compiling() or torch.compiler._is_exporting_flag or tokens != grid[0] * grid[1]:
        return tokens_to_map(x, grid)
    strides = (of_batch, of_channel, grid[1] * of_token, of_token)
    return x.as_strided((batch, channels, *grid), strides)


def _as_tokens(x: Tensor) -> Tensor:
    """A map (B, C, h, w) as tokens (B, h*w, C), by one call where it lies so."""
    (batch, channels, rows, columns), (of_batch, of_channel, of_row, of_column) = x.shape, x.stride()
    if is_dynamo_compiling() or torch.compiler._is_exporting_flag or of_row != columns * of_column:
        return x.flatten(2).transpose(1, 2)
    return x.as_strided((batch, rows * columns, channels), (of_batch, of_column, of_channel))


class EmbeddingOverride(Fused):
    """The convolution of a patch embedding as a product that gives tokens, at inference on the CPU."""

    fastvit_op = "conv_batch_norm"
    fastvit_reads: ClassVar = {"proj": (nn.Conv2d, NormalizingConv2d)}

    def project(self, x: Tensor) -> Tensor:
        conv, backend = self._modules.get("proj"), whole_backend(self, x)
        if backend is None or not _is_usual(conv, x):
            return plain_class(self).project(self, x)
        weight = conv.weight
        if type(conv) is NormalizingConv2d:
            x, weight = conv.centred(x), conv.normalization.scaled(weight)
        around = {"stride": conv.stride, "padding": conv.padding}
        return ops.conv_batch_norm(x, weight, conv.bias, None, **around, backend=backend)


def _is_usual(conv: Any, x: Tensor) -> bool:
    """Whether a convolution, which may have been exchanged since, is one that the operator has."""
    settings = conv.dilation, conv.groups, conv.padding_mode, conv.in_channels
    return x.dim() == 4 and settings == ((1, 1), 1, "zeros", x.shape[1]) and not isinstance(conv.padding, str)


class MlpOverride(Fused):
    """The MLP with its activation inside the first product."""

    fastvit_op = "mlp"
    fastvit_reads: ClassVar = {"fc1": nn.Linear, "fc2": nn.Linear, "drop": nn.Dropout}

    def forward(self, x: Tensor) -> Tensor:
        backend = fused_backend(self)
        activation = None if backend is None else activation_name(self.act)
        if backend is None or activation is None or dropout_p(self.drop) > 0.0:
            return plain_class(self).forward(self, x)
        layers = (self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
        return ops.mlp(x, *layers, activation, backend=backend)


class StemOverride(Fused):
    """A stem's convolutions with the norms folded in, at inference."""

    fastvit_op = "conv_batch_norm"

    def convolve(self, x: Tensor, conv: Any, norm: Any, activation: str | None = None) -> Tensor:
        backend = fused_backend(self)
        read = is_plain(conv, nn.Conv2d) and is_plain(norm, *_NORMS) and not norm.training
        if backend is None or not (read and _is_usual(conv, x)):
            return plain_class(self).convolve(self, x, conv, norm, activation)
        return ops.conv_batch_norm(
            x,
            conv.weight,
            conv.bias,
            BatchNorm.of(norm),
            stride=conv.stride,
            padding=conv.padding,
            activation=activation,
            backend=backend,
        )


class PatchStemOverride(StemOverride):
    """DeepViT's stem, which ends with the patch embedding."""

    convolve = StemOverride.convolve  # a row is judged by the methods that its own class replaces
    project = EmbeddingOverride.project
    fastvit_reads: ClassVar = EmbeddingOverride.fastvit_reads


class PEGOverride(Fused):
    """CPVT's position encoding generator on tokens as they lie."""

    fastvit_op = "token_depthwise_conv"
    fastvit_reads: ClassVar = {"proj": nn.Sequential, "proj.0": nn.Conv2d}

    def convolve(self, x: Tensor, grid: tuple[int, int], prefix_tokens: int) -> Tensor:
        backend = fused_backend(self)
        if backend is None:
            return plain_class(self).convolve(self, x, grid, prefix_tokens)
        conv = self.proj[0]
        return ops.token_depthwise_conv(
            x,
            conv.weight,
            conv.bias,
            grid=grid,
            prefix_tokens=prefix_tokens,
            residual=True,
            backend=backend,
        )


def _mixes_heads(module: nn.Module) -> bool:
    return bool(module.transform)


def _leaves_heads_alone(module: nn.Module) -> bool:
    return not module.transform


def _check_mlp(module: nn.Module) -> list[str]:
    return check_activation("act", module.act)


def _check_re_attention_block(module: nn.Module) -> list[str]:
    """Reasons where the steps that its forward takes are not its own, or change what the tensors alone tell."""
    plain = plain_class(module)
    names = [name for name in ("_add", "_scaled") if getattr(plain, name) is not getattr(ReAttentionBlock, name)]
    reasons = [f"{plain.__name__} overrides {name}" for name in names]
    if not scales_positively(module):
        reasons.append(f"scale_adjustment is {module.scale_adjustment}, expected is a positive number")
    return reasons


ROWS = (
    Row("fastvit.reference.layers.Block", ReferenceBlockOverride),
    Row("fastvit.reference.deepvit.ReAttentionBlock", ReferenceBlockOverride, _check_re_attention_block),
    Row("fastvit.reference.cait.LayerScaleBlock", ReferenceBlockOverride),
    Row("fastvit.reference.cvt.Block", ConvBlockOverride),
    Row("fastvit.reference.ceit.Block", LeFFBlockOverride),
    Row("fastvit.reference.cpvt.PyramidBlock", PyramidBlockOverride),
    Row("fastvit.reference.layers.PatchEmbed", EmbeddingOverride),
    Row("fastvit.reference.cvt.ConvEmbed", EmbeddingOverride),
    Row("fastvit.reference.deepvit.CNNStem", PatchStemOverride),
    Row("fastvit.reference.ceit.ImageToTokens", EmbeddingOverride),
    Row("fastvit.reference.layers.Attention", AttentionOverride),
    Row("fastvit.reference.layers.Mlp", MlpOverride, _check_mlp),
    Row("fastvit.reference.deepvit.ReAttention", ReAttentionOverride, applies=_mixes_heads),
    Row("fastvit.reference.deepvit.ReAttention", AttentionOverride, applies=_leaves_heads_alone),
    Row("fastvit.reference.cait.TalkingHeadAttention", TalkingHeadOverride),
    Row("fastvit.reference.cait.ClassAttention", ClassAttentionOverride),
    Row("fastvit.reference.cpvt.SpatialReductionAttention", AttentionOverride),
    Row("fastvit.reference.cpvt.PEG", PEGOverride),
    Row("fastvit.reference.cvt.ConvAttention", ConvAttentionOverride),
    Row("fastvit.reference.cvt.ConvProjection", ConvProjectionOverride),
    Row("fastvit.reference.ceit.LastQueryAttention", LastQueryAttentionOverride),
    Row("fastvit.reference.ceit.Stem", StemOverride),
    Row("fastvit.reference.ceit.LeFF", LeFFOverride),
)
