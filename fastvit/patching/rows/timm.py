"""timm's blocks: attention of ViT and DeiT, with relative positions, of BEiT, CaiT and Twins; PEG; MLPs.

timm itself is never imported here: its classes are known by where they are defined. The fused forwards call the
sub-modules (``self.qkv(x)``), so that adapters and quantised layers in their places keep working.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit import ops
from fastvit.patching.fusion import Fused, Row, are_plain, fused_backend, is_fused, parts_of, plain_class
from fastvit.patching.replay import replayed
from fastvit.patching.rows.blocks import whole_backend
from fastvit.patching.rows.ends import Head, count_read, methods_of
from fastvit.patching.rows.halves import Heads, add_attention, add_mlp, layer_of
from fastvit.patching.rows.parts import (
    activation_name,
    backend_of_linears,
    check_activation,
    check_attributes,
    check_depthwise,
    check_linear,
    check_scale,
    dropout_p,
    is_plain_of,
    project,
)
from fastvit.reference.overrides import is_plain


def _as_mask_and_bias(attn_mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """timm's ``attn_mask`` as (bool mask, additive bias), with four axes so that (N, N) is not read as key padding."""
    if attn_mask is None:
        return None, None
    attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
    return (attn_mask, None) if attn_mask.dtype == torch.bool else (None, attn_mask)


class AttentionOverride(Fused):
    """timm's ``Attention`` with its softmax(q k^T) v fused; ``is_causal`` takes timm's own path."""

    fastvit_op = "masked_attention"
    fastvit_reads: ClassVar = {"attn_drop": nn.Dropout}

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        backend = fused_backend(self)
        if backend is None or is_causal:
            return plain_class(self).forward(self, x, *_given(attn_mask, is_causal))
        batch, tokens, _ = x.shape
        qkv = (
            project(self.qkv, x, backend)
            .reshape(batch, tokens, 3, self.num_heads, self.head_dim)
            .permute(2, 0, 3, 1, 4)
        )
        q, k, v = qkv.unbind(0)
        mask, bias = _as_mask_and_bias(attn_mask)
        out = ops.masked_attention(
            self.q_norm(q),
            self.k_norm(k),
            v,
            mask,
            bias,
            scale=self.scale,
            dropout_p=dropout_p(self.attn_drop),
            backend=backend,
        )
        out = out.transpose(1, 2).reshape(batch, tokens, self.num_heads * self.head_dim)
        out = self.norm(out) if hasattr(self, "norm") else out
        gate = getattr(self, "gate", None)
        out = out if gate is None else out * gate(x).sigmoid()
        return self.proj_drop(project(self.proj, out, backend))


def _given(attn_mask: Tensor | None, is_causal: bool) -> tuple:
    """The optional arguments that were given: older forwards do not take the later ones."""
    return (attn_mask, is_causal) if is_causal is not False else (attn_mask,) if attn_mask is not None else ()


