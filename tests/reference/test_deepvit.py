"""DeepViT, of which no package has the official form, against the formulae written out in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit.reference import functional
from fastvit.reference.deepvit import VARIANTS, CNNStem, DeepViT, ReAttention
from tests.reference.parity import assert_same, randomise
from tests.reference.peers import (
    PLAIN,
    assert_padding_mask_equals_leaving_tokens_out,
    assert_pairwise_mask_cuts_influence,
    images,
)

SHAPE = {**PLAIN, "transformed_blocks": 2, "scale_adjustment": 0.5, "reatten_scale": 0.3, "mlp_ratio": 3.0}


def deepvit(**options) -> DeepViT:
    return randomise(DeepViT(**{**SHAPE, **options}))


def batch_norm(x: Tensor, state: dict[str, Tensor], name: str, training: bool) -> Tensor:
    """Normalise (B, C, h, w) by the batch's or the running statistics."""
    mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    if training:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    scale = state[f"{name}.weight"] / (var + 1e-5).sqrt()
    return x * scale[:, None, None] + (state[f"{name}.bias"] - mean * scale)[:, None, None]


def layer_norm(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return centred / (variance + 1e-6).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def re_attention(x: Tensor, state: dict[str, Tensor], name: str, heads: int, scale: float, training: bool):
    """Equation 3 of the paper with the official bias and BatchNorm: tokens (B, N, C) to tokens and finished maps."""
    batch, tokens, width = x.shape
    q, k, v = linear(x, state, f"{name}.qkv").view(batch, tokens, 3, heads, width // heads).unbind(2)
    maps = torch.einsum("bqhd,bkhd->bhqk", q, k).div((width // heads) ** 0.5).softmax(-1)
    if f"{name}.reatten_matrix.weight" in state:
        mix = state[f"{name}.reatten_matrix.weight"][:, :, 0, 0]
        maps = torch.einsum("hg,bgqk->bhqk", mix, maps) + state[f"{name}.reatten_matrix.bias"][:, None, None]
        maps = batch_norm(maps, state, f"{name}.var_norm", training) * scale
    out = torch.einsum("bhqk,bkhd->bqhd", maps, v).reshape(batch, tokens, width)
    return linear(out, state, f"{name}.proj"), maps


def written_out(model: DeepViT, x: Tensor, training: bool) -> tuple[Tensor, list[Tensor]]:
    """The whole model from its state_dict: logits and every block's finished maps."""
    state = {name: value.detach() for name, value in model.state_dict().items()}
    stem = "patch_embed"
    if f"{stem}.conv1.weight" in state:
        x = F.conv2d(x, state[f"{stem}.conv1.weight"], stride=2, padding=3)
        x = batch_norm(x, state, f"{stem}.bn1", training).clamp_min(0)
        x = F.conv2d(x, state[f"{stem}.conv2.weight"], padding=1)
        x = batch_norm(x, state, f"{stem}.bn2", training).clamp_min(0)
    weight = state[f"{stem}.proj.weight"]
    x = F.conv2d(x, weight, state[f"{stem}.proj.bias"], stride=weight.shape[2:]).flatten(2).transpose(1, 2)
    x = torch.cat((state["cls_token"].expand(x.shape[0], 1, -1), x), dim=1) + state["pos_embed"]
    every = []
    for index in range(SHAPE["depth"]):
        block, half = f"blocks.{index}", 0.5
        branch, maps = re_attention(
            layer_norm(half * x, state, f"{block}.norm1"), state, f"{block}.attn", 4, SHAPE["reatten_scale"], training
        )
        x = x + branch / half
        hidden = F.gelu(linear(layer_norm(half * x, state, f"{block}.norm2"), state, f"{block}.mlp.fc1"))
        x = x + linear(hidden, state, f"{block}.mlp.fc2") / half
        every.append(maps)
    return linear(layer_norm(x, state, "norm")[:, 0], state, "head"), every


class TestAgainstTheFormulae:
    @pytest.mark.parametrize("stem", ["conv", "cnn"])
    @pytest.mark.parametrize("training", [False, True])
    def test_whole_model(self, stem, training):
        model, x = deepvit(stem=stem).double().train(training), images().double()
        expected, maps = written_out(model, x, training)
        assert_same(model(x), expected, 1e-12)
        assert maps[1].shape == (2, 4, 25, 25)

    def test_float32(self):
        model, x = deepvit(stem="cnn").eval(), images()
        actual = model(x)
        expected, _ = written_out(model.double(), x.double(), training=False)
        assert_same(actual.double(), expected)

    @pytest.mark.parametrize("training", [False, True])
    def test_re_attention_and_its_gradients(self, training):
        attention = randomise(ReAttention(24, 4, reatten_scale=0.3)).double().train(training)
        state = {f"a.{name}": value for name, value in attention.state_dict(keep_vars=True).items()}
        state = {name: v.clone() if v.dtype.is_floating_point else v for name, v in state.items()}
        parameters = list(attention.parameters())
        x = torch.randn(2, 7, 24).double().requires_grad_()
        expected, _ = re_attention(x, state, "a", 4, 0.3, training)
        actual = attention(x)
        assert_same(actual, expected, 1e-13)
        weights = torch.randn_like(actual)
        ours = torch.autograd.grad(actual, [x, *parameters], weights)
        theirs = torch.autograd.grad(expected, [x, *parameters], weights)
        largest = max(float(gradient.abs().max()) for gradient in theirs)
        for gradient, expected_gradient in zip(ours, theirs, strict=True):
            assert float((gradient - expected_gradient).abs().max()) <= 1e-12 * largest

    def test_running_statistics(self):
        """Of the mixed map, by nn.BatchNorm2d's rule: momentum 0.1, unbiased variance, one batch counted."""
        attention = randomise(ReAttention(24, 4)).double().train()
        x = torch.randn(2, 7, 24).double()
        q, k, _ = attention.project(x)
        mixed = attention.reatten_matrix((q @ k.transpose(-2, -1) / 6**0.5).softmax(-1))
        mean = 0.9 * attention.var_norm.running_mean + 0.1 * mixed.mean((0, 2, 3))
        var = 0.9 * attention.var_norm.running_var + 0.1 * mixed.var((0, 2, 3), unbiased=True)
        attention(x)
        assert_same(attention.var_norm.running_mean, mean, 1e-13)
        assert_same(attention.var_norm.running_var, var, 1e-13)
        assert attention.var_norm.num_batches_tracked == 1

    def test_dropout_is_on_the_softmaxed_maps(self):
        attention = randomise(ReAttention(24, 4, attn_drop=0.4)).double().train()
        attention.var_norm.eval()
        q, k, v = torch.randn(3, 2, 4, 7, 6).double()
        torch.manual_seed(3)
        maps = F.dropout((q @ k.transpose(-2, -1) / 6**0.5).softmax(-1), 0.4)
        expected = attention.var_norm(attention.reatten_matrix(maps)) @ v
        torch.manual_seed(3)
        assert_same(attention.attend(q, k, v, None), expected, 1e-13)


class TestTransformedBlocks:
    def test_are_the_last(self):
        model = deepvit(transformed_blocks=2)
        assert [block.attn.transform for block in model.blocks] == [False, True, True]
        extra = [name for name in model.state_dict() if "reatten_matrix" in name or "var_norm" in name]
        assert {name.split(".")[1] for name in extra} == {"1", "2"} and len(extra) == 2 * 7

    def test_others_are_plain(self):
        attention = randomise(ReAttention(24, 4, transform=False, reatten_scale=0.3))
        q, k, v = torch.randn(3, 2, 4, 7, 6)
        assert torch.equal(attention.attend(q, k, v, None), functional.masked_attention(q, k, v))

    def test_all_by_default(self):
        assert all(block.attn.transform for block in deepvit(transformed_blocks=None).blocks)

    @pytest.mark.parametrize("blocks", [-1, 4])
    def test_bad_number(self, blocks):
        with pytest.raises(
            ValueError, match=f"transformed_blocks: expected a number from 0 to the depth, 3, got {blocks}"
        ):
            DeepViT(**{**SHAPE, "transformed_blocks": blocks})


class TestMaps:
    """The option of the official similarity loss, ``cos_reg``."""

    def test_given_in_training_only(self):
        model, x = deepvit(cos_reg=True).double().train(), images().double()
        expected, expected_maps = written_out(model, x, training=True)
        logits, maps = model(x)
        assert_same(logits, expected, 1e-12)
        assert len(maps) == 3
        for actual, written in zip(maps, expected_maps, strict=True):
            assert_same(actual, written, 1e-12)
        assert isinstance(model.eval()(x), Tensor)

    def test_batches_are_counted_once(self):
        model = deepvit(cos_reg=True)
        model(images())
        assert all(block.attn.var_norm.num_batches_tracked == 1 for block in model.blocks[1:])

    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_similarity_loss_reaches_the_mix(self, checkpointing):
        model, x = deepvit(cos_reg=True).double(), images().double()
        model.set_grad_checkpointing(checkpointing)
        _, maps = model(x)
        similarity = F.cosine_similarity(maps[-1].flatten(2), maps[-2].flatten(2), dim=-1).mean()
        similarity.backward()
        assert model.blocks[-1].attn.reatten_matrix.weight.grad.abs().max() > 0
        assert model.blocks[-1].attn.var_norm.num_batches_tracked == 1

    def test_masked(self):
        model, mask = deepvit().double().eval(), torch.rand(2, 24) > 0.5
        logits, maps = model.forward_with_maps(images().double(), mask)
        hidden = torch.cat((torch.zeros(2, 1, dtype=torch.bool), ~mask), dim=1)
        for block_maps in maps:
            assert not block_maps.masked_select(hidden[:, None, None].expand_as(block_maps)).any()
        assert logits.shape == (2, 5)


class TestMasks:
    @pytest.mark.parametrize("stem", ["conv", "cnn"])
    def test_padding(self, stem):
        assert_padding_mask_equals_leaving_tokens_out(deepvit(stem=stem))

    @pytest.mark.parametrize("with_prefix", [False, True])
    def test_pairwise(self, with_prefix):
        assert_pairwise_mask_cuts_influence(deepvit(transformed_blocks=3), with_prefix)


class TestStem:
    def test_shape_and_names(self):
        stem = CNNStem(16, 3, 24)
        assert stem(torch.randn(1, 3, 32, 64)).shape == (1, 8, 24) and stem.grid(32, 64) == (2, 4)
        assert {name.split(".")[0] for name in stem.state_dict()} == {"conv1", "bn1", "conv2", "bn2", "proj"}
        assert stem.conv1.bias is None and stem.conv2.bias is None

    def test_bad_arguments(self):
        with pytest.raises(ValueError, match="patch_size: expected an even size with the CNN stem, got 7"):
            CNNStem(7)
        with pytest.raises(ValueError, match=r"stem: expected one of \('conv', 'cnn'\), got 'resnet'"):
            DeepViT(stem="resnet")


def test_variants_follow_the_official_configurations():
    for name in ("deepvit_16b", "deepvit_24b", "deepvit_32b"):
        assert not {"stem", "scale_adjustment", "reatten_scale", "transformed_blocks"} & VARIANTS[name].config.keys()
    small, large = VARIANTS["deepvit_s"].config, VARIANTS["deepvit_l"].config
    assert (small["transformed_blocks"], large["transformed_blocks"]) == (5, 12)
    assert small["reatten_scale"] == pytest.approx(0.17408, abs=1e-5) and "reatten_scale" not in large
    assert small["scale_adjustment"] == large["scale_adjustment"] == 0.5
    assert {**large, "img_size": 384} == VARIANTS["deepvit_l_384"].config
    assert all(variant.mean == (0.5, 0.5, 0.5) for variant in VARIANTS.values())


def test_initialisation():
    model = DeepViT(embed_dim=96, depth=2, num_heads=12, img_size=64, stem="cnn")
    assert model.blocks[0].attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == 3 + 2
    for convolution in convolutions:  # PyTorch's own initialisation, the mixes included
        bound = convolution.weight[0].numel() ** -0.5
        assert 0.9 * bound < convolution.weight.abs().max() <= bound
