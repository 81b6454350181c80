"""What all families offer alike: features, heads, masks, checkpointing, intermediates, names, answers to bad use."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastvit.reference import (
    CPVT,
    VARIANTS,
    CaiT,
    CeiT,
    CvT,
    DeepViT,
    DeiT,
    TwinsPCPVT,
    VisionModel,
    ViT,
    base,
    create_model,
    find_variant,
    list_models,
)
from tests.reference.parity import assert_same, randomise

PLAIN = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 5}
TWINS = {
    "img_size": 64,
    "embed_dim": (8, 16, 24, 32),
    "depth": (1, 2, 1, 1),
    "num_heads": (1, 2, 3, 4),
    "num_classes": 5,
}
CVT = {"img_size": 32, "embed_dim": (8, 16, 32), "depth": (1, 2, 2), "num_heads": (1, 2, 4), "num_classes": 5}
FAMILIES = {
    "vit": (ViT, PLAIN),
    "vit_gap": (ViT, {**PLAIN, "pool": "gap"}),
    "vit_avg": (ViT, {**PLAIN, "pool": "avg"}),
    "deit": (DeiT, PLAIN),
    "deit_distilled": (DeiT, {**PLAIN, "distilled": True}),
    "deepvit": (DeepViT, {**PLAIN, "transformed_blocks": 2}),
    "deepvit_cnn": (DeepViT, {**PLAIN, "stem": "cnn", "scale_adjustment": 0.5}),
    "cait": (CaiT, PLAIN),
    "cpvt": (CPVT, PLAIN),
    "cpvt_gap": (CPVT, {**PLAIN, "pool": "gap", "num_pegs": 2}),
    "twins": (TwinsPCPVT, TWINS),
    "cvt": (CvT, CVT),
    "ceit": (CeiT, {**PLAIN, "patch_size": 8}),
}
ISOTROPIC = [name for name in FAMILIES if name not in ("twins", "cvt")]
FIXED_SIZE = ["vit", "deit", "deepvit", "cait", "ceit"]
COMPILED = ["vit", "deit_distilled", "deepvit_cnn", "cait", "cpvt", "twins", "cvt", "ceit"]


def build(family: str, **options) -> VisionModel:
    cls, config = FAMILIES[family]
    return randomise(cls(**{**config, **options}))


def images(model: VisionModel, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, *model.img_size)


def patches(model: VisionModel) -> int:
    """How many tokens a mask is laid over."""
    height, width = model.img_size
    return (height // model.patch_size[0]) * (width // model.patch_size[1])


every_family = pytest.mark.parametrize("family", FAMILIES)


class TestFeatures:
    @every_family
    def test_forward_is_features_and_head(self, family):
        model = build(family).eval()
        x = images(model)
        tokens = model.forward_features(x)
        assert tokens.dim() == 3 and tokens.shape[2] == model.num_features
        assert torch.equal(model(x), model.forward_head(tokens))
        features = model.forward_head(tokens, pre_logits=True)
        assert features.shape == (2, model.num_features)
        if family != "deit_distilled":  # the mean of two tokens' features through neither head gives the logits
            assert_same(model.head(features), model(x))

    @every_family
    def test_prefix_tokens(self, family):
        model = build(family).eval()
        tokens = model.forward_features(images(model))
        _, (last,) = model.forward_intermediates(images(model), 1, output_fmt="NLC")
        assert tokens.shape[1] == model.num_prefix_tokens + last.shape[1]

    @every_family
    @pytest.mark.parametrize("batch", [0, 1])
    def test_small_batches_keep_their_axis(self, family, batch):
        model = build(family).eval()
        assert model(images(model, batch)).shape == (batch, 5)

    @every_family
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_other_dtypes(self, family, dtype):
        model = build(family).eval()
        x = images(model)
        expected = model.double()(x.double())
        actual = model.to(dtype)(x.to(dtype))
        assert actual.dtype == dtype
        assert_same(actual.double(), expected, 1e-12 if dtype == torch.float64 else 0.2)

    @every_family
    def test_autocast(self, family):
        model = build(family)
        x, mask = images(model), torch.rand(2, patches(model)) > 0.3
        expected = model.eval()(x, mask)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_same(model(x, mask).float(), expected, 0.2)
            out = model.train()(x, mask)
        (torch.stack(out) if isinstance(out, tuple) else out).float().square().sum().backward()
        used = [p.grad for p in model.parameters() if p.grad is not None]
        assert used and all(gradient.isfinite().all() for gradient in used)

    @every_family
    def test_other_channels(self, family):
        model = build(family, in_chans=1).eval()
        assert model(torch.randn(2, 1, *model.img_size)).shape == (2, 5)

    @every_family
    def test_deep_copy_and_state_dict(self, family):
        model = build(family).eval()
        x = images(model)
        assert torch.equal(copy.deepcopy(model)(x), model(x))
        other = build(family).eval()
        other.load_state_dict(model.state_dict(), strict=True)
        assert torch.equal(other(x), model(x))

    @pytest.mark.parametrize("family", COMPILED)
    def test_compiles_to_one_graph(self, family):
        torch._dynamo.reset()
        # Of the fewest blocks that have every kind: tracing takes seconds for each.
        depth = {"cvt": (1, 1, 1), "twins": (1, 1, 1, 1)}.get(family, 2)
        model = build(family, depth=depth).eval()
        x, mask = images(model), torch.rand(2, patches(model)) > 0.3
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert_same(compiled(x, mask), model(x, mask), 1e-6)


class TestHead:
    @every_family
    def test_reset(self, family):
        model = build(family).double().eval()
        x = images(model).double()
        model.reset_classifier(9)
        assert model.num_classes == 9 and model(x).shape == (2, 9) and model(x).dtype == torch.float64
        model.reset_classifier(0)
        assert model.num_classes == 0 and torch.equal(model(x), model.forward_head(model.forward_features(x), True))

    @every_family
    def test_no_classes_from_the_start(self, family):
        model = build(family, num_classes=0)
        assert not any(name.startswith("head") for name in model.state_dict())
        assert model.eval()(images(model)).shape == (2, model.num_features)

    @every_family
    def test_get(self, family):
        model = build(family)
        head = model.get_classifier()
        assert all(isinstance(part, nn.Linear) for part in (head if isinstance(head, tuple) else (head,)))

    @every_family
    def test_negative(self, family):
        model = build(family)
        before = model.state_dict().keys()
        with pytest.raises(ValueError, match="num_classes: expected .*got -1"):
            model.reset_classifier(-1)
        assert model.num_classes == 5 and model.state_dict().keys() == before


class TestTraining:
    @every_family
    def test_no_weight_decay_names_parameters(self, family):
        model = build(family)
        names = model.no_weight_decay()
        assert names <= {name for name, _ in model.named_parameters()}
        assert bool(names) != (family == "cpvt_gap") or any("pos_block" in name for name in names)

    @every_family
    def test_checkpointing_changes_nothing(self, family):
        """Loss, every gradient, and the BatchNorms' statistics, which see a recomputed block once."""
        model = build(family).double()
        x, mask = images(model).double(), torch.rand(2, patches(model)) > 0.3
        plain = copy.deepcopy(model)
        model.set_grad_checkpointing()
        for side in (model, plain):
            out = side(x, mask)
            (torch.stack(out) if isinstance(out, tuple) else out).square().sum().backward()
        gradients = {name: p.grad for name, p in plain.named_parameters()}
        for name, parameter in model.named_parameters():
            assert (parameter.grad is None) == (gradients[name] is None)
            if parameter.grad is not None:
                assert torch.equal(parameter.grad, gradients[name]), name
        for name, buffer in plain.named_buffers():
            assert torch.equal(model.get_buffer(name), buffer), name

    def test_checkpointing_recomputes(self):
        model, calls = build("vit"), []
        model.blocks[1].register_forward_pre_hook(lambda *_: calls.append(1))
        model.set_grad_checkpointing()
        model(images(model)).sum().backward()
        assert len(calls) == 2
        model.set_grad_checkpointing(False)
        model(images(model)).sum().backward()
        assert len(calls) == 3
        model.set_grad_checkpointing()
        model.eval()(images(model)).sum().backward()
        assert len(calls) == 4

    @every_family
    def test_rates_reach_the_layers(self, family):
        model = build(family, drop_rate=0.1, attn_drop_rate=0.2, drop_path_rate=0.3)
        rates = {m.p for m in model.modules() if isinstance(m, nn.Dropout)}
        assert {0.1, 0.2} <= rates <= {0.0, 0.1, 0.2}
        assert max(m.drop_prob for m in model.modules() if hasattr(m, "drop_prob")) == pytest.approx(0.3)
        x = images(model)
        first, second = model.train()(x), model(x)
        pair = isinstance(first, tuple)
        assert not torch.allclose(first[0] if pair else first, second[0] if pair else second)
        assert torch.equal(model.eval()(x), model(x))


