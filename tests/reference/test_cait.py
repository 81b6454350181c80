"""CaiT against timm with transferred weights, and what the official code does beyond the paper."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastvit.reference.cait import VARIANTS, CaiT, ClassAttention, TalkingHeadAttention
from fastvit.reference.layers import resize_pos_embed
from tests.reference.parity import assert_same, randomise
from tests.reference.peers import (
    PLAIN,
    assert_padding_mask_equals_leaving_tokens_out,
    assert_pairwise_mask_cuts_influence,
    assert_step_equals_timm,
    images,
    timm_peer,
)


def cait(**options) -> CaiT:
    """LayerScale and head mixers are randomised too: near zero, as they start, they would hide errors."""
    return randomise(CaiT(**{**PLAIN, **options}))


def timm_cait(model: CaiT, **options) -> nn.Module:
    timm = pytest.importorskip("timm")
    return timm_peer(timm.models.cait.Cait(**{**PLAIN, **options}), model)


class TestAgainstTimm:
    def test_output_and_gradients(self):
        model = cait()
        assert_step_equals_timm(model, timm_cait(model), images())

    def test_more_class_blocks_other_ratio_no_bias(self):
        model = cait(class_depth=3, mlp_ratio=2.0, qkv_bias=False)
        peer = timm_cait(model, depth_token_only=3, mlp_ratio=2.0, mlp_ratio_token_only=2.0, qkv_bias=False)
        assert_step_equals_timm(model, peer, images())

    def test_dropout_and_stochastic_depth_in_the_same_places(self):
        """Same rate in every block, and none in the class stage: one draw more or less and nothing would agree."""
        model = cait(drop_rate=0.1, drop_path_rate=0.3)
        rates = {"pos_drop_rate": 0.1, "proj_drop_rate": 0.1, "drop_path_rate": 0.3}
        assert_step_equals_timm(model, timm_cait(model, **rates), images(8))

    @pytest.mark.parametrize("output_fmt", ["NCHW", "NLC"])
    def test_intermediates(self, output_fmt):
        model, x = cait().eval(), images()
        final, ours = model.forward_intermediates(x, 2, norm=True, output_fmt=output_fmt)
        expected, theirs = timm_cait(model).eval().forward_intermediates(x, 2, norm=True, output_fmt=output_fmt)
        assert_same(final, expected)
        for item, their_item in zip(ours, theirs, strict=True):
            assert_same(item, their_item)


class TestMasks:
    def test_padding(self):
        assert_padding_mask_equals_leaving_tokens_out(cait())

    @pytest.mark.parametrize("with_prefix", [False, True])
    def test_pairwise(self, with_prefix):
        assert_pairwise_mask_cuts_influence(cait(), with_prefix)

    @pytest.mark.parametrize("over_all_tokens", [False, True])
    def test_pairwise_mask_leaves_the_class_token_alone(self, over_all_tokens):
        """The first stage sees the mask; the class stage gathers from every patch, as without one."""
        model, x = cait().eval(), images()
        allowed = torch.rand(2, 25, 25) > 0.5
        patches, _ = model.run_blocks(x, allowed[:, 1:, 1:])
        out = model.forward_features(x, allowed if over_all_tokens else allowed[:, 1:, 1:])
        assert torch.equal(out, model.finish(patches, None))
        assert not torch.allclose(out, model.forward_features(x))

    def test_all_masked(self):
        """The class token then sees itself alone."""
        model, x = cait(depth=1, class_depth=1).eval(), images()
        block = model.blocks_token_only[0]
        out = model.forward_features(x, torch.zeros(2, 24, dtype=torch.bool))[:, 0]
        cls = model.cls_token[0]
        cls = cls + block.gamma_1 * block.attn.proj(block.attn.v(block.norm1(cls)))
        cls = cls + block.gamma_2 * block.mlp(block.norm2(cls))
        assert_same(out, model.norm(cls).expand(2, -1))
        model.train()(x, torch.zeros(2, 24, dtype=torch.bool)).sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_attention_dropout_is_on_the_finished_maps():
    """timm has the same, on maps that lie otherwise in memory, and so draws otherwise."""
    attention = randomise(TalkingHeadAttention(48, 4, attn_drop=0.4)).double().train()
    q, k, v = torch.randn(3, 2, 4, 9, 12).double()
    maps = torch.einsum("bgqd,bgkd,hg->bhqk", q, k, attention.proj_l.weight) / 12**0.5
    maps = (maps + attention.proj_l.bias[:, None, None]).softmax(-1)
    maps = torch.einsum("bgqk,hg->bhqk", maps, attention.proj_w.weight) + attention.proj_w.bias[:, None, None]
    torch.manual_seed(3)
    dropped = torch.nn.functional.dropout(maps.contiguous(), 0.4)
    torch.manual_seed(3)
    assert_same(attention.attend(q, k, v, None), dropped @ v, 1e-13)
    assert_same(attention.eval().attend(q, k, v, None), maps @ v, 1e-13)


def test_class_attention_is_the_first_row_of_full_attention():
    attention, x = randomise(ClassAttention(48, 4)).double(), torch.randn(2, 9, 48).double()
    heads = [part(x).view(2, 9, 4, 12) for part in (attention.q, attention.k, attention.v)]
    weights = torch.einsum("bqhd,bkhd->bhqk", heads[0], heads[1]).div(12**0.5).softmax(-1)
    full = attention.proj(torch.einsum("bhqk,bkhd->bqhd", weights, heads[2]).reshape(2, 9, 48))
    assert_same(attention(x), full[:, :1], 1e-13)


def test_patches_are_frozen_in_the_class_stage():
    model = cait().eval()
    patches, _ = model.run_blocks(images(), None)
    assert torch.equal(model.finish(patches, None)[:, 1:], model.norm(patches))


def test_position_embedding_has_no_class_entry():
    model = cait()
    assert model.pos_embed.shape == (1, 24, 48)
    old = model.pos_embed.detach().clone()
    model.set_input_size((64, 40))
    assert torch.equal(model.pos_embed, resize_pos_embed(old, (8, 5), prefix_tokens=0, old_grid=(4, 6)))
    assert model(torch.randn(2, 3, 64, 40)).shape == (2, 5)


class TestInitialisation:
    def test_layer_scale_of_every_variant(self):
        deep = {"cait_s36_384", "cait_m36_384", "cait_m48_448", "cait_xs36_224", "cait_s48_224"}
        for name, variant in VARIANTS.items():
            expected = 1e-6 if name in deep else 1e-5  # XXS36: 1e-5 in the official code
            assert variant.config["init_values"] == expected, name

    def test_values(self):
        model = CaiT(**PLAIN, init_values=0.25)
        for block in [*model.blocks, *model.blocks_token_only]:
            assert (block.gamma_1 == 0.25).all() and (block.gamma_2 == 0.25).all()
        mixers = torch.cat(
            [
                part.weight.flatten()
                for _ in range(20)
                for b in CaiT(**PLAIN).blocks
                for part in (b.attn.proj_l, b.attn.proj_w)
            ]
        )
        assert mixers.std().item() == pytest.approx(0.02, rel=0.1) and abs(mixers.mean().item()) < 0.002
        for module in model.modules():
            if isinstance(module, nn.Linear):
                assert not module.bias.any()
        assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)

    def test_no_weight_decay_is_the_official_set(self):
        assert cait().no_weight_decay() == {"cls_token", "pos_embed"}


def test_stochastic_depth_is_constant():
    model = cait(depth=5, drop_path_rate=0.3)
    assert [block.drop_path.drop_prob for block in model.blocks] == [0.3] * 5


def test_width_that_heads_do_not_divide():
    with pytest.raises(ValueError, match="num_heads: 5 does not divide the width 48"):
        ClassAttention(48, 5)
