"""ViT against timm, transformers and torchvision with transferred weights, and its options against their meaning."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fastvit.reference.layers import resize_pos_embed
from fastvit.reference.vit import VARIANTS, ViT
from tests.reference.parity import assert_same, assert_same_gradients, randomise
from tests.reference.peers import (
    HUGGING_FACE,
    PLAIN,
    assert_padding_mask_equals_leaving_tokens_out,
    assert_pairwise_mask_cuts_influence,
    assert_step_equals_timm,
    hugging_face_state,
    images,
    timm_peer,
)

TIMM_POOL = {
    "token": {"global_pool": "token"},
    "avg": {"global_pool": "avg"},
    "mean": {"global_pool": "avg", "fc_norm": False},
    "gap": {"global_pool": "avg", "fc_norm": False, "class_token": False},
}


def vit(**options) -> ViT:
    return randomise(ViT(**{**PLAIN, **options}))


def timm_vit(model: ViT, **options) -> nn.Module:
    timm = pytest.importorskip("timm")
    return timm_peer(timm.models.vision_transformer.VisionTransformer(**{**PLAIN, **options}), model)


class TestAgainstTimm:
    @pytest.mark.parametrize("pool", TIMM_POOL)
    def test_pools(self, pool):
        model = vit(pool=pool)
        assert_step_equals_timm(model, timm_vit(model, **TIMM_POOL[pool]), images())

    def test_tanh_gelu(self):
        timm = pytest.importorskip("timm")
        model = vit(act="gelu_tanh")
        assert_step_equals_timm(model, timm_vit(model, act_layer=timm.layers.GELUTanh), images())
        assert not torch.allclose(model.eval()(images()), vit().eval()(images()))

    def test_without_qkv_bias(self):
        model = vit(qkv_bias=False, mlp_ratio=2.0)
        assert_step_equals_timm(model, timm_vit(model, qkv_bias=False, mlp_ratio=2.0), images())

    def test_dropout_and_stochastic_depth_in_the_same_places(self):
        model = vit(drop_rate=0.1, attn_drop_rate=0.2, drop_path_rate=0.3)
        rates = {"pos_drop_rate": 0.1, "proj_drop_rate": 0.1, "attn_drop_rate": 0.2, "drop_path_rate": 0.3}
        assert_step_equals_timm(model, timm_vit(model, **rates), images(8))

    def test_masks(self):
        model = vit().eval()
        peer = timm_vit(model).eval()
        x, allowed = images(), torch.rand(2, 25, 25) > 0.5
        seen = allowed.clone()
        seen[:, 0], seen[:, :, 0] = True, True
        assert_same(model(x, allowed), peer.forward_head(peer.forward_features(x, attn_mask=seen[:, None])))
        padding = torch.rand(2, 24) > 0.5
        seen = torch.cat((torch.ones(2, 1, dtype=torch.bool), padding), dim=1)[:, None, None].expand(2, 1, 25, 25)
        assert_same(model(x, padding), peer.forward_head(peer.forward_features(x, attn_mask=seen)))

    @pytest.mark.parametrize("norm", [False, True])
    @pytest.mark.parametrize("output_fmt", ["NCHW", "NLC"])
    @pytest.mark.parametrize("indices", [None, 2, [0, -1]])
    def test_intermediates(self, indices, output_fmt, norm):
        model = vit().eval()
        arguments = {"norm": norm, "output_fmt": output_fmt, "return_prefix_tokens": True}
        x = images()
        final, ours = model.forward_intermediates(x, indices, **arguments)
        expected, theirs = timm_vit(model).eval().forward_intermediates(x, indices, **arguments)
        assert_same(final, expected)
        assert len(ours) == len(theirs)
        for (grid, prefix), (their_grid, their_prefix) in zip(ours, theirs, strict=True):
            assert_same(grid, their_grid)
            assert_same(prefix, their_prefix)


class TestAgainstTransformers:
    def peer(self, model: ViT, **options) -> nn.Module:
        transformers = pytest.importorskip("transformers")
        config = transformers.ViTConfig(**{**HUGGING_FACE, **options}, attn_implementation="eager")
        peer = transformers.ViTForImageClassification(config)
        peer.load_state_dict(hugging_face_state(model.state_dict(), "vit", {"head": "classifier"}), strict=True)
        return peer

    @pytest.mark.parametrize("training", [False, True])
    def test_output_and_gradients(self, training):
        model = vit(norm_eps=1e-12).train(training)
        peer = self.peer(model, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train(training)
        x = images()
        ours, theirs = model(x), peer(x).logits
        assert_same(ours, theirs)
        (ours * torch.tensor([1.0, -2, 3, -4, 5])).sum().backward()
        (theirs * torch.tensor([1.0, -2, 3, -4, 5])).sum().backward()
        expected = hugging_face_state(
            {name: parameter.grad for name, parameter in model.named_parameters()}, "vit", {"head": "classifier"}
        )
        largest = max(float(g.abs().max()) for g in expected.values())
        for name, parameter in peer.named_parameters():
            size = max(float(parameter.grad.abs().max()), 1e-2 * largest)  # a key's bias has but rounding
            assert float((parameter.grad - expected[name]).abs().max()) <= 1e-5 * size, name

    def test_eps_matters(self):
        x = images() * 1e-3
        model = vit(norm_eps=1e-12)
        with torch.no_grad():  # tokens so alike that the variance is of the size of eps
            model.pos_embed.mul_(1e-3), model.cls_token.mul_(1e-3), model.patch_embed.proj.bias.mul_(1e-3)
        peer, other = self.peer(model).eval(), vit()
        other.load_state_dict(model.state_dict())
        assert_same(model.eval()(x), peer(x).logits)
        with pytest.raises(AssertionError, match="relative error"):
            assert_same(other.eval()(x), peer(x).logits)

    def test_other_image_size(self):
        model = vit(norm_eps=1e-12, img_size=32).eval()
        peer = self.peer(model, image_size=32).eval()  # transformers resizes square grids only
        x = torch.randn(2, 3, 64, 40)
        model.set_input_size((64, 40))
        assert_same(model(x), peer(x, interpolate_pos_encoding=True).logits)


@pytest.mark.parametrize("training", [False, True])
def test_against_torchvision(training):
    models = pytest.importorskip("torchvision").models
    model = vit(img_size=32).train(training)
    peer = models.VisionTransformer(32, 8, 3, 4, 48, 192, num_classes=5).train(training)
    outer = {
        "cls_token": "class_token",
        "pos_embed": "encoder.pos_embedding",
        "patch_embed.proj": "conv_proj",
        "norm": "encoder.ln",
        "head": "heads.head",
    }
    inner = {
        "norm1.": "ln_1.",
        "norm2.": "ln_2.",
        "attn.qkv.": "self_attention.in_proj_",
        "attn.proj.": "self_attention.out_proj.",
        "mlp.fc1.": "mlp.0.",
        "mlp.fc2.": "mlp.3.",
    }
    names = {}
    for name in model.state_dict():
        if name.startswith("blocks."):
            _, index, rest = name.split(".", 2)
            ours = next(start for start in inner if rest.startswith(start))
            names[name] = f"encoder.layers.encoder_layer_{index}.{inner[ours]}{rest.removeprefix(ours)}"
        else:
            module = name.removesuffix(".weight").removesuffix(".bias")
            names[name] = outer[module] + name.removeprefix(module)
    peer.load_state_dict({names[name]: value for name, value in model.state_dict().items()}, strict=True)
    x = torch.randn(2, 3, 32, 32)
    ours, theirs = model(x), peer(x)
    assert_same(ours, theirs)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    assert_same_gradients(model, peer, names)


class TestPositionEmbedding:
    def test_kinds(self):
        timm = pytest.importorskip("timm")
        ndimage = pytest.importorskip("scipy.ndimage")
        old = torch.randn(1, 1 + 49, 6)
        zoomed = ndimage.zoom(old[0, 1:].view(7, 7, 6).numpy(), (10 / 7, 12 / 7, 1), order=1)
        expected = {
            "bicubic": timm.layers.resample_abs_pos_embed(old, [10, 12], antialias=False),
            "bicubic_antialias": timm.layers.resample_abs_pos_embed(old, [10, 12], antialias=True),
            "bilinear_align_corners": torch.cat((old[:, :1], torch.from_numpy(zoomed).view(1, 120, 6)), dim=1),
        }
        for kind, resized in expected.items():
            assert_same(resize_pos_embed(old, (10, 12), kind=kind), resized)
        smaller = timm.layers.resample_abs_pos_embed(old, [4, 5], antialias=True)
        assert_same(resize_pos_embed(old, (4, 5), kind="bicubic_antialias"), smaller)
        assert not torch.allclose(resize_pos_embed(old, (4, 5)), smaller)

    @pytest.mark.parametrize("pool", ["token", "gap"])
    @pytest.mark.parametrize("kind", ["bicubic", "bicubic_antialias", "bilinear_align_corners"])
    def test_set_input_size(self, kind, pool):
        model = vit(pos_embed_resize=kind, pool=pool)
        old = model.pos_embed.detach().clone()
        model.set_input_size((64, 40))
        prefix = 1 if pool == "token" else 0
        expected = resize_pos_embed(old, (8, 5), prefix_tokens=prefix, old_grid=(4, 6), kind=kind)
        assert torch.equal(model.pos_embed, expected) and model.pos_embed.requires_grad
        assert model.img_size == (64, 40) and model.grid_size == (8, 5)
        assert model(torch.randn(2, 3, 64, 40)).shape == (2, 5)

    def test_resized_embedding_is_no_view_of_the_old(self):
        model = vit()
        old = model.pos_embed
        model.set_input_size((32, 48))
        with torch.no_grad():
            model.pos_embed.zero_()
        assert old.abs().max() > 0


class TestMasks:
    @pytest.mark.parametrize("pool", ["token", "gap"])
    def test_padding(self, pool):
        assert_padding_mask_equals_leaving_tokens_out(vit(pool=pool))

    @pytest.mark.parametrize("with_prefix", [False, True])
    def test_pairwise(self, with_prefix):
        assert_pairwise_mask_cuts_influence(vit(), with_prefix)

    def test_all_masked_without_class_token(self):
        """Rows without a key gather nothing: what is left of attention is its projection's bias, gradients finite."""
        model, mask = vit(pool="gap", depth=1), torch.zeros(2, 24, dtype=torch.bool)
        x = images()
        tokens = model.embed(x)
        tokens = tokens + model.blocks[0].attn.proj.bias
        expected = model.norm(tokens + model.blocks[0].mlp(model.blocks[0].norm2(tokens)))
        assert_same(model.forward_features(x, mask), expected)
        model(x, mask).sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())