class TestIntermediates:
    @every_family
    def test_formats_agree(self, family):
        model = build(family).eval()
        x = images(model)
        final, maps = model.forward_intermediates(x)
        assert_same(final, model.forward_features(x), 1e-6)
        _, tokens = model.forward_intermediates(x, output_fmt="NLC")
        blocks = sum(model.depths) if hasattr(model, "depths") else len(model.blocks)
        assert len(maps) == len(tokens) == blocks
        for image, sequence in zip(maps, tokens, strict=True):
            assert torch.equal(image.flatten(2).transpose(1, 2), sequence)

    @every_family
    def test_indices(self, family):
        model = build(family).eval()
        x = images(model)
        every = model.forward_intermediates(x, intermediates_only=True)
        for indices, expected in ((2, every[-2:]), ([0, -1], [every[0], every[-1]]), ([1], every[1:2])):
            chosen = model.forward_intermediates(x, indices, intermediates_only=True)
            assert len(chosen) == len(expected)
            assert all(torch.equal(a, b) for a, b in zip(chosen, expected, strict=True))

    @every_family
    def test_norm_of_the_last_block_is_the_final_feature(self, family):
        model = build(family).eval()
        x = images(model)
        final, ((patch_tokens, prefix),) = model.forward_intermediates(
            x, 1, norm=True, output_fmt="NLC", return_prefix_tokens=True
        )
        assert_same(patch_tokens, final[:, model.num_prefix_tokens :])
        if family not in ("cait", "ceit"):  # whose class token is finished behind the blocks
            assert torch.equal(torch.cat((prefix, patch_tokens), dim=1), final)

    @every_family
    def test_stop_early(self, family):
        model = build(family).eval()
        x, calls = images(model), []
        last = (model.stages[-1].blocks if family == "cvt" else model.blocks)[-1]
        last = last[-1] if isinstance(last, nn.ModuleList) else last
        last.register_forward_hook(lambda *_: calls.append(1))
        whole = model.forward_intermediates(x, [0], intermediates_only=True)
        assert calls == [1]
        early = model.forward_intermediates(x, [0], intermediates_only=True, stop_early=True)
        assert calls == [1] and torch.equal(whole[0], early[0])

    @every_family
    def test_masked(self, family):
        model = build(family).eval()
        x, mask = images(model), torch.rand(2, patches(model)) > 0.3
        final, _ = model.forward_intermediates(x, mask=mask)
        assert_same(final, model.forward_features(x, mask), 1e-6)

    @every_family
    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"output_fmt": "NHWC"}, "output_fmt: expected 'NCHW' or 'NLC', got 'NHWC'"),
            ({"stop_early": True}, "stop_early: needs intermediates_only=True"),
            ({"indices": 0}, "indices: expected .*got 0"),
            ({"indices": 99}, "indices: expected .*got 99"),
            ({"indices": [99]}, r"indices: expected .*got \(99,\)"),
            ({"indices": []}, r"indices: expected .*got \(\)"),
        ],
    )
    def test_bad_arguments(self, family, arguments, words):
        model = build(family)
        with pytest.raises(ValueError, match=words):
            model.forward_intermediates(images(model), **arguments)


