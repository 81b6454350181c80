"""The activations that the tables take for an operator's: each computes what its name there says."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn

from fastvit import backends, reference
from fastvit.patching import explain, patch, report, unpatch
from fastvit.patching.rows.parts import activation_name
from fastvit.reference import functional
from tests.helpers import on_pooled_draws
from tests.patching.fused_and_plain import Logits, check_inference, check_training
from tests.tiny import ISOTROPIC, shake

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")
ACT2FN = transformers.activations.ACT2FN

TANH: dict[str, Callable[[], nn.Module]] = {
    "torch": lambda: nn.GELU(approximate="tanh"),
    "timm": timm.layers.GELUTanh,
    **{f"transformers {name}": lambda name=name: ACT2FN[name] for name in ("gelu_pytorch_tanh", "gelu_new")},
}
ERF: dict[str, Callable[[], nn.Module]] = {
    "torch": nn.GELU,
    "timm": timm.layers.GELU,
    "transformers": lambda: ACT2FN["gelu"],
}
SIZES = {"image_size": 32, "patch_size": 8, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("name", "layer"),
    [*(("gelu_tanh", make) for make in TANH.values()), *(("gelu", make) for make in ERF.values())],
    ids=[*TANH, *(f"{name} erf" for name in ERF)],
)
def test_named_after_what_it_computes(name, layer):
    module, x = layer(), torch.linspace(-9, 9, 3001, dtype=torch.float64)
    assert activation_name(module) == name
    torch.testing.assert_close(functional.activate(x, name), module(x), rtol=1e-13, atol=1e-14)


def test_a_hooked_one_has_no_name():
    module = nn.GELU(approximate="tanh")
    module.register_forward_hook(lambda *_: None)
    assert activation_name(module) is None


def _timm_vit(**options: object) -> nn.Module:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4, "num_classes": 11}
    return shake(timm.models.vision_transformer.VisionTransformer(**sizes, **options)).eval()


def _transformers_vit(act: str) -> nn.Module:
    options = {**SIZES, "intermediate_size": 96, "num_labels": 11, "hidden_act": act}
    return shake(Logits(transformers.ViTForImageClassification(transformers.ViTConfig(**options)))).eval()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "reference": lambda: shake(unpatch(reference.ViT(**ISOTROPIC, act="gelu_tanh"))).eval(),
    "timm": lambda: _timm_vit(act_layer=timm.layers.GELUTanh),
    "timm by name": lambda: _timm_vit(act_layer="gelu_tanh"),
    "transformers": lambda: _transformers_vit("gelu_pytorch_tanh"),
    "transformers gelu_new": lambda: _transformers_vit("gelu_new"),
}


@pytest.fixture
def _own_products(monkeypatch):
    if not backends.cpp_reasons():
        monkeypatch.setattr(sys.modules["fastvit.ops.linear"], "CPP_MIN_ROWS", 1)


@pytest.mark.usefixtures("_own_products")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_models_with_the_tanh_form(name, dtype):
    model = MODELS[name]()
    assert report(patch(model)).totals()["mlp"] == (2, 2)
    called = {row.op for row in explain(model, torch.randn(2, 3, 32, 32)).rows}
    assert called & {"mlp", "linear"}

    def check() -> None:
        x = torch.randn(2, 3, 32, 32)
        check_inference(MODELS[name](), x, dtype)
        check_training(MODELS[name](), x, dtype)

    on_pooled_draws(check)


@pytest.mark.parametrize("name", ["Siglip", "Siglip2"])
def test_siglip(name):
    """Its MLPs, whose GELU has the tanh form by default."""
    if not hasattr(transformers, f"{name}VisionConfig"):
        pytest.skip(f"this transformers has no {name}")
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}VisionModel")(
        getattr(transformers, f"{name}VisionConfig")(**{**SIZES, "intermediate_size": 96, "num_patches": 16})
    ).eval()
    patch(model, ops="mlp")
    patched, of = report(model).totals()["mlp"]
    assert patched == of >= 2
    (mlp, *_) = [module for module in model.modules() if hasattr(module, "fastvit_op")]
    check_inference(
        unpatch(mlp), torch.randn(2, 20, 48, generator=torch.Generator().manual_seed(0)), torch.float32, ops="mlp"
    )
