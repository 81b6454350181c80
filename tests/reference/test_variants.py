"""Every named model: its exact parameter count, and its multiply-adds within 0.5 % of what was counted elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastvit.reference import VARIANTS, create_model

# Parameters with 1000 classes, and 1e9 multiply-adds at batch 1 (matmuls, convolutions, Q K^T, A V), at the model's own
# image size: counted in the official code, in timm where that is the same model, CPVT in an assembly of the two.
EXPECTED = {
    "vit_tiny_patch16_224": (5_717_416, 1.254),
    "vit_tiny_patch16_384": (5_790_376, 4.682),
    "vit_small_patch16_224": (22_050_664, 4.599),
    "vit_small_patch16_384": (22_196_584, 15.490),
    "vit_small_patch32_224": (22_878_952, 1.143),
    "vit_base_patch32_224": (88_224_232, 4.409),
    "vit_base_patch32_384": (88_297_192, 13.044),
    "vit_base_patch16_224": (86_567_656, 17.564),
    "vit_base_patch16_384": (86_859_496, 55.484),
    "vit_base_patch8_224": (86_576_872, 78.148),
    "vit_large_patch32_224": (306_535_400, 15.378),
    "vit_large_patch32_384": (306_632_680, 45.276),
    "vit_large_patch16_224": (304_326_632, 61.555),
    "vit_large_patch16_384": (304_715_752, 191.066),
    "vit_huge_patch14_224": (632_045_800, 167.294),
    "deit_tiny_patch16_224": (5_717_416, 1.254),
    "deit_small_patch16_224": (22_050_664, 4.599),
    "deit_base_patch16_224": (86_567_656, 17.564),
    "deit_base_patch16_384": (86_859_496, 55.484),
    "deit_tiny_distilled_patch16_224": (5_910_800, 1.261),
    "deit_small_distilled_patch16_224": (22_436_432, 4.624),
    "deit_base_distilled_patch16_224": (87_338_192, 17.657),
    "deit_base_distilled_patch16_384": (87_630_032, 55.591),
    "deepvit_16b": (24_426_664, 5.272),
    "deepvit_24b": (36_261_448, 7.879),
    "deepvit_32b": (48_096_232, 10.486),
    "deepvit_s": (27_312_632, 6.361),
    "deepvit_l": (58_883_708, 13.149),
    "deepvit_l_384": (59_043_308, 44.792),
    "cait_xxs24_224": (11_956_264, 2.523),
    "cait_xxs24_384": (12_029_224, 9.599),
    "cait_xxs36_224": (17_299_720, 3.756),
    "cait_xxs36_384": (17_372_680, 14.313),
    "cait_xs24_384": (26_670_088, 19.241),
    "cait_s24_224": (46_916_200, 9.327),
    "cait_s24_384": (47_062_120, 32.110),
    "cait_s36_384": (68_366_632, 47.908),
    "cait_m36_384": (271_221_352, 172.944),
    "cait_m48_448": (356_460_520, 329.108),
    "cait_xs36_224": (38_557_432, 8.03),
    "cait_s48_224": (89_525_224, 18.48),
    "cait_m24_224": (185_850_088, 35.78),
    "cpvt_tiny": (5_681_512, 1.254),
    "cpvt_tiny_peg5": (5_689_192, 1.255),
    "cpvt_tiny_gap": (5_681_320, 1.247),
    "cpvt_tiny_peg5_gap": (5_689_000, 1.248),
    "cpvt_small": (21_978_856, 4.600),
    "cpvt_small_peg5": (21_994_216, 4.602),
    "cpvt_small_gap": (21_978_472, 4.575),
    "cpvt_small_peg5_gap": (21_993_832, 4.577),
    "cpvt_base": (86_424_040, 17.565),
    "cpvt_base_peg5": (86_454_760, 17.571),
    "cpvt_base_gap": (86_423_272, 17.473),
    "cpvt_base_peg5_gap": (86_453_992, 17.478),
    "twins_pcpvt_small": (24_106_216, 3.809),
    "twins_pcpvt_base": (43_828_456, 6.653),
    "twins_pcpvt_large": (60_989_672, 9.808),
    "cvt_13": (19_997_480, 4.566),
    "cvt_21": (31_622_696, 7.178),
    "cvt_13_384": (19_997_480, 16.269),
    "cvt_21_384": (31_622_696, 24.849),
    "cvt_w24_384": (277_196_392, 194.222),
    "ceit_tiny": (6_356_904, 1.395),
    "ceit_small": (24_204_840, 4.760),
    "ceit_base": (94_405_416, 17.749),
    "ceit_tiny_384": (6_429_864, 5.103),
    "ceit_small_384": (24_350_760, 15.980),
}

FAMILIES = {"vit": 15, "deit": 8, "deepvit": 6, "cait": 13, "cpvt": 12, "twins": 3, "cvt": 5, "ceit": 5}


def test_every_name_is_there():
    assert VARIANTS.keys() == EXPECTED.keys()
    for family, count in FAMILIES.items():
        assert sum(name.startswith(f"{family}_") for name in VARIANTS) == count


@pytest.mark.parametrize("name", EXPECTED)
def test_parameters_multiply_adds_and_image_preparation(name):
    params, gmacs = EXPECTED[name]
    with torch.device("meta"):
        model = create_model(name).eval().requires_grad_(False)
        image = torch.empty(1, 3, *model.img_size)
    with FlopCounterMode(display=False) as counter:
        logits = model(image)
    assert logits.shape == (1, 1000)
    assert sum(parameter.numel() for parameter in model.parameters()) == params == VARIANTS[name].params
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmacs, rel=5e-3)
    assert VARIANTS[name].gmacs == pytest.approx(gmacs, rel=5e-3)
    assert_image_preparation(name, model.default_cfg)


def assert_image_preparation(name: str, cfg: dict) -> None:
    size = next((int(part) for part in name.split("_") if part in ("384", "448")), 224)
    assert cfg["input_size"] == (3, size, size)
    half = name.startswith(("vit_", "deepvit_"))
    assert cfg["mean"] == ((0.5, 0.5, 0.5) if half else (0.485, 0.456, 0.406))
    assert cfg["std"] == ((0.5, 0.5, 0.5) if half else (0.229, 0.224, 0.225))
    assert cfg["interpolation"] == "bicubic" and 0.85 < cfg["crop_pct"] <= 1.0