class TestMasks:
    @every_family
    def test_nothing_masked_is_no_mask(self, family):
        model = build(family).eval()
        x, count = images(model), patches(model)
        for shape in ((2, count), (2, count, count)):
            assert_same(model(x, torch.ones(shape, dtype=torch.bool)), model(x), 1e-5)

    @every_family
    def test_masked_keys_matter(self, family):
        model = build(family).eval()
        x, mask = images(model), torch.ones(2, patches(model), dtype=torch.bool)
        mask[0, : patches(model) // 2] = False
        out, plain = model(x, mask), model(x)
        assert not torch.allclose(out[0], plain[0]) and torch.allclose(out[1], plain[1], atol=1e-5)

    @every_family
    def test_all_masked_is_finite(self, family):
        model = build(family)
        x, mask = images(model), torch.zeros(2, patches(model), dtype=torch.bool)
        out = model(x, mask)
        (torch.stack(out) if isinstance(out, tuple) else out).sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())

    @every_family
    def test_bad_masks(self, family):
        model = build(family)
        x, count = images(model), patches(model)
        with pytest.raises(TypeError, match=r"mask: expected dtype torch\.bool \(True = attend\), got torch\.float32"):
            model(x, torch.ones(2, count))
        for shape in ((2, count + 3), (2, count, count + 1), (count,), (2, 1, 1, count)):
            with pytest.raises(ValueError, match="mask: expected shape .*, got"):
                model(x, torch.ones(shape, dtype=torch.bool))
        with pytest.raises(ValueError, match=r"mask: expected .*got .*3"):
            model(x, torch.ones(3, count, dtype=torch.bool))


