"""The last block of other libraries' models computes the tokens that the head reads, until somebody could see more."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from fastvit.patching import patch, unpatch
from tests.helpers import assert_as_accurate, on_pooled_draws
from tests.patching.test_blocks import MEDDLING, needs_cpp
from tests.patching.test_last_block import tokens_of
from tests.tiny import shake

pytestmark = needs_cpp
WIDTH, HEADS, SIZE = 48, 4, 32


def _timm(module: str, cls: str, **options: Any) -> nn.Module:
    library = pytest.importorskip(f"timm.models.{module}")
    sizes = {"img_size": SIZE, "patch_size": 8, "embed_dim": WIDTH, "num_heads": HEADS, "depth": 2, "num_classes": 5}
    return getattr(library, cls)(**sizes, **options)


def _torchvision() -> nn.Module:
    library = pytest.importorskip("torchvision.models.vision_transformer")
    return library.VisionTransformer(SIZE, 8, 2, HEADS, WIDTH, 2 * WIDTH, num_classes=5)


def _vit_pytorch() -> nn.Module:
    library = pytest.importorskip("vit_pytorch.vit")
    sizes = {"dim": WIDTH, "depth": 2, "heads": HEADS, "dim_head": 12, "mlp_dim": 2 * WIDTH, "num_classes": 5}
    return library.ViT(image_size=SIZE, patch_size=8, **sizes)


MODELS: dict[str, tuple[Callable[[], nn.Module], int, tuple[str, ...]]] = {
    "timm": (lambda: _timm("vision_transformer", "VisionTransformer"), 1, ("blocks.1", "blocks", "norm")),
    "timm registers": (
        lambda: _timm("vision_transformer", "VisionTransformer", reg_tokens=2, init_values=0.5, qkv_bias=False),
        1,
        ("blocks.1", "norm"),
    ),
    "timm distilled": (lambda: _timm("deit", "VisionTransformerDistilled"), 2, ("blocks.1", "blocks", "norm")),
    "torchvision": (
        _torchvision,
        1,
        ("encoder.layers.encoder_layer_1", "encoder.layers", "encoder.ln", "encoder"),
    ),
    "vit_pytorch": (_vit_pytorch, 1, ("transformer", "transformer.norm")),
}
"""How it is built, how many tokens its head reads, and what sees the tokens of the last block."""


def build(name: str) -> nn.Module:
    return shake(MODELS[name][0]()).eval()


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, SIZE, SIZE)


@pytest.mark.parametrize("name", MODELS)
def test_only_the_tokens_that_the_head_reads(name):
    model, count = build(name), MODELS[name][1]
    x, tokens = images(), 17 + (1 if "distilled" in name else 2 if "registers" in name else 0)
    seen = [("mlp", tokens), ("mlp", count)]
    assert tokens_of(patch(model), x) == seen
    for part in MODELS[name][2]:
        shapes: list[Any] = []
        handle = model.get_submodule(part).register_forward_hook(lambda *args, to=shapes: to.append(args[2].shape[1]))
        assert tokens_of(model, x)[-1:] != seen[-1:]
        assert shapes == [tokens], part
        handle.remove()
        assert tokens_of(model, x) == seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_results(name, dtype):
    def check() -> None:
        model, x = build(name).to(dtype), images(3).to(dtype)
        fused, exact = patch(copy.deepcopy(model)), copy.deepcopy(model).double()
        assert_as_accurate(fused(x), model(x), exact(x.double()))

    with torch.no_grad():
        on_pooled_draws(check)


@pytest.mark.parametrize("kind", MEDDLING)
@pytest.mark.parametrize("name", MODELS)
def test_whoever_meddles_is_heard(name, kind):
    model, x = build(name), images()
    for part in MODELS[name][2]:
        logs: tuple[list[str], list[str]] = ([], [])
        plain, fused = copy.deepcopy(model), patch(copy.deepcopy(model))
        MEDDLING[kind](plain, part, logs[0])
        MEDDLING[kind](fused, part, logs[1])
        with torch.no_grad():
            torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-4, msg=part)
        assert logs[0] == logs[1], part


def shape_of(output: Any) -> torch.Size:
    return (output[0] if isinstance(output, tuple) else output).shape


@pytest.mark.parametrize("name", MODELS)
def test_hooks_for_all_modules_see_all_tokens(name):
    model, x = build(name), images()
    heard = []
    for each in (model, patch(copy.deepcopy(model))):
        seen: list[Any] = []
        handle = register_module_forward_hook(
            lambda module, args, output, to=seen: to.append(
                output[0].shape if isinstance(output, tuple) else output.shape
            )
        )
        try:
            with torch.no_grad():
                each(x)
        finally:
            handle.remove()
        heard.append(seen)
    assert heard[0] == heard[1]


@pytest.mark.parametrize("step", ["forward_features", "forward_head", "pool"])
@pytest.mark.parametrize("where", ["subclass", "class", "instance"])
@pytest.mark.parametrize("name", ["timm", "timm distilled"])
def test_steps_of_somebody_elses_are_taken(name, where, step, monkeypatch):
    model, x = build(name), images()
    before, shapes = getattr(type(model), step), []

    def own(self, x, *args, **kwargs):
        out = before(self, x, *args, **kwargs)
        shapes.append((x.shape, out.shape))
        return out

    plain = type(model)
    fused = patch(model) if where != "subclass" else model
    if where == "class":
        monkeypatch.setattr(plain, step, own)
    elif where == "instance":
        setattr(fused, step, own.__get__(fused))
    else:
        model.__class__ = type("Own", (plain,), {step: own})
        fused = patch(model)
    with torch.no_grad():
        got, seen = fused(x), list(shapes)
        shapes.clear()
        expected = unpatch(copy.deepcopy(fused))(x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert seen == shapes


def test_features_and_other_pools_are_of_all_tokens():
    model, x = build("timm"), images()
    fused = patch(copy.deepcopy(model))
    with torch.no_grad():
        torch.testing.assert_close(fused.forward_features(x), model.forward_features(x), rtol=1e-4, atol=1e-4)
        found = (each.forward_intermediates(x, norm=True) for each in (fused, model))
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
        for each in (fused, model):
            each.reset_classifier(5, global_pool="avg")
            nn.init.constant_(each.head.weight, 0.01)
            nn.init.zeros_(each.head.bias)
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)
        assert tokens_of(fused, x)[-1] == ("mlp", 17)
        mask = torch.ones(17, 17, dtype=torch.bool).tril()
        torch.testing.assert_close(fused(x, attn_mask=mask), model(x, attn_mask=mask), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_compiled_whole(name):
    model, x = build(name), images()
    expected = model(x)
    torch._dynamo.reset()
    run = torch.compile(patch(model), backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(run(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_another_model_called_within_computes_all_tokens(name):
    """What is asked of one model's last block is asked of no other's."""
    model, other = patch(build(name)), patch(build(name))
    seen: list[int] = []
    part = MODELS[name][2][0]

    class Norm(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            block = other.get_submodule(part)
            tokens = torch.randn(1, 9, WIDTH)
            seen.append(block(tokens).shape[1])
            return super().forward(x)

    first = model.get_submodule("transformer.layers.0.0.norm" if name == "vit_pytorch" else part)
    for child in first.modules():
        if type(child) in (nn.LayerNorm,) or type(child).__name__ == "LayerNorm":
            child.__class__ = Norm
            break
    else:
        pytest.fail("no norm")
    with torch.no_grad():
        model(images())
    assert seen and set(seen) == {9}


@pytest.mark.parametrize("name", ["timm", "torchvision"])
def test_a_block_that_stands_twice_computes_all_tokens(name):
    """As where layers share their weights: only what the last of them gives is read by the head alone."""
    model, x = build(name), images()
    holder = model.blocks if name == "timm" else model.encoder.layers
    holder[0] = holder[1]
    fused = patch(copy.deepcopy(model))
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)


def test_an_encoder_of_ones_own_is_given_all_tokens(monkeypatch):
    """One that looks at them, by no other names than torchvision's uses."""
    library = pytest.importorskip("torchvision.models.vision_transformer")
    monkeypatch.setattr("fastvit.patching.rows.ends._heads", {})
    model, x = build("torchvision"), images()
    model.encoder.__class__ = type("Own", (library.Encoder,), {"forward": _encode})
    with torch.no_grad():
        torch.testing.assert_close(patch(copy.deepcopy(model))(x), model(x), rtol=1e-4, atol=1e-4)


def _encode(self, input):  # noqa: A002 (torchvision's name)
    out = self.layers(self.dropout(input + self.pos_embedding))
    torch._assert(out.shape == input.shape, "some tokens are missing")
    return self.ln(out)


def test_a_transformer_called_twice_computes_all_tokens():
    model, x = build("vit_pytorch"), images()
    model.dropout = nn.Sequential(model.transformer)
    fused = patch(copy.deepcopy(model))
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("step", ["pool", "forward_head"])
def test_steps_replaced_before_the_model_was_ever_seen_are_taken(step, monkeypatch):
    """What replaces them uses no other names than theirs, and reads every token."""
    plain = type(build("timm"))
    before = getattr(plain, step)

    def of_all(self, x, *args):
        return before(self, x, *args) + x.mean(1).mean()

    def of_the_mean(self, x, *args):
        return x.mean(1) if step == "pool" else self.head(self.fc_norm(x.mean(dim=1)))

    for own in (of_all, of_the_mean):
        monkeypatch.setattr("fastvit.patching.rows.ends._heads", {})
        monkeypatch.setattr(plain, step, own)
        model, x = build("timm"), images()
        fused = patch(copy.deepcopy(model))
        with torch.no_grad():
            torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)
