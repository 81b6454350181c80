"""transformers' ViT and DeiT, by the names of 4.x (and of every file on its hub) and of 5.x in memory; and its CvT."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from fastvit.reference.weights.convert import Converted, Format, Stored, pack_qkv, rename

_COMMON = {
    "embeddings.cls_token": "cls_token",
    "embeddings.distillation_token": "dist_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
    "classifier": "head",
    "cls_classifier": "head",
    "distillation_classifier": "head_dist",
}
_LAYERS_4 = {
    "encoder.layer.{N}.layernorm_before": "blocks.{N}.norm1",
    "encoder.layer.{N}.layernorm_after": "blocks.{N}.norm2",
    "encoder.layer.{N}.attention.attention.query": "blocks.{N}.attn.q",
    "encoder.layer.{N}.attention.attention.key": "blocks.{N}.attn.k",
    "encoder.layer.{N}.attention.attention.value": "blocks.{N}.attn.v",
    "encoder.layer.{N}.attention.output.dense": "blocks.{N}.attn.proj",
    "encoder.layer.{N}.intermediate.dense": "blocks.{N}.mlp.fc1",
    "encoder.layer.{N}.output.dense": "blocks.{N}.mlp.fc2",
}
_LAYERS_5 = {
    "layers.{N}.layernorm_before": "blocks.{N}.norm1",
    "layers.{N}.layernorm_after": "blocks.{N}.norm2",
    "layers.{N}.attention.q_proj": "blocks.{N}.attn.q",
    "layers.{N}.attention.k_proj": "blocks.{N}.attn.k",
    "layers.{N}.attention.v_proj": "blocks.{N}.attn.v",
    "layers.{N}.attention.o_proj": "blocks.{N}.attn.proj",
    "layers.{N}.mlp.fc1": "blocks.{N}.mlp.fc1",
    "layers.{N}.mlp.fc2": "blocks.{N}.mlp.fc2",
}
_DROPPED = {
    "pooler.dense": "the pooler (linear and tanh) of the base model, which no classifier here uses",
    "embeddings.mask_token": "the token of masked-image pre-training",
}

_CVT_STAGE = "encoder.stages.{S}."
_CVT_LAYER = _CVT_STAGE + "layers.{N}."
_CVT_ATTENTION = _CVT_LAYER + "attention.attention."
_CVT = {
    _CVT_STAGE + "embedding.convolution_embeddings.projection": "stage{S}.patch_embed.proj",
    _CVT_STAGE + "embedding.convolution_embeddings.normalization": "stage{S}.patch_embed.norm",
    _CVT_STAGE + "cls_token": "stage{S}.cls_token",
    _CVT_LAYER + "layernorm_before": "stage{S}.blocks.{N}.norm1",
    _CVT_LAYER + "layernorm_after": "stage{S}.blocks.{N}.norm2",
    _CVT_LAYER + "attention.output.dense": "stage{S}.blocks.{N}.attn.proj",
    _CVT_LAYER + "intermediate.dense": "stage{S}.blocks.{N}.mlp.fc1",
    _CVT_LAYER + "output.dense": "stage{S}.blocks.{N}.mlp.fc2",
    "layernorm": "norm",
    "classifier": "head",
}
for _part in ("query", "key", "value"):
    _native = "stage{S}.blocks.{N}.attn."
    _conv = f"{_CVT_ATTENTION}convolution_projection_{_part}.convolution_projection."
    _CVT[f"{_CVT_ATTENTION}projection_{_part}"] = f"{_native}proj_{_part[0]}"
    _CVT[f"{_conv}convolution"] = f"{_native}conv_proj_{_part[0]}.conv"
    _CVT[f"{_conv}normalization"] = f"{_native}conv_proj_{_part[0]}.bn"


def convert_vit(tensors: Mapping[str, Stored], wanted: Collection[str]) -> Converted:
    """ViT and DeiT, with or without the ``vit.`` or ``deit.`` in front that base models lack."""
    tensors = _without_prefix(tensors, ("vit.", "deit."))
    converted = rename(tensors, {**_COMMON, **_LAYERS_4, **_LAYERS_5}, _DROPPED)
    converted.tensors = pack_qkv(converted.tensors)
    return converted


def convert_cvt(tensors: Mapping[str, Stored], wanted: Collection[str]) -> Converted:
    """CvT, with or without the ``cvt.`` in front."""
    return rename(_without_prefix(tensors, ("cvt.",)), _CVT)


def _without_prefix(tensors: Mapping[str, Stored], prefixes: tuple[str, ...]) -> dict[str, Stored]:
    stripped = {}
    for name, tensor in tensors.items():
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
        stripped[name.removeprefix(prefix)] = tensor
    return stripped


def _names_layers(names: Collection[str], part: str) -> bool:
    embeds = any(name.endswith("embeddings.patch_embeddings.projection.weight") for name in names)
    return embeds and any(part in name for name in names)


VIT_4 = Format("transformers-4", lambda names: _names_layers(names, "encoder.layer.0."), convert_vit, 1e-12)
VIT_5 = Format("transformers-5", lambda names: _names_layers(names, "layers.0.attention.q_proj"), convert_vit, 1e-12)
CVT = Format(
    "transformers",
    lambda names: any("encoder.stages.0.embedding.convolution_embeddings." in name for name in names),
    convert_cvt,
)
