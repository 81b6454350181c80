"""What timm's tools ask of a model: how images are prepared, and which layer a parameter belongs to."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastvit.reference import create_model
from fastvit.reference.registry import VARIANTS
from fastvit.reference.transform import transform
from tests.reference.checkpoints import FAMILIES

SMALL = {"vit_small_patch16_384": {"depth": 1}, "deepvit_16b": {"depth": 1}, "cait_xxs24_224": {"depth": 1}}
SMALL |= {"cvt_13": {}, "cvt_13_384": {}, "deit_tiny_patch16_224": {"depth": 1}, "ceit_tiny": {"depth": 1}}


@pytest.mark.parametrize("name", SMALL)
def test_data_config(name):
    data = pytest.importorskip("timm.data")
    config, variant = data.resolve_model_data_config(create_model(name, **SMALL[name])), VARIANTS[name]
    size = variant.config.get("img_size", 224)
    assert config["input_size"] == (3, size, size) and config["interpolation"] == "bicubic"
    assert (config["mean"], config["std"], config["crop_pct"]) == (variant.mean, variant.std, variant.crop_pct)
    assert config["crop_mode"] == ("squash" if name == "cvt_13_384" else "center")


def test_data_config_follows_the_image_size():
    data = pytest.importorskip("timm.data")
    model = create_model("vit_tiny_patch16_224", depth=1)
    model.set_input_size((96, 64))
    assert data.resolve_model_data_config(model)["input_size"] == (3, 96, 64)


@pytest.mark.parametrize("size", [(640, 481), (333, 500), (224, 224), (100, 61)])
@pytest.mark.parametrize("name", SMALL)
def test_transform_is_timms(name, size):
    data, image = pytest.importorskip("timm.data"), pytest.importorskip("PIL.Image")
    model = create_model(name, **SMALL[name])
    pixels = torch.randint(0, 256, (*size[::-1], 3), dtype=torch.uint8)
    photo = image.frombytes("RGB", size, pixels.numpy().tobytes())
    theirs = data.create_transform(**data.resolve_model_data_config(model))
    torch.testing.assert_close(transform(nn.DataParallel(model))(photo), theirs(photo), rtol=1e-6, atol=1e-6)


def test_transform_without_settings():
    with pytest.raises(ValueError, match="model: expected pretrained_cfg, .* on Linear"):
        transform(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"three channels, got input_size \(1, 224, 224\)"):
        transform(create_model("vit_tiny_patch16_224", depth=1, in_chans=1))


def layers(model: nn.Module, **options) -> dict[str, int]:
    return pytest.importorskip("timm.models").group_parameters(model, model.group_matcher(**options), reverse=True)


ORDER = {
    "vit": ["cls_token", "blocks.0.attn.qkv.weight", "blocks.1.mlp.fc1.bias", "head.weight"],
    "vit_avg": ["pos_embed", "blocks.0.norm1.weight", "blocks.1.norm1.weight", "head.bias"],
    "deit": ["patch_embed.proj.weight", "blocks.0.norm1.weight", "blocks.1.norm1.weight", "head.bias"],
    "deit_distilled": ["dist_token", "blocks.0.norm1.weight", "blocks.1.norm1.weight", "head_dist.bias"],
    "deepvit": ["cls_token", "blocks.0.attn.reatten_matrix.weight", "blocks.1.norm1.weight", "head.bias"],
    "cait": [
        "cls_token",
        "blocks.1.gamma_1",
        "blocks_token_only.0.gamma_1",
        "blocks_token_only.1.gamma_1",
        "head.bias",
    ],
    "cpvt": ["cls_token", "pos_block.0.proj.0.weight", "blocks.1.norm1.weight", "head.bias"],
    "twins": ["patch_embeds.0.proj.bias", "blocks.0.0.norm1.bias", "patch_embeds.1.proj.bias", "blocks.2.1.norm1.bias"],
    "cvt": ["stage0.patch_embed.proj.bias", "stage1.patch_embed.proj.bias", "stage1.blocks.1.norm1.bias", "head.bias"],
    "ceit": ["i2t.proj.weight", "blocks.0.leff.conv1.weight", "blocks.1.norm1.bias", "lca.norm1.bias", "head.bias"],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_in_order(family):
    found, coarse = layers(FAMILIES[family]()), layers(FAMILIES[family](), coarse=True)
    numbers = [found[name] for name in ORDER[family]]
    assert numbers == sorted(set(numbers)) and found[ORDER[family][0]] == 0
    norm = next(name for name in found if name.startswith(("norm.", "fc_norm.")))
    last = max(number for name, number in found.items() if not name.startswith("head"))
    assert found[norm] == last == max(found.values()) - 1
    assert max(coarse.values()) <= max(found.values()) and coarse.keys() == found.keys()


@pytest.mark.parametrize("family", ["vit", "deit_distilled", "twins"])
def test_layers_are_timms(family):
    timm = pytest.importorskip("timm")
    name = {"vit": "vit_tiny_patch16_224", "deit_distilled": "deit_tiny_distilled_patch16_224"}
    theirs = layers(timm.create_model(name.get(family, "twins_pcpvt_small")))
    ours = layers(create_model(name.get(family, "twins_pcpvt_small")))
    assert ours == theirs


def test_layer_decay():
    optim = pytest.importorskip("timm.optim")
    model = FAMILIES["cait"]()
    groups = optim.param_groups_layer_decay(model, layer_decay=0.5)
    scales = {parameter: group["lr_scale"] for group in groups for parameter in group["params"]}
    assert [scales[model.get_parameter(name)] for name in ("head.weight", "blocks_token_only.1.gamma_1")] == [1, 0.5]
    assert scales[model.pos_embed] == 0.5**5