class TestImages:
    @pytest.mark.parametrize("family", FIXED_SIZE)
    def test_size_must_be_the_position_embeddings(self, family):
        model = build(family).eval()
        with pytest.raises(ValueError, match=r"x: expected images of \(32, 32\), .*, got \(48, 32\)"):
            model(torch.randn(2, 3, 48, 32))
        model.set_input_size((48, 32))
        assert model(torch.randn(2, 3, 48, 32)).shape == (2, 5)

    @pytest.mark.parametrize("family", ISOTROPIC)
    def test_patches_must_divide_the_image(self, family):
        model = build(family)
        with pytest.raises(ValueError, match=r"x: image size \(36, 32\) is not divisible by patch_size"):
            model(torch.randn(2, 3, 36, 32))
        with pytest.raises(ValueError, match=r"img_size: image size \(36, 32\)"):
            model.set_input_size((36, 32))
        assert model.img_size == (32, 32) and model(images(model)) is not None

    @pytest.mark.parametrize("family", ISOTROPIC)
    def test_channels(self, family):
        model = build(family)
        for shape in ((2, 1, 32, 32), (3, 32, 32)):
            with pytest.raises(ValueError, match=r"x: expected shape \(batch, 3, height, width\), got"):
                model(torch.randn(shape))


class TestRegistry:
    def test_patterns(self):
        assert list_models() == list(VARIANTS)
        assert list_models("cait_*_384") == [
            "cait_xxs24_384",
            "cait_xxs36_384",
            "cait_xs24_384",
            "cait_s24_384",
            "cait_s36_384",
            "cait_m36_384",
        ]
        assert list_models("resnet*") == []

    @pytest.mark.parametrize(
        ("wrong", "nearest"),
        [
            ("deepvit_small", "deepvit_s"),
            ("vit_base_patch16", "vit_base_patch16_224"),
            ("CaiT_S24_224", "cait_s24_224"),
            ("cvt13", "cvt_13"),
        ],
    )
    def test_unknown_name_suggests_the_nearest(self, wrong, nearest):
        with pytest.raises(ValueError, match=f"unknown model '{wrong}'; did you mean .*{nearest}"):
            create_model(wrong)

    def test_nothing_near(self):
        with pytest.raises(ValueError, match="unknown model 'fastvit_t8'; Apple's FastViT, a model, shares no more"):
            create_model("fastvit_t8")
        with pytest.raises(ValueError, match=r"unknown model 'zzzz' \(fastvit.list_models\(\) names all"):
            find_variant("zzzz")

    @pytest.mark.parametrize("rate", ["drop_rate", "attn_drop_rate", "drop_path_rate"])
    @pytest.mark.parametrize("value", [-0.1, 1.0])
    def test_rates_are_probabilities(self, rate, value):
        with pytest.raises(ValueError, match=f"{rate}: expected .*got {value}"):
            create_model("vit_tiny_patch16_224", **{rate: value})

    def test_unknown_option(self):
        with pytest.raises(TypeError, match="shifted_windows"):
            create_model("vit_tiny_patch16_224", shifted_windows=True)

    def test_overrides(self):
        model = create_model(
            "vit_tiny_patch16_224",
            num_classes=7,
            img_size=(32, 64),
            in_chans=1,
            pool="gap",
            depth=1,
            drop_path_rate=0.1,
            act="gelu_tanh",
        )
        assert model.img_size == (32, 64) and model.pool == "gap" and len(model.blocks) == 1
        assert model.default_cfg["input_size"] == (1, 32, 64)
        assert model(torch.randn(2, 1, 32, 64)).shape == (2, 7)
        model.set_input_size(48)
        assert model.default_cfg["input_size"] == (1, 48, 48)
        assert create_model("vit_tiny_patch16_224", depth=1).default_cfg["input_size"] == (3, 224, 224)

    @pytest.mark.parametrize("size", [0, -16, 224.0, (224,), (16, 16, 16), "224"])
    def test_bad_image_sizes(self, size):
        with pytest.raises(ValueError, match="img_size: expected"):
            create_model("vit_tiny_patch16_224", img_size=size)


class TestHooks:
    def test_run_once_behind_the_outermost_init(self, monkeypatch):
        seen = []
        monkeypatch.setattr(base, "on_build", [lambda model: seen.append((model, hasattr(model, "added")))])

        class Mine(ViT):
            def __init__(self):
                super().__init__(**PLAIN)
                self.added = True

        model = Mine()
        assert seen == [(model, True)]
