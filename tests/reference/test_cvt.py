"""CvT against transformers with transferred weights, its parts against nn modules on maps, and its interface."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from fastvit.reference import functional
from fastvit.reference.cvt import VARIANTS, ConvAttention, ConvProjection, CvT, QuickGELU
from fastvit.reference.pyramid import stage_mask
from tests.reference.parity import assert_same, assert_same_gradients, randomise

TINY = {"embed_dim": (8, 24, 48), "depth": (1, 2, 3), "num_heads": (1, 3, 6), "num_classes": 7}


def tiny(**options) -> CvT:
    return CvT(**{**TINY, **options})


def hugging_face_names(model: CvT) -> dict[str, str]:
    """Own state_dict name to the name transformers gives the same tensor."""
    rules = [
        (r"^stage(\d)\.patch_embed\.proj", r"cvt.encoder.stages.\1.embedding.convolution_embeddings.projection"),
        (r"^stage(\d)\.patch_embed\.norm", r"cvt.encoder.stages.\1.embedding.convolution_embeddings.normalization"),
        (r"^stage(\d)\.cls_token", r"cvt.encoder.stages.\1.cls_token"),
        (r"^stage(\d)\.blocks\.(\d+)\.", r"cvt.encoder.stages.\1.layers.\2."),
        (r"attn\.conv_proj_(\w)\.conv", r"attention.attention.convolution_projection_\1.CONV.convolution"),
        (r"attn\.conv_proj_(\w)\.bn", r"attention.attention.convolution_projection_\1.CONV.normalization"),
        (r"attn\.proj_(\w)\.", r"attention.attention.projection_\1."),
        (r"projection_q\b", "projection_query"),
        (r"projection_k\b", "projection_key"),
        (r"projection_v\b", "projection_value"),
        ("CONV", "convolution_projection"),
        (r"attn\.proj\.", "attention.output.dense."),
        (r"mlp\.fc1", "intermediate.dense"),
        (r"mlp\.fc2", "output.dense"),
        (r"\.norm1\.", ".layernorm_before."),
        (r"\.norm2\.", ".layernorm_after."),
        (r"^norm\.", "layernorm."),
        (r"^head\.", "classifier."),
    ]
    names = {}
    for name in model.state_dict():
        theirs = name
        for pattern, replacement in rules:
            theirs = re.sub(pattern, replacement, theirs)
        names[name] = theirs
    return names


def hugging_face_peer(model: CvT, act: str, class_token: bool = True):
    """A transformers CvT with the weights of ``model`` and the activation asked for (its own is always erf GELU)."""
    transformers = pytest.importorskip("transformers")
    config = transformers.CvtConfig(
        embed_dim=list(TINY["embed_dim"]),
        depth=list(TINY["depth"]),
        num_heads=list(TINY["num_heads"]),
        num_labels=TINY["num_classes"],
        drop_path_rate=[0.0, 0.0, 0.0],
        cls_token=[False, False, class_token],
    )
    peer = transformers.CvtForImageClassification(config)
    names = hugging_face_names(model)
    peer.load_state_dict({names[name]: tensor for name, tensor in model.state_dict().items()}, strict=True)
    if act == "quick_gelu":
        for stage in peer.cvt.encoder.stages:
            for layer in stage.layers:
                layer.intermediate.activation = QuickGELU()
    return peer


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("shape", [(1, 64, 64), (2, 64, 64), (2, 50, 91)])
def test_matches_transformers_in_eval(act, shape):
    model = randomise(tiny(act=act)).eval()
    peer = hugging_face_peer(model, act).eval()
    images = torch.randn(shape[0], 3, *shape[1:])
    with torch.no_grad():
        assert_same(model(images), peer(images).logits)


def test_the_two_activations_differ():
    model = randomise(tiny()).eval()
    other = tiny(act="gelu").eval()
    other.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert (model(images) - other(images)).abs().max() > 1e-3


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize(("dtype", "tolerance", "floor"), [(torch.float32, 1e-5, 1.0), (torch.float64, 1e-10, 1e-2)])
def test_matches_transformers_in_training(act, dtype, tolerance, floor):
    model = randomise(tiny(act=act)).train()
    peer = hugging_face_peer(model, act).to(dtype).train()
    model.to(dtype)
    images, targets = torch.randn(3, 3, 64, 48, dtype=dtype), torch.tensor([0, 3, 6])
    for _ in range(2):  # the second step starts from the running statistics of the first
        ours, theirs = model(images), peer(images).logits
        assert_same(ours, theirs, tolerance)
    nn.functional.cross_entropy(ours, targets).backward()
    nn.functional.cross_entropy(theirs, targets).backward()
    names = hugging_face_names(model)
    assert_same_gradients(model, peer, names, tolerance=tolerance, floor=floor)
    buffers = dict(peer.named_buffers())
    for name, buffer in model.named_buffers():
        if name.endswith("num_batches_tracked"):
            assert buffer.item() == buffers[names[name]].item() == 2
        else:
            assert_same(buffer, buffers[names[name]], tolerance, name)


def test_mean_pooling_matches_transformers_without_class_token():
    model = randomise(tiny(pool="gap")).eval()
    assert not any("cls_token" in name for name in model.state_dict())
    peer = hugging_face_peer(model, "quick_gelu", class_token=False).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():  # the encoder and what follows it: the peer's own forward fails without a class token
        features = peer.cvt.encoder(images).last_hidden_state.flatten(2).transpose(1, 2)
        assert_same(model(images), peer.classifier(peer.layernorm(features).mean(1)))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("stride", "grid", "prefix"), [(1, (5, 7), 1), (2, (5, 7), 1), (2, (6, 4), 0), (2, (1, 1), 2)])
def test_projection_is_depthwise_convolution_and_norm_on_the_map(stride, grid, prefix, training):
    module = randomise(ConvProjection(6, stride)).double().train(training)
    conv = nn.Conv2d(6, 6, 3, stride, 1, groups=6, bias=False).double()
    bn = nn.BatchNorm2d(6).double().train(training)
    conv.load_state_dict(module.conv.state_dict())
    bn.load_state_dict(module.bn.state_dict())
    x = torch.randn(3, prefix + grid[0] * grid[1], 6, dtype=torch.float64)
    image = bn(conv(x[:, prefix:].transpose(1, 2).reshape(3, 6, *grid)))
    out = module(x, grid, prefix)
    assert torch.equal(out[:, :prefix], x[:, :prefix])
    assert_same(out[:, prefix:], image.flatten(2).transpose(1, 2), 1e-12)
    assert_same(module.bn.running_mean, bn.running_mean, 1e-12)
    assert_same(module.bn.running_var, bn.running_var, 1e-12)
    assert module.bn.num_batches_tracked == bn.num_batches_tracked == int(training)


def test_logits_are_scaled_by_the_full_width():
    attention = randomise(ConvAttention(12, num_heads=3, prefix_tokens=1)).double().eval()
    x = torch.randn(2, 1 + 6, 12, dtype=torch.float64)
    q, k, v = (t.reshape(2, -1, 3, 4).transpose(1, 2) for t in attention.project(x, (2, 3)))
    assert (q.shape[2], k.shape[2]) == (7, 1 + 2)
    weights = (torch.einsum("bhqd,bhkd->bhqk", q, k) / 12**0.5).softmax(-1)
    expected = attention.proj((weights @ v).transpose(1, 2).reshape(2, 7, 12))
    assert_same(attention(x, (2, 3)), expected, 1e-12)


def test_batch_of_one_keeps_its_axis():
    model = tiny().eval()
    image = torch.randn(1, 3, 64, 64)
    assert model(image).shape == (1, 7)
    assert model.forward_head(model.forward_features(image), pre_logits=True).shape == (1, 48)


def test_features_are_all_tokens_of_the_last_stage():
    assert tiny().eval().forward_features(torch.randn(2, 3, 64, 96)).shape == (2, 1 + 4 * 6, 48)


@pytest.mark.parametrize(("fine", "coarse"), [((8, 8), (4, 4)), ((7, 5), (4, 3)), ((14, 6), (2, 1)), ((3, 3), (3, 3))])
def test_a_coarse_token_is_visible_if_any_of_its_window_is(fine, coarse):
    def window(i, n, m):  # adaptive pooling's windows, which overlap where m does not divide n
        return range(i * n // m, -(-(i + 1) * n // m))

    patches = fine[0] * fine[1]
    cells = [
        [y * fine[1] + x for y in window(i, fine[0], coarse[0]) for x in window(j, fine[1], coarse[1])]
        for i in range(coarse[0])
        for j in range(coarse[1])
    ]
    keys = torch.rand(2, patches) < 0.2
    expected = torch.stack([keys[:, cell].any(1) for cell in cells], 1)
    assert torch.equal(stage_mask(keys, fine, fine, coarse)[:, 0, 0], expected)

    pairs = torch.rand(2, patches, patches) < 0.05
    got = stage_mask(pairs, fine, coarse, coarse, prefix_tokens=1)[:, 0]
    expected = torch.stack([torch.stack([pairs[:, a][:, :, b].any((1, 2)) for b in cells], 1) for a in cells], 1)
    assert torch.equal(got[:, 1:, 1:], expected)
    assert got[:, 0].all()
    assert got[:, :, 0].all()


def test_mask_hides_keys_in_every_stage():
    model = randomise(tiny()).eval()
    tokenless = randomise(tiny(pool="gap")).eval()
    images = torch.randn(2, 3, 64, 64)
    assert model.token_grid(64, 64) == (16, 16)
    keys = torch.ones(2, 256, dtype=torch.bool)
    with torch.no_grad():
        plain = model(images)
        assert_same(model(images, keys), plain, 1e-6)
        assert_same(model(images, keys[:, None] & keys[:, :, None]), plain, 1e-6)
        keys.view(2, 16, 16)[:, :, 8:] = False
        seen = []
        for block in [block for stage in model.stages for block in stage.blocks]:
            block.attn.register_forward_pre_hook(lambda module, args: seen.append(args[2]))
        masked = model(images, keys)
        assert (masked - plain).abs().max() > 1e-3
        assert [tuple(m.shape) for m in seen] == [(2, 1, 1, 64), *[(2, 1, 1, 16)] * 2, *[(2, 1, 1, 1 + 4)] * 3]
        assert [int(m[0].sum()) for m in seen] == [32, 8, 8, 3, 3, 3]
        pairs = keys[:, None].expand(2, 256, 256)  # the same but for the class token, which no pair mask restricts
        assert_same(tokenless(images, pairs), tokenless(images, keys), 1e-6)


def test_a_fully_masked_row_attends_to_nothing():
    attention = randomise(ConvAttention(8, num_heads=2)).eval()
    x = torch.randn(2, 16, 8, requires_grad=True)
    mask = torch.ones(2, 1, 1, 4, dtype=torch.bool)
    mask[1] = False
    out = attention(x, (4, 4), mask)
    assert torch.equal(out[1], attention.proj.bias.expand(16, 8))
    out.sum().backward()
    assert x.grad.isfinite().all()
    assert not x.grad[1].any()

    model = randomise(tiny()).train()
    model(torch.randn(2, 3, 64, 64), torch.zeros(2, 256, dtype=torch.bool)).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_mask_errors_name_what_is_accepted():
    model, images = tiny().eval(), torch.randn(2, 3, 64, 64)
    with pytest.raises(TypeError, match=r"mask: .*torch\.bool"):
        model(images, torch.ones(2, 256))
    with pytest.raises(ValueError, match=r"mask: expected shape .*, got \(2, 255\)"):
        model(images, torch.ones(2, 255, dtype=torch.bool))


def test_drop_path_is_set_per_stage():
    def rates(model):
        return [[round(block.drop_path.drop_prob, 6) for block in stage.blocks] for stage in model.stages]

    assert rates(tiny(drop_path_rate=0.1)) == [[0], [0, 0], [0, 0.05, 0.1]]
    assert rates(tiny(drop_path_rate=(0.1, 0.2, 0.3))) == [[0], [0, 0.2], [0, 0.15, 0.3]]


def test_initial_values_are_the_official_ones():
    model = CvT(num_classes=1000)
    token = model.stage2.cls_token
    assert token.shape == (1, 1, 384)
    assert 0.015 < token.std() < 0.025
    linear = model.stage2.blocks[0].mlp.fc1
    assert 0.019 < linear.weight.std() < 0.021
    assert not linear.bias.any()
    assert 0.019 < model.head.weight.std() < 0.021
    assert model.head.bias.any()
    conv = model.stage2.blocks[0].attn.conv_proj_q.conv.weight
    assert abs(float(conv.detach().std()) - 1 / 3 / 3**0.5) < 0.02  # uniform up to 1 / sqrt(fan_in), PyTorch's default
    assert all(m.eps == 1e-5 for m in model.modules() if isinstance(m, nn.LayerNorm))
    assert model.no_weight_decay() == {"stage2.cls_token"}


def test_intermediates_are_the_outputs_of_the_blocks():
    model = randomise(tiny()).eval()
    images = torch.randn(2, 3, 64, 32)
    outputs = []
    for block in [block for stage in model.stages for block in stage.blocks]:
        block.register_forward_hook(lambda module, args, out: outputs.append(out))
    with torch.no_grad():
        final, features = model.forward_intermediates(images, return_prefix_tokens=True)
        assert len(features) == len(outputs) == 6
        shapes = [(2, 8, 16, 8), *[(2, 24, 8, 4)] * 2, *[(2, 48, 4, 2)] * 3]
        for (grid, prefix), out, shape in zip(features, outputs, shapes, strict=True):
            assert tuple(grid.shape) == shape
            assert torch.equal(torch.cat((prefix, grid.flatten(2).transpose(1, 2)), 1), out)
        assert torch.equal(final, model.forward_features(images))
        tokens = model.forward_intermediates(images, [-1], norm=True, output_fmt="NLC")[1][0]
        assert torch.equal(tokens, final[:, 1:])
        assert model.stage_ends == [0, 2, 5]
        outputs.clear()
        first = model.forward_intermediates(images, [0, 2], stop_early=True, intermediates_only=True)
        assert len(outputs) == 3
        assert [f.shape[1] for f in first] == [8, 24]
    with pytest.raises(ValueError, match="stop_early"):
        model.forward_intermediates(images, stop_early=True)
    with pytest.raises(ValueError, match="output_fmt: expected .*got 'NHWC'"):
        model.forward_intermediates(images, output_fmt="NHWC")


def test_checkpointing_changes_nothing_but_memory():
    model = randomise(tiny()).train()
    images = torch.randn(2, 3, 32, 32)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    results = []
    for enable in (False, True):
        model.load_state_dict(state)
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        out = model(images)
        out.sum().backward()
        results.append((out, [p.grad for p in model.parameters()], [b.clone() for b in model.buffers()]))
    (out, gradients, buffers), (again, gradients_again, buffers_again) = results
    assert torch.equal(out, again)
    assert all(torch.equal(a, b) for a, b in zip(gradients, gradients_again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(buffers, buffers_again, strict=True))


def test_reset_classifier_keeps_dtype_and_device():
    model = tiny().double().eval()
    model.reset_classifier(3)
    assert model(torch.randn(2, 3, 32, 32, dtype=torch.float64)).shape == (2, 3)
    model.reset_classifier(0)
    assert isinstance(model.head, nn.Identity)
    assert model.num_classes == 0
    assert model(torch.randn(2, 3, 32, 32, dtype=torch.float64)).shape == (2, 48)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": "max"}, "pool: expected .*got 'max'"),
        ({"act": "tanh"}, "act: expected .*got 'tanh'"),
        ({"num_heads": (1, 3)}, r"num_heads: expected .*got \(1, 3\)"),
        ({"num_heads": (3, 3, 6)}, "num_heads: 3 does not divide the width 8"),
        ({"img_size": 0}, "img_size: expected .*got 0"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)


def test_an_image_too_small_is_named():
    with pytest.raises(ValueError, match=r"x: expected a map of 3 or more in height and width, got \(2, 64\)"):
        tiny()(torch.randn(1, 3, 2, 64))


@pytest.mark.parametrize("training", [False, True])
def test_runs_under_autocast(training):
    model = randomise(tiny()).train(training)
    images = torch.randn(2, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(images)
    assert out.isfinite().all()
    out.float().sum().backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_named_variants_share_the_official_keys():
    assert set(VARIANTS) == {"cvt_13", "cvt_21", "cvt_13_384", "cvt_21_384", "cvt_w24_384"}
    with torch.device("meta"):
        names = set(VARIANTS["cvt_13"].build(**VARIANTS["cvt_13"].config).state_dict())
    assert {
        "stage0.patch_embed.proj.weight",
        "stage0.patch_embed.norm.bias",
        "stage2.cls_token",
        "stage1.blocks.1.attn.conv_proj_k.conv.weight",
        "stage1.blocks.1.attn.conv_proj_v.bn.num_batches_tracked",
        "stage2.blocks.9.attn.proj_q.bias",
        "stage2.blocks.9.attn.proj.weight",
        "stage2.blocks.9.mlp.fc2.bias",
        "norm.weight",
        "head.bias",
    } <= names
    assert not any(name.startswith(("stage0.cls", "stage1.cls")) for name in names)


def test_quick_gelu_is_the_sigmoid_form():
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    assert_same(QuickGELU()(x), x / (1 + torch.exp(-1.702 * x)), 1e-14)
    assert (functional.quick_gelu(x) - nn.functional.gelu(x)).abs().max() > 0.01
