"""Small models to load weights into, what must hold of a load, and random weights in the layout of flax."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fastvit.reference import CPVT, CaiT, CeiT, CvT, DeepViT, DeiT, TwinsPCPVT, ViT
from fastvit.reference.weights import load_weights
from tests.reference.parity import randomise

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
CVT = {"img_size": 32, "embed_dim": (8, 16, 32), "depth": (1, 2, 3), "num_heads": (1, 2, 4), "num_classes": 5}
TWINS = {"img_size": 64, "embed_dim": (8, 16, 24, 32), "depth": (1, 1, 2, 1), "num_heads": (1, 2, 3, 4)}
FAMILIES = {
    "vit": lambda **options: ViT(**{**SMALL, **options}),
    "vit_avg": lambda **options: ViT(**{**SMALL, "pool": "avg", **options}),
    "deit": lambda **options: DeiT(**{**SMALL, **options}),
    "deit_distilled": lambda **options: DeiT(**{**SMALL, "distilled": True, **options}),
    "deepvit": lambda **options: DeepViT(**{**SMALL, **options}),
    "cait": lambda **options: CaiT(**{**SMALL, **options}),
    "cpvt": lambda **options: CPVT(**{**SMALL, **options}),
    "twins": lambda **options: TwinsPCPVT(**{**TWINS, "num_classes": 5, **options}),
    "cvt": lambda **options: CvT(**{**CVT, **options}),
    "ceit": lambda **options: CeiT(**{**SMALL, **options}),
}


def build(family: str, **options) -> nn.Module:
    """A small model of a family with values that show when one goes astray."""
    return randomise(FAMILIES[family](**options)).eval()


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_state(model: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    actual = model.state_dict()
    assert actual.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert different == []


def assert_refused(model: nn.Module, source, words: str, error: type[Exception] = ValueError, **options) -> None:
    """The load fails with these words, and the model is bit for bit what it was."""
    before = snapshot(model)
    with pytest.raises(error, match=words):
        load_weights(model, source, **options)
    assert_state(model, before)


def images(size: int = 32, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, size, size)


def jax_arrays(linen: bool, tokens: int = 17, **options) -> dict[str, np.ndarray]:
    """Random weights in the layout of flax, by the published files' numbers or by linen's."""
    rng = np.random.default_rng(0)
    numbers = {"norm2": 1, "attention": 0, "mlp": 0} if linen else {"norm2": 2, "attention": 1, "mlp": 3}
    shapes = {"cls": (1, 1, 32), "embedding/kernel": (8, 8, 3, 32), "embedding/bias": (32,)}
    shapes |= {"Transformer/posembed_input/pos_embedding": (1, tokens, 32), "head/kernel": (32, 5), "head/bias": (5,)}
    norms = ["Transformer/encoder_norm"]
    for block in range(2):
        name = f"Transformer/encoderblock_{block}"
        norms += [f"{name}/LayerNorm_0", f"{name}/LayerNorm_{numbers['norm2']}"]
        attention = f"{name}/MultiHeadDotProductAttention_{numbers['attention']}"
        for part in ("query", "key", "value"):
            shapes |= {f"{attention}/{part}/kernel": (32, 2, 16), f"{attention}/{part}/bias": (2, 16)}
        shapes |= {f"{attention}/out/kernel": (2, 16, 32), f"{attention}/out/bias": (32,)}
        mlp = f"{name}/MlpBlock_{numbers['mlp']}"
        shapes |= {f"{mlp}/Dense_0/kernel": (32, 128), f"{mlp}/Dense_0/bias": (128,)}
        shapes |= {f"{mlp}/Dense_1/kernel": (128, 32), f"{mlp}/Dense_1/bias": (32,)}
    shapes |= {f"{norm}/{leaf}": (32,) for norm in norms for leaf in ("scale", "bias")}
    return {name: 0.2 * rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
