"""torchvision's VisionTransformer (``vit_b_16`` and its like)."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from fastvit.reference.weights.convert import Converted, Format, Stored, rename
from fastvit.reference.weights.native import PRE_LOGITS

_LAYER = "encoder.layers.encoder_layer_{N}."
_NAMES = {
    "class_token": "cls_token",
    "encoder.pos_embedding": "pos_embed",
    "conv_proj": "patch_embed.proj",
    _LAYER + "ln_1": "blocks.{N}.norm1",
    _LAYER + "ln_2": "blocks.{N}.norm2",
    _LAYER + "self_attention.in_proj_weight": "blocks.{N}.attn.qkv.weight",
    _LAYER + "self_attention.in_proj_bias": "blocks.{N}.attn.qkv.bias",
    _LAYER + "self_attention.out_proj": "blocks.{N}.attn.proj",
    _LAYER + "mlp.0": "blocks.{N}.mlp.fc1",
    _LAYER + "mlp.3": "blocks.{N}.mlp.fc2",
    _LAYER + "mlp.linear_1": "blocks.{N}.mlp.fc1",  # before torchvision 0.13
    _LAYER + "mlp.linear_2": "blocks.{N}.mlp.fc2",
    "encoder.ln": "norm",
    "heads.head": "head",
}


def convert(tensors: Mapping[str, Stored], wanted: Collection[str]) -> Converted:
    """A pure renaming: torchvision packs query, key and value as the native layout does."""
    return rename(tensors, _NAMES, {"heads.pre_logits": PRE_LOGITS})


TORCHVISION = Format("torchvision", lambda names: "conv_proj.weight" in names, convert, 1e-6)
