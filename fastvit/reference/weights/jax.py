"""The .npz files of google-research/vision_transformer (ViT and AugReg), by the older and the newer layer numbers."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping

from torch import Tensor

from fastvit.reference.weights.convert import Converted, Format, Stored, pack_qkv, rename
from fastvit.reference.weights.native import PRE_LOGITS

_BLOCK = "Transformer.encoderblock_{N}."
_NAMES = {
    "cls": "cls_token",
    "embedding": "patch_embed.proj",
    "Transformer.posembed_input.pos_embedding": "pos_embed",
    "Transformer.encoder_norm": "norm",
    _BLOCK + "LayerNorm_0": "blocks.{N}.norm1",
    _BLOCK + "LayerNorm_1": "blocks.{N}.norm2",  # linen's number
    _BLOCK + "LayerNorm_2": "blocks.{N}.norm2",  # the number in the published files
    _BLOCK + "MultiHeadDotProductAttention_{M}.query": "blocks.{N}.attn.q",
    _BLOCK + "MultiHeadDotProductAttention_{M}.key": "blocks.{N}.attn.k",
    _BLOCK + "MultiHeadDotProductAttention_{M}.value": "blocks.{N}.attn.v",
    _BLOCK + "MultiHeadDotProductAttention_{M}.out": "blocks.{N}.attn.proj",
    _BLOCK + "MlpBlock_{M}.Dense_0": "blocks.{N}.mlp.fc1",
    _BLOCK + "MlpBlock_{M}.Dense_1": "blocks.{N}.mlp.fc2",
    "head": "head",
}
_LEAVES = {"kernel": "weight", "scale": "weight"}


def convert(tensors: Mapping[str, Stored], wanted: Collection[str]) -> Converted:
    """Rename, and turn flax's layouts (inputs first, heads apart) into torch's."""
    converted = rename({_dotted(name): tensor for name, tensor in tensors.items()}, _NAMES, {"pre_logits": PRE_LOGITS})
    native = {}
    for name, tensor in converted.tensors.items():
        stem, dot, leaf = name.rpartition(".")
        native[stem + dot + _LEAVES.get(leaf, leaf)] = tensor.then(functools.partial(_to_torch_layout, stem, leaf))
    converted.tensors = pack_qkv(native)
    return converted


def _dotted(name: str) -> str:
    for prefix in ("opt/", "target/", "params/"):
        name = name.removeprefix(prefix)
    return name.replace("/", ".")


def _to_torch_layout(stem: str, leaf: str, tensor: Tensor) -> Tensor:
    if leaf == "bias":
        return tensor.flatten()  # (heads, head_dim) for q, k, v
    if leaf != "kernel":
        return tensor
    if tensor.dim() == 4:  # patch convolution (h, w, in, out)
        return tensor.permute(3, 2, 0, 1)
    if stem.endswith("attn.proj"):  # (heads, head_dim, out)
        return tensor.flatten(0, -2).t()
    return tensor.flatten(1).t()  # (in, out), or (in, heads, head_dim)


VIT_JAX = Format("vit-jax", lambda names: any("Transformer/encoderblock_0/" in name for name in names), convert, 1e-6)
