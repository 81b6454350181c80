"""Models that take images of values 0..255: as accurate as normalising in front, exactly undone, all else as before."""

from __future__ import annotations

import copy
import io
import pickle
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fastvit
from fastvit import backends
from fastvit.patching.normalization import NormalizingConv2d
from tests.helpers import assert_as_accurate
from tests.patching.fused_and_plain import Logits, exactly
from tests.tiny import FAMILIES, build, shake
from tests.tiny import images as images_of

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZES = {"image_size": 32, "patch_size": 8, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def _transformers(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    if name == "cvt":
        config = transformers.CvtConfig(embed_dim=[16, 32, 48], depth=[1, 2, 3], num_heads=[1, 2, 3], num_labels=7)
        return shake(Logits(transformers.CvtForImageClassification(config))).eval()
    family = {"vit": "ViT", "deit": "DeiT"}[name]
    config = getattr(transformers, f"{family}Config")(**SIZES, intermediate_size=96, num_labels=7)
    return shake(Logits(getattr(transformers, f"{family}ForImageClassification")(config))).eval()


def _torchvision() -> nn.Module:
    vision_transformer = pytest.importorskip("torchvision.models.vision_transformer")
    return shake(vision_transformer.VisionTransformer(32, 8, 2, 4, 48, 96, num_classes=7)).eval()


def _cnn_stem() -> nn.Module:
    model = fastvit.reference.DeepViT(img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=4, stem="cnn")
    return shake(model).eval()


MODELS: dict[str, Callable[[], nn.Module]] = {
    **{name: lambda name=name: build(name).eval() for name in (*FAMILIES, "timm_vit", "timm_deit_distilled")},
    **{name: lambda name=name: build(name).eval() for name in ("timm_cait", "timm_twins")},
    "deepvit_cnn": _cnn_stem,
    "transformers_vit": lambda: _transformers("vit"),
    "transformers_deit": lambda: _transformers("deit"),
    "transformers_cvt": lambda: _transformers("cvt"),
    "torchvision": _torchvision,
}


def pixels(name: str, kind: str = "noise", batch: int = 2) -> Tensor:
    """uint8 images of the size that a model takes."""
    name = "cvt" if name == "transformers_cvt" else name
    size = images_of(name).shape[-2:] if name in FAMILIES or name.startswith("timm") else (32, 32)
    generator = torch.Generator().manual_seed(0)
    if kind == "noise":
        return torch.randint(0, 256, (batch, 3, *size), generator=generator, dtype=torch.uint8)
    if kind == "mean":  # where the sums over patches are next to nothing
        return (
            torch.tensor([round(255 * mean) for mean in MEAN], dtype=torch.uint8).view(1, 3, 1, 1).repeat(2, 1, *size)
        )
    return torch.full((batch, 3, *size), {"black": 0, "white": 255}[kind], dtype=torch.uint8)


def normalized(images: Tensor, dtype: torch.dtype) -> Tensor:
    """The two-step form: the image in 0..1 less the mean, over the deviation."""
    mean, std = (torch.tensor(values, dtype=dtype).view(3, 1, 1) for values in (MEAN, STD))
    return (images.to(dtype) / 255 - mean) / std


def check(model: nn.Module, images: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """On images as they are, beside the plain one behind a normalisation."""
    model = model.to(dtype)
    plain = fastvit.unpatch(copy.deepcopy(model))
    with torch.no_grad():
        exact = exactly(plain)(normalized(images, torch.float64))
        assert_as_accurate(model(images), plain(normalized(images, dtype)), exact)


@pytest.fixture(autouse=True)
def _own_products(monkeypatch):
    if not backends.cpp_reasons():
        monkeypatch.setattr(sys.modules["fastvit.ops.linear"], "CPP_MIN_ROWS", 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("patched", [False, True], ids=["plain", "patched"])
@pytest.mark.parametrize("name", MODELS)
def test_takes_pixels(name, patched, dtype):
    model = fastvit.unpatch(MODELS[name]())
    if patched:
        fastvit.patch(model)
    before = model.state_dict()
    fastvit.fold_normalization(model, MEAN, STD)
    for images in (pixels(name), pixels(name).contiguous(memory_format=torch.channels_last)):
        check(model, images, dtype)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(after[key] is before[key] or torch.equal(after[key], before[key].to(after[key].dtype)) for key in after)


@pytest.mark.parametrize("kind", ["mean", "black", "white"])
@pytest.mark.parametrize("name", ["vit", "cvt", "ceit", "timm_vit"])
def test_even_images(name, kind):
    """Of the mean's colour, sums cancel; at the border of overlapping patches the padding is the mean."""
    model = MODELS[name]()
    fastvit.fold_normalization(model, MEAN, STD)
    check(model, pixels(name, kind))


@pytest.mark.parametrize("name", ["vit", "cvt", "timm_vit", "torchvision"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_floating_images(name, dtype):
    model = MODELS[name]()
    fastvit.fold_normalization(model, MEAN, STD)
    images = pixels(name)
    with torch.no_grad():
        assert torch.equal(model(images.to(dtype)), model(images))  # 0..255 are exact in each


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("undo", ["handle", "context", "unpatch"])
def test_undone_exactly(name, undo):
    model = fastvit.unpatch(MODELS[name]())
    x, kinds = normalized(pixels(name), torch.float32), [type(module) for module in model.modules()]
    attributes = [set(vars(module)) for module in model.modules()]
    with torch.no_grad():
        expected = model(x)
        if undo == "context":
            with fastvit.fold_normalization(model, MEAN, STD):
                assert not torch.equal(model(x), expected)
        else:
            handle = fastvit.fold_normalization(model, MEAN, STD)
            assert not torch.equal(model(x), expected)
            handle.remove() if undo == "handle" else fastvit.unpatch(model)
        assert torch.equal(model(x), expected)
    assert [type(module) for module in model.modules()] == kinds
    assert [set(vars(module)) for module in model.modules()] == attributes
    if undo == "handle":
        handle.remove()  # once more is nothing


@pytest.mark.parametrize("name", ["vit", "ceit", "timm_vit"])
def test_patching_leaves_it(name):
    model = fastvit.unpatch(MODELS[name]())
    handle = fastvit.fold_normalization(model, MEAN, STD)
    assert not fastvit.is_patched(model)
    with fastvit.patched(model):
        check(model, pixels(name))
    fastvit.patch(model, verify=pixels(name))
    check(model, pixels(name))
    handle.remove()
    assert fastvit.is_patched(model)
    assert not any(isinstance(module, NormalizingConv2d) for module in model.modules())


@pytest.mark.parametrize("name", ["vit", "cvt", "timm_vit"])
def test_copies_pickles_and_checkpoints(name):
    model = MODELS[name]()
    fastvit.fold_normalization(model, MEAN, STD)
    images = pixels(name)
    with torch.no_grad():
        expected = model(images)
        assert torch.equal(copy.deepcopy(model)(images), expected)
        assert torch.equal(pickle.loads(pickle.dumps(model))(images), expected)
        saved = io.BytesIO()
        torch.save(model.state_dict(), saved)
        saved.seek(0)
        other = MODELS[name]()
        for parameter in other.parameters():
            parameter.mul_(0.5)
        fastvit.fold_normalization(other, MEAN, STD)
        assert not torch.equal(other(images), expected)
        other.load_state_dict(torch.load(saved))  # after a call, whose folded weight must not stay
        assert torch.equal(other(images), expected)


@pytest.mark.parametrize("change", ["in place", "data", "parameter"])
def test_a_weight_that_changes_is_folded_anew(change):
    model, images = build("vit").eval(), pixels("vit")
    fastvit.fold_normalization(model, MEAN, STD)
    conv = model.patch_embed.proj
    with torch.no_grad():
        model(images)
        if change == "in place":
            conv.weight.mul_(1.5)
        elif change == "data":
            conv.weight.data = conv.weight.data * 1.5
        else:
            conv.weight = nn.Parameter(conv.weight * 1.5)
    check(model, images)


@pytest.mark.parametrize("name", ["vit", "cvt", "timm_vit"])
def test_trains(name):
    def gradients(dtype: torch.dtype, folded: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = fastvit.unpatch(MODELS[name]()).to(dtype).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if folded:
            fastvit.fold_normalization(model, MEAN, STD)
        out = model(pixels(name) if folded else normalized(pixels(name), dtype))
        conv = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
        return [out, *torch.autograd.grad(out.square().sum(), (conv.weight, conv.bias))]

    forms = ((torch.float32, True), (torch.float32, False), (torch.float64, False))
    for got, plain, exact in zip(*(gradients(*form) for form in forms), strict=True):
        assert_as_accurate(got, plain, exact)


def test_after_inference_mode_it_trains():
    """What was kept then must not be an inference tensor."""
    model, images = build("vit").eval(), pixels("vit")
    fastvit.fold_normalization(model, MEAN, STD)
    model.patch_embed.proj.requires_grad_(False)
    with torch.inference_mode():
        expected = model(images)
    floating = images.float().requires_grad_()
    out = model(floating)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert floating.grad.abs().max() > 0


def test_compiles_whole_and_exports():
    model, images = fastvit.unpatch(build("vit").eval()), pixels("vit")
    fastvit.fold_normalization(model, MEAN, STD)
    with torch.no_grad():
        expected = model(images)
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(images), expected)
        torch.testing.assert_close(torch.export.export(model, (images,)).module()(images), expected)


def test_the_folded_weight_is_made_once(monkeypatch):
    if backends.cpp_reasons():
        pytest.skip("; ".join(backends.cpp_reasons()))
    model, images = build("vit").eval(), pixels("vit")
    fastvit.fold_normalization(model, MEAN, STD)
    with torch.inference_mode():
        first = model.patch_embed.proj.normalization.scaled(model.patch_embed.proj.weight)
        model(images)
        assert model.patch_embed.proj.normalization.scaled(model.patch_embed.proj.weight) is first


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("name", ["vit", "timm_vit"])
def test_refuses_other_images(name, dtype):
    model = fastvit.patch(MODELS[name]())
    fastvit.fold_normalization(model, MEAN, STD)
    with (
        pytest.raises(ValueError, match=r"x: expected images of values 0\.\.255, uint8 or floating, got torch\."),
        torch.no_grad(),
    ):
        model(pixels(name).to(dtype))


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ((0.5, 0.5), STD, r"mean: expected 3 numbers from 0 to 1 .*got \(0.5, 0.5\)"),
        (0.5, STD, "mean: expected 3 numbers"),
        ((123.7, 116.3, 103.5), STD, "mean: expected 3 numbers from 0 to 1"),
        (("a", "b", "c"), STD, "mean: expected 3 numbers"),
        ((float("nan"), 0.5, 0.5), STD, "mean: expected 3 numbers"),
        (MEAN, (0.2, 0.0, 0.2), r"std: expected 3 numbers above 0, up to 1 .*got \(0.2, 0.0, 0.2\)"),
        (MEAN, (58.4, 57.1, 57.4), "std: expected 3 numbers above 0"),
        (MEAN, None, "std: expected 3 numbers above 0"),
    ],
)
def test_refuses_other_numbers(mean, std, message):
    model = build("vit")
    with pytest.raises(ValueError, match=message):
        fastvit.fold_normalization(model, mean, std)
    assert not any(isinstance(module, NormalizingConv2d) for module in model.modules())


def test_takes_tensors_for_mean_and_std():
    model = build("vit")
    fastvit.fold_normalization(model, torch.tensor(MEAN), list(STD))
    assert "mean=(0.48" in repr(model.patch_embed.proj)


def test_refuses_other_models():
    timm = pytest.importorskip("timm")
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got str"):
        fastvit.fold_normalization("vit", MEAN, STD)
    with pytest.raises(RuntimeError, match="model: no convolution of Sequential is known to read its image"):
        fastvit.fold_normalization(nn.Sequential(nn.Conv2d(3, 8, 3)), MEAN, STD)
    model = build("vit")
    model.patch_embed.proj.register_forward_hook(lambda *_: None)
    with pytest.raises(
        RuntimeError, match=r"model: expected a plain nn\.Conv2d without hooks at patch_embed\.proj, got Conv2d\("
    ):
        fastvit.fold_normalization(model, MEAN, STD)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 4}
    model = timm.models.vision_transformer.VisionTransformer(**sizes, dynamic_img_pad=True)
    with pytest.raises(RuntimeError, match="patch_embed pads images with zeros"):
        fastvit.fold_normalization(model, MEAN, STD)
    model = build("vit")
    fastvit.fold_normalization(model, MEAN, STD)
    with pytest.raises(RuntimeError, match=r"patch_embed\.proj normalises already, with Normalization\(mean=\(0\.485"):
        fastvit.fold_normalization(model, MEAN, STD)


def test_an_overridden_forward_is_not_known():
    class Scaled(fastvit.reference.layers.PatchEmbed):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x / 255)

    with pytest.raises(RuntimeError, match="no convolution of Sequential is known"):
        fastvit.fold_normalization(nn.Sequential(Scaled(8, 3, 48)), MEAN, STD)