class TalkingHeadOverride(Fused):
    """timm's CaiT ``TalkingHeadAttn`` without its N x N maps."""

    fastvit_op = "head_mixed_attention"
    fastvit_reads: ClassVar = {"attn_drop": nn.Dropout, "proj_l": nn.Linear, "proj_w": nn.Linear}

    def forward(self, x: Tensor) -> Tensor:
        backend = fused_backend(self)
        if backend is None:
            return plain_class(self).forward(self, x)
        batch, tokens, dim = x.shape
        qkv = (
            project(self.qkv, x, backend)
            .reshape(batch, tokens, 3, self.num_heads, dim // self.num_heads)
            .permute(2, 0, 3, 1, 4)
        )
        q, k, v = qkv.unbind(0)
        out = ops.talking_heads_attention(
            q,
            k,
            v,
            self.proj_l.weight,
            self.proj_l.bias,
            self.proj_w.weight,
            self.proj_w.bias,
            scale=self.scale,
            dropout_p=dropout_p(self.attn_drop),
            backend=backend,
        )
        out = out.transpose(1, 2).reshape(batch, tokens, dim)
        return self.proj_drop(project(self.proj, out, backend))


class ClassAttentionOverride(Fused):
    """timm's CaiT ``ClassAttn``: the class token attends to all tokens."""

    fastvit_op = "class_attention"
    fastvit_reads: ClassVar = {"attn_drop": nn.Dropout}

    def forward(self, x: Tensor) -> Tensor:
        backend = fused_backend(self)
        if backend is None:
            return plain_class(self).forward(self, x)
        batch, tokens, dim = x.shape
        heads = self.num_heads
        q = self.q(x[:, 0]).reshape(batch, heads, 1, dim // heads)
        k, v = (
            project(layer, x, backend).reshape(batch, tokens, heads, dim // heads).transpose(1, 2)
            for layer in (self.k, self.v)
        )
        out = ops.class_attention(q, k, v, scale=self.scale, dropout_p=dropout_p(self.attn_drop), backend=backend)
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(batch, 1, dim)))


class BeitAttentionOverride(Fused):
    """timm's BEiT ``Attention``: a bias over query and key positions, of its own or shared between the blocks."""

    fastvit_op = "masked_attention"
    fastvit_reads: ClassVar = {"attn_drop": nn.Dropout, "qkv": nn.Linear}

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        backend = fused_backend(self)
        if backend is None:
            return plain_class(self).forward(self, x, shared_rel_pos_bias)
        batch, tokens, _ = x.shape
        qkv_bias = None if self.q_bias is None else torch.cat((self.q_bias, self.k_bias, self.v_bias))
        qkv = ops.linear(x, self.qkv.weight, qkv_bias, backend=backend_of_linears(backend))
        q, k, v = qkv.reshape(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        bias = None if self.relative_position_bias_table is None else self._get_rel_pos_bias()
        if shared_rel_pos_bias is not None:
            bias = shared_rel_pos_bias if bias is None else bias + shared_rel_pos_bias
        out = ops.masked_attention(
            q,
            k,
            v,
            bias=bias,
            scale=self.scale,
            dropout_p=dropout_p(self.attn_drop),
            backend=backend,
        )
        return self.proj_drop(project(self.proj, out.transpose(1, 2).flatten(2), backend))


class RelPosAttentionOverride(Fused):
    """timm's ``RelPosAttention``: a bias of relative positions, of its own or shared between the blocks."""

    fastvit_op = "masked_attention"
    fastvit_reads: ClassVar = {"attn_drop": nn.Dropout}

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        backend = fused_backend(self)
        if backend is None or not (self.rel_pos is None or is_plain_of(self.rel_pos, "timm")):
            return plain_class(self).forward(self, x, shared_rel_pos)
        qkv = project(self.qkv, x, backend).unflatten(2, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out = ops.masked_attention(
            self.q_norm(q),
            self.k_norm(k),
            v,
            bias=shared_rel_pos if self.rel_pos is None else self.rel_pos.get_bias(),
            scale=self.scale,
            dropout_p=dropout_p(self.attn_drop),
            backend=backend,
        )
        return self.proj_drop(project(self.proj, out.transpose(1, 2).flatten(2), backend))


class GlobalAttentionOverride(Fused):
    """timm's Twins ``GlobalSubSampleAttn``: keys and values from a coarser map."""

    fastvit_op = "masked_attention"
    fastvit_reads: ClassVar = {"attn_drop": nn.Dropout}

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        backend = fused_backend(self)
        if backend is None:
            return plain_class(self).forward(self, x, size)
        batch, tokens, dim = x.shape
        heads = (self.num_heads, dim // self.num_heads)
        q = project(self.q, x, backend).unflatten(2, heads).transpose(1, 2)
        if self.sr is not None:
            coarse = self.sr(x.transpose(1, 2).reshape(batch, dim, *size))
            x = self.norm(coarse.flatten(2).transpose(1, 2))
        kv = project(self.kv, x, backend).unflatten(2, (2, *heads))
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
        out = ops.masked_attention(q, k, v, scale=self.scale, dropout_p=dropout_p(self.attn_drop), backend=backend)
        out = out.transpose(1, 2).reshape(batch, tokens, dim)
        return self.proj_drop(project(self.proj, out, backend))


class LocalAttentionOverride(Fused):
    """timm's Twins ``LocallyGroupedAttn``: attention within windows, the map padded with zeros to whole ones."""

    fastvit_op = "masked_attention"
    fastvit_reads: ClassVar = {"attn_drop": nn.Dropout}

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        backend = fused_backend(self)
        if backend is None:
            return plain_class(self).forward(self, x, size)
        (batch, tokens, dim), (height, width), window = x.shape, size, self.ws
        image = F.pad(x.view(batch, height, width, dim), (0, 0, 0, -width % window, 0, -height % window))
        rows, columns = image.shape[1] // window, image.shape[2] // window
        image = image.reshape(batch, rows, window, columns, window, dim).transpose(2, 3)
        qkv = project(self.qkv, image.reshape(-1, window * window, dim), backend)
        qkv = qkv.unflatten(2, (3, self.num_heads, dim // self.num_heads)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        out = ops.masked_attention(q, k, v, scale=self.scale, dropout_p=dropout_p(self.attn_drop), backend=backend)
        out = out.transpose(1, 2).reshape(batch, rows, columns, window, window, dim).transpose(2, 3)
        out = out.reshape(batch, rows * window, columns * window, dim)[:, :height, :width].reshape(batch, tokens, dim)
        return self.proj_drop(project(self.proj, out, backend))


class MlpOverride(Fused):
    """timm's ``Mlp`` with its activation inside the first product."""

    fastvit_op = "mlp"
    fastvit_reads: ClassVar = {
        "fc1": nn.Linear,
        "fc2": nn.Linear,
        "drop1": nn.Dropout,
        "drop2": nn.Dropout,
        "norm": nn.Identity,
    }

    def forward(self, x: Tensor) -> Tensor:
        backend = fused_backend(self)
        activation = None if backend is None else activation_name(self.act)
        if backend is None or activation is None or dropout_p(self.drop1) > 0.0 or dropout_p(self.drop2) > 0.0:
            return plain_class(self).forward(self, x)
        layers = (self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
        return ops.mlp(x, *layers, activation, backend=backend)


class BlockOverride(Fused):
    """timm's ``Block`` of ViT, DeiT and their kin in four calls, see :mod:`fastvit.patching.rows.blocks`."""

    fastvit_op = "linear"
    fastvit_needs = ("attn", "mlp")

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        masked = any(value is not None and value is not False for value in (*args, *kwargs.values()))
        out = None if masked else replayed(self, _run_whole, x, count_read(self, _head))
        return plain_class(self).forward(self, x, *args, **kwargs) if out is None else out


def _run_whole(block: Any, x: Tensor, count: int | None) -> Tensor | None:
    backend = whole_backend(block, x)
    if backend is None or not (_adds_attention(block, backend) and _adds_mlp(block, backend)):
        return None
    attention, mlp = block.attn, block.mlp
    attend = functools.partial(ops.masked_attention, scale=attention.scale, backend=backend)
    layers, heads = [layer_of(attention.qkv)], Heads(attention.num_heads, attention.head_dim)
    first, second = (getattr(scale, "gamma", None) for scale in (block.ls1, block.ls2))
    x = add_attention(x, block.norm1, layers, heads, attend, layer_of(attention.proj), backend, first, count)
    return add_mlp(x, block.norm2, (mlp.fc1, activation_name(mlp.act), mlp.fc2), backend, second)


def _reads_class_tokens(model: Any, block: nn.Module) -> int | None:
    """1, or 2 of a distilled DeiT, where nobody but the head sees what the last block gives."""
    norm, blocks = model._modules.get("norm"), model._modules.get("blocks")
    seen_by_head_alone = (
        model.global_pool == "token"
        and model.attn_pool is None
        and not model.grad_checkpointing
        and _path(type(norm)) in _NORMS
        and is_plain(norm, type(norm))
        and is_plain(blocks, nn.Sequential)
        and is_fused(block, getattr(block, "fastvit_backend", ""))
    )
    return (2 if hasattr(model, "head_dist") else 1) if seen_by_head_alone else None


def _head(model: nn.Module) -> Head | None:
    plain: Any = plain_class(model)
    if _path(plain) not in _VISION_TRANSFORMERS:
        return None
    methods = methods_of(plain, ("forward", "forward_features", "forward_head", "pool"), _MODEL_NAMES)
    between = frozenset({plain.forward_features.__code__})
    return None if methods is None else Head(methods, between, "blocks", _reads_class_tokens)


_NORMS = ("torch.nn.modules.normalization.LayerNorm", "timm.layers.norm.LayerNorm")
_SCALES = ("torch.nn.modules.linear.Identity", "timm.layers.layer_scale.LayerScale")
_DROP_PATHS = ("torch.nn.modules.linear.Identity", "timm.layers.drop.DropPath")
_ATTENTIONS = ("timm.layers.attention.Attention", "timm.models.vision_transformer.Attention")


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _attends_as_usual(attention: Any) -> bool:
    """Without norms of its own and without a gate."""
    return are_plain(attention, _OF_NO_USE) and getattr(attention, "gate", None) is None


_NOTHING = (nn.Identity, type(None))
_OF_NO_USE = parts_of({"q_norm": _NOTHING, "k_norm": _NOTHING, "norm": _NOTHING})


def _is_usual_block(module: Any) -> bool:
    """One that can run whole, for all that does not change."""
    parts = {name: plain_class(part) for name, part in module.named_children()}
    around = (("norm1", _NORMS), ("norm2", _NORMS), ("ls1", _SCALES), ("ls2", _SCALES))
    return (
        all(name in parts and _path(parts[name]) in paths for name, paths in around)
        and "attn" in parts
        and _path(parts["attn"]) in _ATTENTIONS
        and _attends_as_usual(module.attn)
        and "mlp" in parts
        and _path(parts["mlp"]) == "timm.layers.mlp.Mlp"
    )


def _are_around(block: Any, half: int) -> bool:
    """Whether norm, LayerScale and stochastic depth of a half of a block are known, and do what their tensors tell."""
    parts = block._modules
    for name, paths in (("norm", _NORMS), ("ls", _SCALES), ("drop_path", _DROP_PATHS)):
        part = parts.get(f"{name}{half}")
        cls = type(part)
        if _path(cls) not in paths or not is_plain(part, cls) or part.training:
            return False
    return True


def _adds_attention(block: Any, backend: str) -> bool:
    """Whether the attention, and all around it, is known and does nothing more than its tensors tell."""
    attention = block._modules.get("attn")
    return (
        is_fused(attention, backend)
        and isinstance(attention, AttentionOverride)
        and not attention.training
        and _path(plain_class(attention)) in _ATTENTIONS
        and are_plain(attention, _ATTENTION)
        and _attends_as_usual(attention)
        and dropout_p(attention.proj_drop) == dropout_p(attention.attn_drop) == 0.0
        and _are_around(block, 1)
    )


def _adds_mlp(block: Any, backend: str) -> bool:
    """The same of the MLP."""
    mlp = block._modules.get("mlp")
    return (
        is_fused(mlp, backend)
        and isinstance(mlp, MlpOverride)
        and not mlp.training
        and _path(plain_class(mlp)) == "timm.layers.mlp.Mlp"
        and are_plain(mlp, _MLP)
        and dropout_p(mlp.drop1) == dropout_p(mlp.drop2) == 0.0
        and activation_name(mlp._modules.get("act")) is not None
        and _are_around(block, 2)
    )


_ATTENTION = parts_of({"qkv": nn.Linear, "proj": nn.Linear, "proj_drop": nn.Dropout, "attn_drop": nn.Dropout})
_MLP = parts_of(MlpOverride.fastvit_reads)


class PosConvOverride(Fused):
    """timm's Twins ``PosConv`` (PEG) on tokens as they lie."""

    fastvit_op = "token_depthwise_conv"
    fastvit_reads: ClassVar = {"proj": nn.Sequential, "proj.0": nn.Conv2d}

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        backend = fused_backend(self)
        if backend is None:
            return plain_class(self).forward(self, x, size)
        conv = self.proj[0]
        return ops.token_depthwise_conv(
            x,
            conv.weight,
            conv.bias,
            grid=(size[0], size[1]),
            stride=self.stride,
            padding=conv.padding[0],
            residual=self.stride == 1,
            backend=backend,
        )


def _check_attention(module: nn.Module) -> list[str]:
    missing = check_attributes(module, "num_heads", "head_dim", "scale", "q_norm", "k_norm", "proj", "proj_drop")
    if missing:
        return missing
    width = module.num_heads * module.head_dim
    return check_scale("scale", module.scale, module.head_dim) + check_linear(module, "qkv", 3 * width)


def _check_talking_heads(module: nn.Module) -> list[str]:
    missing = check_attributes(module, "num_heads", "scale", "proj", "proj_drop")
    if missing:
        return missing
    heads = module.num_heads
    mixes = [name for name in ("proj_l", "proj_w") if tuple(getattr(module, name).weight.shape) != (heads, heads)]
    found = [f"{name} does not map heads to heads" for name in mixes]
    if type(module.qkv) is nn.Linear:  # a wrapped one answers for its width itself
        found += check_linear(module, "qkv", 3 * module.qkv.in_features)
    return found


def _check_class_attention(module: nn.Module) -> list[str]:
    missing = check_attributes(module, "num_heads", "scale", "q", "k", "v", "proj", "proj_drop")
    if missing or type(module.q) is not nn.Linear:
        return missing
    width = module.q.in_features
    return [reason for name in ("q", "k", "v") for reason in check_linear(module, name, width)]


def _check_beit(module: nn.Module) -> list[str]:
    missing = check_attributes(
        module, "num_heads", "scale", "q_bias", "k_bias", "v_bias", "relative_position_bias_table", "proj", "proj_drop"
    )
    return missing or ([] if module.qkv.bias is None else ["qkv has a bias of its own"])


def _check_rel_pos(module: nn.Module) -> list[str]:
    missing = check_attributes(
        module, "num_heads", "head_dim", "scale", "q_norm", "k_norm", "rel_pos", "proj", "proj_drop"
    )
    if missing:
        return missing
    if module.rel_pos is not None:
        missing = check_attributes(module.rel_pos, "get_bias")
    return missing + check_linear(module, "qkv", 3 * module.num_heads * module.head_dim)


def _check_global_attention(module: nn.Module) -> list[str]:
    missing = check_attributes(module, "num_heads", "scale", "q", "kv", "sr", "norm", "proj", "proj_drop")
    if missing or type(module.q) is not nn.Linear:
        return missing
    width = module.q.in_features
    head_dim = width // module.num_heads
    return check_scale("scale", module.scale, head_dim) + check_linear(module, "kv", 2 * width)


def _check_local_attention(module: nn.Module) -> list[str]:
    missing = check_attributes(module, "num_heads", "scale", "qkv", "ws", "proj", "proj_drop")
    if missing or type(module.qkv) is not nn.Linear:
        return missing
    width = module.qkv.in_features
    return check_scale("scale", module.scale, width // module.num_heads) + check_linear(module, "qkv", 3 * width)


def _check_mlp(module: nn.Module) -> list[str]:
    return check_attributes(module, "act") or check_activation("act", module.act)


def _is_of_linears(module: nn.Module) -> bool:
    """Not of 1x1 convolutions, which no operator stands for."""
    return not isinstance(getattr(module, "fc1", None), nn.Conv2d)


def _check_pos_conv(module: nn.Module) -> list[str]:
    if len(module.proj) != 1:
        return [f"proj has {len(module.proj)} parts, expected is a single convolution"]
    found = check_depthwise("proj.0", module.proj[0])
    if not found and module.proj[0].stride != (module.stride,) * 2:
        found = [f"proj.0 has stride {module.proj[0].stride}, expected {(module.stride,) * 2}"]
    return found


# Every global and attribute name that the forwards of the versions read (up to timm 1.0.31) use.
_COMMON_NAMES = frozenset(
    {
        "shape",
        "reshape",
        "permute",
        "num_heads",
        "unbind",
        "torch",
        "nn",
        "functional",
        "F",
        "scaled_dot_product_attention",
        "fused_attn",
        "attn_drop",
        "p",
        "training",
        "scale",
        "transpose",
        "softmax",
        "proj",
        "proj_drop",
    }
)
_ATTENTION_NAMES = _COMMON_NAMES | {
    "qkv",
    "head_dim",
    "attn_dim",
    "q_norm",
    "k_norm",
    "gate",
    "sigmoid",
    "norm",
    "resolve_self_attn_mask",
    "maybe_add_mask",
}
_CAIT_NAMES = _COMMON_NAMES | {"qkv", "q", "k", "v", "unsqueeze", "proj_l", "proj_w"}
_BEIT_NAMES = _COMMON_NAMES | {
    "q_bias",
    "k_bias",
    "v_bias",
    "cat",
    "qkv",
    "qkv_bias_separate",
    "linear",
    "weight",
    "relative_position_bias_table",
    "_get_rel_pos_bias",
}
_REL_POS_NAMES = _COMMON_NAMES | {"qkv", "q_norm", "k_norm", "head_dim", "rel_pos", "get_bias"}
_TWINS_NAMES = _COMMON_NAMES | {"qkv", "q", "kv", "sr", "norm", "view", "pad", "ws", "contiguous"}
_BLOCK_NAMES = frozenset(
    {"drop_path1", "ls1", "attn", "norm1", "drop_path2", "ls2", "mlp", "norm2", "attn_mask", "is_causal"}
)
_MLP_NAMES = frozenset({"fc1", "act", "drop1", "norm", "fc2", "drop2"})
_POS_CONV_NAMES = frozenset({"shape", "transpose", "view", "proj", "stride", "flatten"})

_VISION_TRANSFORMERS = (
    "timm.models.vision_transformer.VisionTransformer",
    "timm.models.deit.VisionTransformerDistilled",
)
_MODEL_NAMES = frozenset(
    "_pos_embed blocks checkpoint_seq grad_checkpointing is_scripting jit norm norm_pre patch_drop patch_embed torch "
    "fc_norm head head_drop pool attn_pool global_pool global_pool_nlc num_prefix_tokens pool_include_prefix "
    "distilled_training head_dist training forward_features forward_head mean amax".split()
)

ROWS = (
    Row("timm.models.vision_transformer.Block", BlockOverride, known_names=_BLOCK_NAMES, applies=_is_usual_block),
    Row("timm.layers.attention.Attention", AttentionOverride, _check_attention, _ATTENTION_NAMES),
    Row("timm.models.vision_transformer.Attention", AttentionOverride, _check_attention, _ATTENTION_NAMES),
    Row("timm.models.cait.TalkingHeadAttn", TalkingHeadOverride, _check_talking_heads, _CAIT_NAMES),
    Row("timm.models.cait.ClassAttn", ClassAttentionOverride, _check_class_attention, _CAIT_NAMES),
    Row("timm.models.beit.Attention", BeitAttentionOverride, _check_beit, _BEIT_NAMES),
    Row(
        "timm.models.vision_transformer_relpos.RelPosAttention", RelPosAttentionOverride, _check_rel_pos, _REL_POS_NAMES
    ),
    Row("timm.models.twins.GlobalSubSampleAttn", GlobalAttentionOverride, _check_global_attention, _TWINS_NAMES),
    Row("timm.models.twins.LocallyGroupedAttn", LocalAttentionOverride, _check_local_attention, _TWINS_NAMES),
    Row("timm.layers.mlp.Mlp", MlpOverride, _check_mlp, _MLP_NAMES, applies=_is_of_linears),
    Row("timm.models.twins.PosConv", PosConvOverride, _check_pos_conv, _POS_CONV_NAMES),
)
