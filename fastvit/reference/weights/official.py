"""Where published weights of the variants lie, for ``load_weights``: files, models on the hub, pages that link files.

ViT: AugReg (arXiv 2106.10270), pre-trained on ImageNet-21k, fine-tuned on ImageNet-1k, and the paper's own. Variants
that are absent have none: no official code or file of CPVT was ever published.
"""

from __future__ import annotations

_AUGREG = "https://storage.googleapis.com/vit_models/augreg/"
_FACEBOOK = "https://dl.fbaipublicfiles.com/deit/"
_DEEPVIT = "https://github.com/zhoudaquan/dvit_repo"
_CEIT = "https://github.com/coeusguo/ceit"

OFFICIAL: dict[str, str] = {
    "vit_tiny_patch16_224": _AUGREG
    + "Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_224.npz",
    "vit_tiny_patch16_384": _AUGREG
    + "Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_384.npz",
    "vit_small_patch32_224": _AUGREG
    + "S_32-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_224.npz",
    "vit_small_patch16_224": _AUGREG
    + "S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_224.npz",
    "vit_small_patch16_384": _AUGREG
    + "S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_384.npz",
    "vit_base_patch32_224": _AUGREG
    + "B_32-i21k-300ep-lr_0.001-aug_medium1-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_224.npz",
    "vit_base_patch32_384": _AUGREG
    + "B_32-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_384.npz",
    "vit_base_patch16_224": _AUGREG
    + "B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.01-res_224.npz",
    "vit_base_patch16_384": _AUGREG
    + "B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.01-res_384.npz",
    "vit_base_patch8_224": _AUGREG
    + "B_8-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.01-res_224.npz",
    "vit_large_patch16_224": _AUGREG
    + "L_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1--imagenet2012-steps_20k-lr_0.01-res_224.npz",
    "vit_large_patch16_384": _AUGREG
    + "L_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1--imagenet2012-steps_20k-lr_0.01-res_384.npz",
    "vit_large_patch32_384": "https://storage.googleapis.com/vit_models/imagenet21k+imagenet2012/ViT-L_32.npz",
    "deit_tiny_patch16_224": _FACEBOOK + "deit_tiny_patch16_224-a1311bcf.pth",
    "deit_small_patch16_224": _FACEBOOK + "deit_small_patch16_224-cd65a155.pth",
    "deit_base_patch16_224": _FACEBOOK + "deit_base_patch16_224-b5f2ef4d.pth",
    "deit_base_patch16_384": _FACEBOOK + "deit_base_patch16_384-8de9b5d1.pth",
    "deit_tiny_distilled_patch16_224": _FACEBOOK + "deit_tiny_distilled_patch16_224-b40b3cf7.pth",
    "deit_small_distilled_patch16_224": _FACEBOOK + "deit_small_distilled_patch16_224-649709d9.pth",
    "deit_base_distilled_patch16_224": _FACEBOOK + "deit_base_distilled_patch16_224-df68dfff.pth",
    "deit_base_distilled_patch16_384": _FACEBOOK + "deit_base_distilled_patch16_384-d0272ac0.pth",
    **dict.fromkeys(("deepvit_24b", "deepvit_32b", "deepvit_s", "deepvit_l"), _DEEPVIT),
    **{
        f"cait_{name.lower()}": f"{_FACEBOOK}{name}.pth"
        for name in (
            *("XXS24_224", "XXS24_384", "XXS36_224", "XXS36_384", "XS24_384"),
            *("S24_224", "S24_384", "S36_384", "M36_384", "M48_448"),
        )
    },
    **{f"twins_pcpvt_{size}": f"hf-hub:timm/twins_pcpvt_{size}.in1k" for size in ("small", "base", "large")},
    "cvt_13": "hf-hub:microsoft/cvt-13",
    "cvt_21": "hf-hub:microsoft/cvt-21",
    "cvt_13_384": "hf-hub:microsoft/cvt-13-384",
    "cvt_21_384": "hf-hub:microsoft/cvt-21-384",
    "cvt_w24_384": "hf-hub:microsoft/cvt-w24-384-22k",
    **dict.fromkeys(("ceit_tiny", "ceit_small", "ceit_base", "ceit_tiny_384", "ceit_small_384"), _CEIT),
}