class TestInitialisation:
    """As in google-research/vision_transformer: flax's initialisers."""

    @pytest.fixture
    def model(self):
        return ViT(embed_dim=256, depth=2, num_heads=4, img_size=64, num_classes=7)

    def test_head_and_class_token_are_zero(self, model):
        assert not model.head.weight.any() and not model.head.bias.any() and not model.cls_token.any()
        model.reset_classifier(9)
        assert model.head.weight.shape == (9, 256) and not model.head.weight.any()

    def test_matrices_are_xavier_uniform_each_of_q_k_v_by_itself(self, model):
        for block in model.blocks:
            matrices = [*block.attn.qkv.weight.chunk(3), block.attn.proj.weight, block.mlp.fc1.weight]
            for matrix in [*matrices, block.mlp.fc2.weight]:
                bound = math.sqrt(6 / sum(matrix.shape))
                assert 0.99 * bound < matrix.abs().max() <= bound
                assert matrix.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
            assert not block.attn.qkv.bias.any() and not block.attn.proj.bias.any()
            assert block.mlp.fc1.bias.std().item() == pytest.approx(1e-6, rel=0.15)
            assert block.mlp.fc2.bias.std().item() == pytest.approx(1e-6, rel=0.15)

    def test_patches_are_lecun_normal(self, model):
        weight = model.patch_embed.proj.weight
        assert weight.std().item() == pytest.approx((3 * 16 * 16) ** -0.5, rel=0.02)
        assert weight.abs().max() <= 2 / 0.8796 * (3 * 16 * 16) ** -0.5
        assert not model.patch_embed.proj.bias.any()

    def test_position_embedding(self, model):
        assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)


def test_image_preparation():
    assert all(variant.mean == (0.5, 0.5, 0.5) and variant.std == (0.5, 0.5, 0.5) for variant in VARIANTS.values())
    assert VARIANTS["vit_base_patch16_224"].crop_pct == 0.9 and VARIANTS["vit_base_patch16_384"].crop_pct == 1.0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pool": "max"}, r"pool: expected one of \('token', 'avg', 'mean', 'gap'\), got 'max'"),
        ({"act": "relu"}, "act: expected .*got 'relu'"),
        ({"pos_embed_resize": "nearest"}, "pos_embed_resize: expected .*got 'nearest'"),
        ({"img_size": 30}, r"img_size: image size \(30, 30\) is not divisible by patch_size \(8, 8\)"),
        ({"num_heads": 5}, "num_heads: 5 does not divide the width 48"),
        ({"num_classes": -1}, "num_classes: expected .*got -1"),
        ({"patch_size": (8, 8, 8)}, "patch_size: expected"),
    ],
)
def test_bad_arguments(options, words):
    with pytest.raises(ValueError, match=words):
        ViT(**{**PLAIN, **options})
