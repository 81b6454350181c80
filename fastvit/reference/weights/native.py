"""The official repositories' names, which timm shares for ViT, DeiT, CaiT and Twins, and this package for all."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from fastvit.reference.weights.convert import Converted, Format, Stored, rename

PRE_LOGITS = "a layer between features and head of old ImageNet-21k checkpoints; their head was trained on its output"
_MAE, _PROJECTION = (
    "the decoder of masked pre-training (MAE)",
    "the projection head of self-supervised training (MoCo, DINO)",
)
_DROPPED = {
    "pre_logits.fc": PRE_LOGITS,
    "mask_token": _MAE,
    "decoder_embed": _MAE,
    "decoder_pos_embed": _MAE,
    "decoder_blocks.*": _MAE,
    "decoder_norm": _MAE,
    "decoder_pred": _MAE,
    "head.{N}": _PROJECTION,
    "head.mlp.*": _PROJECTION,
    "head.last_layer": _PROJECTION,
}


def convert(tensors: Mapping[str, Stored], wanted: Collection[str]) -> Converted:
    """Names stay; what other training tasks add is dropped where the model has no such tensor."""
    own = {name: tensor for name, tensor in tensors.items() if name in wanted}
    converted = rename({name: tensor for name, tensor in tensors.items() if name not in wanted}, {}, _DROPPED)
    return Converted({**own, **converted.tensors}, converted.dropped)


NATIVE = Format("native", lambda names: True, convert)
