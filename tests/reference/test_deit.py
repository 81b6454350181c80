"""DeiT, distilled and not, against timm and transformers with transferred weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastvit.reference.deit import VARIANTS, DeiT
from fastvit.reference.layers import resize_pos_embed
from tests.reference.parity import assert_same, randomise
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

HUGGING_FACE_HEADS = {"head": "cls_classifier", "head_dist": "distillation_classifier"}


def deit(**options) -> DeiT:
    return randomise(DeiT(**{**PLAIN, **options}))


def timm_deit(model: DeiT, **options) -> nn.Module:
    timm = pytest.importorskip("timm")
    if not model.distilled:
        return timm_peer(timm.models.vision_transformer.VisionTransformer(**{**PLAIN, **options}), model)
    peer = timm.models.deit.VisionTransformerDistilled(**{**PLAIN, **options})
    peer.set_distilled_training(True)
    return timm_peer(peer, model)


class TestAgainstTimm:
    @pytest.mark.parametrize("distilled", [False, True])
    def test_output_and_gradients(self, distilled):
        model = deit(distilled=distilled)
        assert_step_equals_timm(model, timm_deit(model), images())

    @pytest.mark.parametrize("distilled", [False, True])
    def test_dropout_and_stochastic_depth_in_the_same_places(self, distilled):
        model = deit(distilled=distilled, drop_rate=0.1, attn_drop_rate=0.2, drop_path_rate=0.3)
        rates = {"pos_drop_rate": 0.1, "proj_drop_rate": 0.1, "attn_drop_rate": 0.2, "drop_path_rate": 0.3}
        assert_step_equals_timm(model, timm_deit(model, **rates), images(8))

    def test_intermediates_with_both_prefix_tokens(self):
        model, x = deit(distilled=True).eval(), images()
        final, ours = model.forward_intermediates(x, [1, 2], return_prefix_tokens=True)
        expected, theirs = timm_deit(model).eval().forward_intermediates(x, [1, 2], return_prefix_tokens=True)
        assert_same(final, expected)
        for (grid, prefix), (their_grid, their_prefix) in zip(ours, theirs, strict=True):
            assert prefix.shape == (2, 2, 48)
            assert_same(grid, their_grid)
            assert_same(prefix, their_prefix)

    def test_features_before_the_heads(self):
        model, x = deit(distilled=True).eval(), images()
        peer = timm_deit(model).eval()
        ours = model.forward_head(model.forward_features(x), pre_logits=True)
        assert_same(ours, peer.forward_head(peer.forward_features(x), pre_logits=True))


@pytest.mark.parametrize("training", [False, True])
def test_against_transformers(training):
    transformers = pytest.importorskip("transformers")
    model = deit(distilled=True, norm_eps=1e-12).train(training)
    config = transformers.DeiTConfig(
        **HUGGING_FACE, attn_implementation="eager", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    peer = transformers.DeiTForImageClassificationWithTeacher(config).train(training)
    peer.load_state_dict(hugging_face_state(model.state_dict(), "deit", HUGGING_FACE_HEADS), strict=True)
    x = images()
    ours, theirs = model(x), peer(x)
    if training:
        for ours_of, theirs_of in zip(ours, (theirs.cls_logits, theirs.distillation_logits), strict=True):
            assert_same(ours_of, theirs_of)
        (ours[0].square() + ours[1].pow(3)).sum().backward()
        (theirs.cls_logits.square() + theirs.distillation_logits.pow(3)).sum().backward()
        expected = hugging_face_state({n: p.grad for n, p in model.named_parameters()}, "deit", HUGGING_FACE_HEADS)
        largest = max(float(gradient.abs().max()) for gradient in expected.values())
        for name, parameter in peer.named_parameters():
            size = max(float(parameter.grad.abs().max()), 1e-2 * largest)
            assert float((parameter.grad - expected[name]).abs().max()) <= 1e-5 * size, name
    else:
        assert_same(ours, theirs.logits)


class TestTwoHeads:
    def test_pair_in_training_mean_in_evaluation(self):
        model, x = deit(distilled=True), images()
        tokens = model.forward_features(x)
        of_class = tokens[:, 0] @ model.head.weight.T + model.head.bias
        of_teacher = tokens[:, 1] @ model.head_dist.weight.T + model.head_dist.bias
        pair = model(x)
        assert isinstance(pair, tuple)
        assert_same(pair[0], of_class)
        assert_same(pair[1], of_teacher)
        assert_same(model.eval()(x), (of_class + of_teacher) / 2)

    def test_one_head_gives_one_tensor(self):
        model = deit()
        assert model(images()).shape == (2, 5) and model.eval()(images()).shape == (2, 5)
        assert model.dist_token is None and not hasattr(model, "head_dist")

    def test_both_heads_are_reset(self):
        model = deit(distilled=True).double().eval()
        model.reset_classifier(9)
        assert model.get_classifier() == (model.head, model.head_dist)
        assert model.head is not model.head_dist
        assert model(images().double()).shape == (2, 9)
        assert not model.head.training and not model.head_dist.training
        model.reset_classifier(0)
        assert model(images().double()).shape == (2, 48)

    def test_position_embedding_keeps_both_prefix_tokens(self):
        model = deit(distilled=True)
        old = model.pos_embed.detach().clone()
        model.set_input_size((64, 40))
        assert torch.equal(model.pos_embed[:, :2], old[:, :2])
        assert torch.equal(model.pos_embed, resize_pos_embed(old, (8, 5), prefix_tokens=2, old_grid=(4, 6)))

    def test_no_weight_decay_is_the_official_set(self):
        assert deit(distilled=True).no_weight_decay() == {"cls_token", "pos_embed"}


class TestMasks:
    @pytest.mark.parametrize("distilled", [False, True])
    def test_padding(self, distilled):
        assert_padding_mask_equals_leaving_tokens_out(deit(distilled=distilled))

    @pytest.mark.parametrize("with_prefix", [False, True])
    def test_pairwise(self, with_prefix):
        assert_pairwise_mask_cuts_influence(deit(distilled=True), with_prefix)


def test_initialisation():
    model = DeiT(embed_dim=192, depth=1, num_heads=3, img_size=224, distilled=True)
    for values in (model.pos_embed, model.blocks[0].attn.qkv.weight, model.head.weight, model.head_dist.weight):
        assert values.std().item() == pytest.approx(0.02, rel=0.05)
    for token in (model.cls_token, model.dist_token):
        assert token.std().item() == pytest.approx(0.02, rel=0.2)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert not module.bias.any()
    projection = model.patch_embed.proj  # PyTorch's own initialisation
    bound = projection.weight[0].numel() ** -0.5
    assert 0.99 * bound < projection.weight.abs().max() <= bound and projection.bias.any()


def test_image_preparation():
    assert VARIANTS["deit_base_patch16_384"].crop_pct == 1.0 and VARIANTS["deit_tiny_patch16_224"].crop_pct == 0.9
    assert all(variant.mean == (0.485, 0.456, 0.406) for variant in VARIANTS.values())
