"""The official repositories' names, which timm shares for ViT, DeiT, CaiT and Twins, and this package for all."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor

from fastvit.reference.weights.convert import Converted, Format, rename

PRE_LOGITS = "a layer between features and head of old ImageNet-21k checkpoints; their head was trained on its output"


def convert(tensors: Mapping[str, Tensor], wanted: Collection[str]) -> Converted:
    """Names stay; ``pre_logits`` is dropped where the model has none."""
    has_pre_logits = any(name.startswith("pre_logits.") for name in wanted)
    return rename(tensors, {}, {} if has_pre_logits else {"pre_logits.fc": PRE_LOGITS})


NATIVE = Format("native", lambda names: True, convert)
