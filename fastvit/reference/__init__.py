"""The seven families in plain PyTorch: readable, differentiable, and faithful to the papers and the official code."""

from fastvit.reference.base import Variant, VisionModel
from fastvit.reference.cait import CaiT
from fastvit.reference.ceit import CeiT
from fastvit.reference.cpvt import CPVT, TwinsPCPVT
from fastvit.reference.cvt import CvT
from fastvit.reference.deepvit import DeepViT
from fastvit.reference.deit import DeiT
from fastvit.reference.registry import VARIANTS, create_model, find_variant, list_models
from fastvit.reference.vit import ViT

__all__ = [
    "CPVT",
    "VARIANTS",
    "CaiT",
    "CeiT",
    "CvT",
    "DeepViT",
    "DeiT",
    "TwinsPCPVT",
    "Variant",
    "ViT",
    "VisionModel",
    "create_model",
    "find_variant",
    "list_models",
]


def __dir__() -> list[str]:
    return __all__
