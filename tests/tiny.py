"""Small models with every block the full ones have, their parameters and statistics far from their initial values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastvit import reference
from fastvit.patching import unpatch

CLASSES = 7
SIZES = {"cvt": 48, "ceit": 64, "twins_pcpvt": 64, "timm_twins": 64, "timm_twins_svt": 64}
ISOTROPIC = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4, "num_classes": CLASSES}
FAMILIES = ("vit", "deit", "deepvit", "cait", "cpvt", "cvt", "ceit", "twins_pcpvt")
TIMM = (
    "timm_vit",
    "timm_vit_qk_norm",
    "timm_deit_distilled",
    "timm_deit3",
    "timm_beit",
    "timm_beit_shared",
    "timm_relpos",
    "timm_cait",
    "timm_twins",
    "timm_twins_svt",
)


def shake(model: nn.Module) -> nn.Module:
    """Move every parameter and running statistic away from zero, one and the identity."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0)
            elif name.endswith("running_mean"):
                buffer.normal_(0.0, 0.2)
    return model


_PYRAMID = {"depth": (1, 1, 1, 1), "num_heads": (1, 2, 3, 4), "num_classes": CLASSES}
_REFERENCE: dict[str, tuple[str, dict[str, object]]] = {
    "vit": ("ViT", ISOTROPIC),
    "deit": ("DeiT", {**ISOTROPIC, "distilled": True}),
    "deepvit": ("DeepViT", ISOTROPIC),
    "deepvit_cnn": ("DeepViT", {**ISOTROPIC, "stem": "cnn", "scale_adjustment": 0.5, "transformed_blocks": 1}),
    "cait": ("CaiT", ISOTROPIC),
    "cpvt": ("CPVT", ISOTROPIC),
    "cvt": ("CvT", {"embed_dim": (16, 32, 48), "depth": (1, 1, 1), "num_heads": (1, 2, 3), "num_classes": CLASSES}),
    "ceit": ("CeiT", {**ISOTROPIC, "img_size": 64, "patch_size": 16, "stem_chans": 8}),
    "twins_pcpvt": ("TwinsPCPVT", {**_PYRAMID, "img_size": 64, "embed_dim": (16, 32, 48, 64)}),
}
"""Family class and arguments."""


def _reference(name: str, **changes: Any) -> nn.Module:
    family, options = _REFERENCE[name]
    return getattr(reference, family)(**{**options, **changes})


def _timm(name: str) -> nn.Module:
    pytest.importorskip("timm")
    from timm.models import beit, cait, deit, twins, vision_transformer, vision_transformer_relpos

    if name == "timm_vit":
        return vision_transformer.VisionTransformer(**ISOTROPIC)
    if name == "timm_vit_qk_norm":
        options = {"qk_norm": True, "scale_attn_norm": True, "class_token": False, "global_pool": "avg"}
        return vision_transformer.VisionTransformer(**ISOTROPIC, **options)
    if name == "timm_deit_distilled":
        return deit.VisionTransformerDistilled(**ISOTROPIC)
    if name == "timm_deit3":
        return vision_transformer.VisionTransformer(**ISOTROPIC, no_embed_class=True, init_values=1e-6)
    if name == "timm_relpos":
        return vision_transformer_relpos.VisionTransformerRelPos(**ISOTROPIC, class_token=True)
    if name.startswith("timm_beit"):
        shared = name.endswith("shared")
        return beit.Beit(**ISOTROPIC, use_rel_pos_bias=not shared, use_shared_rel_pos_bias=shared)
    if name == "timm_cait":
        return cait.Cait(**ISOTROPIC)
    pyramid = {"img_size": 64, "embed_dims": (16, 32, 48, 64), "num_heads": (1, 2, 3, 4), "num_classes": CLASSES}
    if name == "timm_twins_svt":  # the map is no multiple of the windows
        return twins.Twins(**pyramid, depths=(2, 1, 1, 1), wss=(3, 3, 3, 3))
    return twins.Twins(**pyramid, depths=(1, 1, 1, 1))


def build(name: str, **changes: Any) -> nn.Module:
    """A plain tiny model, in eval mode; one of ours with other arguments where ``changes`` are given."""
    model = _timm(name) if name.startswith("timm_") else _reference(name, **changes)
    return shake(unpatch(model)).eval()


def images(name: str, batch: int = 2, seed: int = 0) -> Tensor:
    """Images of the size a tiny model takes."""
    size = SIZES.get(name, 32)
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))
