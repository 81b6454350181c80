"""CeiT against a plain model of nn modules on maps, written from the paper and the official order of operations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit.reference.ceit import VARIANTS, CeiT, LastQueryAttention, LayerwiseClassAttention, LeFF
from fastvit.reference.layers import Attention
from tests.reference.parity import assert_same, assert_same_gradients, randomise

TINY = {"img_size": 64, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 7, "mlp_ratio": 2, "stem_chans": 8}


def tiny(**options) -> CeiT:
    return CeiT(**{**TINY, **options})


class PlainLeFF(nn.Module):
    """LeFF as a chain of modules on the (B, C, h, w) map; same parameter names."""

    def __init__(self, dim: int, hidden: int, with_bn: bool, form: str, kernel: int = 3):
        super().__init__()
        self.conv1 = nn.Conv2d(dim, hidden, 1)
        self.conv2 = nn.Conv2d(hidden, hidden, kernel, padding=kernel // 2, groups=hidden)
        self.conv3 = nn.Conv2d(hidden, dim, 1)
        if with_bn:
            self.bn1, self.bn2, self.bn3 = nn.BatchNorm2d(hidden), nn.BatchNorm2d(hidden), nn.BatchNorm2d(dim)
        self.with_bn, self.form = with_bn, form

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        cls, patches = x[:, :1], x[:, 1:]
        x = patches.transpose(1, 2).reshape(x.shape[0], x.shape[2], *grid)
        x = self.conv1(x)
        x = F.gelu(self.bn1(x) if self.with_bn else x)
        x = self.conv2(x)
        x = F.gelu(self.bn2(x) if self.with_bn else x)
        x = self.conv3(x)
        x = self.bn3(x) if self.with_bn else x
        x = x.flatten(2).transpose(1, 2)
        if self.form == "paper":
            return torch.cat((cls * 0, F.gelu(x)), 1)
        return torch.cat((cls, x), 1)


class PlainAttention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.qkv, self.proj, self.heads = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        attn = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1)
        return self.proj((attn @ v).transpose(1, 2).flatten(2))


class PlainFeedForward(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class PlainCeiT(nn.Module):
    """The whole model, full attention in LCA, residuals written out; same parameter names as the official code."""

    def __init__(self, grid: tuple[int, int], with_bn: bool = True, form: str = "official"):
        super().__init__()
        dim, heads, depth, hidden, stem = 24, 3, 3, 48, 8
        self.grid = grid
        self.i2t = nn.Module()
        self.i2t.backbone = nn.Module()
        self.i2t.backbone.conv = nn.Conv2d(3, stem, 7, 2, 3, bias=False)
        self.i2t.backbone.bn = nn.BatchNorm2d(stem)
        self.i2t.proj = nn.Conv2d(stem, dim, 4, 4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid[0] * grid[1], dim))
        self.pos_layer_embed = nn.Parameter(torch.zeros(1, depth, dim))
        self.blocks = nn.ModuleList()
        for _ in range(depth):
            block = nn.Module()
            block.norm1, block.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
            block.attn = PlainAttention(dim, heads)
            block.leff = PlainLeFF(dim, hidden, with_bn, form)
            self.blocks.append(block)
        self.lca = nn.Module()
        self.lca.norm1, self.lca.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.lca.attn = PlainAttention(dim, heads)
        self.lca.feedforward = PlainFeedForward(dim, hidden)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, 7)

    def forward(self, images: Tensor) -> Tensor:
        stem = self.i2t.backbone
        x = self.i2t.proj(F.max_pool2d(stem.bn(stem.conv(images)), 3, 2, 1)).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), 1) + self.pos_embed
        tokens = []
        for block in self.blocks:
            x = x + block.attn(block.norm1(x))
            x = x + block.leff(block.norm2(x), self.grid)
            tokens.append(x[:, 0])
        x = torch.stack(tokens, 1) + self.pos_layer_embed
        x = x + self.lca.attn(self.lca.norm1(x))
        x = x + self.lca.feedforward(self.lca.norm2(x))
        return self.head(self.norm(x[:, -1]))


def plain(model: CeiT, **options) -> PlainCeiT:
    peer = PlainCeiT(model.grid_size, **options)
    peer.load_state_dict(model.state_dict(), strict=True)
    return peer


FORMS = [("official", True), ("official", False), ("paper", True), ("paper", False)]


@pytest.mark.parametrize(("form", "with_bn"), FORMS)
@pytest.mark.parametrize("size", [(64, 64), (48, 80)])
def test_matches_the_plain_model_in_eval(form, with_bn, size):
    model = randomise(tiny(leff=form, leff_with_bn=with_bn, img_size=size)).eval()
    peer = plain(model, form=form, with_bn=with_bn).eval()
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        assert_same(model(images), peer(images))
        assert_same(model(images[:1]), peer(images[:1]))


@pytest.mark.parametrize(("form", "with_bn"), FORMS)
@pytest.mark.parametrize(("dtype", "tolerance", "floor"), [(torch.float32, 1e-5, 1.0), (torch.float64, 1e-10, 1e-2)])
def test_matches_the_plain_model_in_training(form, with_bn, dtype, tolerance, floor):
    model = randomise(tiny(leff=form, leff_with_bn=with_bn)).to(dtype).train()
    peer = plain(model, form=form, with_bn=with_bn).to(dtype).train()
    images, targets = torch.randn(3, 3, 64, 64, dtype=dtype), torch.tensor([0, 3, 6])
    for _ in range(2):  # the second step starts from the running statistics of the first
        ours, theirs = model(images), peer(images)
        assert_same(ours, theirs, tolerance)
    F.cross_entropy(ours, targets).backward()
    F.cross_entropy(theirs, targets).backward()
    assert_same_gradients(model, peer, tolerance=tolerance, floor=floor)
    buffers = dict(peer.named_buffers())
    assert len(buffers) == (3 * 3 * 3 + 3 if with_bn else 3)
    for name, buffer in model.named_buffers():
        if name.endswith("num_batches_tracked"):
            assert buffer.item() == buffers[name].item() == 2
        else:
            assert_same(buffer, buffers[name], tolerance, name)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("with_bn", [False, True])
@pytest.mark.parametrize(("grid", "kernel"), [((4, 4), 3), ((7, 5), 5), ((1, 3), 3)])
def test_leff_is_the_chain_of_modules_on_the_map(grid, kernel, with_bn, training):
    module = randomise(LeFF(6, 12, kernel, with_bn)).double().train(training)
    peer = PlainLeFF(6, 12, with_bn, "official", kernel).double().train(training)
    peer.load_state_dict(module.state_dict())
    x = torch.randn(2, 1 + grid[0] * grid[1], 6, dtype=torch.float64)
    assert_same(module(x, grid), peer(x, grid), 1e-12)
    for own, theirs in zip(module.buffers(), peer.buffers(), strict=True):
        assert_same(own.double(), theirs.double(), 1e-12)


def test_the_class_token_meets_norm2_officially_and_is_left_alone_in_the_paper():
    for form in ("official", "paper"):
        block = randomise(tiny(leff=form).blocks[0]).double().eval()
        x = torch.randn(2, 17, 24, dtype=torch.float64)
        after_attention = x + block.attn(block.norm1(x))
        expected = after_attention[:, 0]
        if form == "official":
            expected = expected + block.norm2(expected)
        assert_same(block(x, (4, 4))[:, 0], expected, 1e-12)


def test_no_activation_behind_the_last_norm_unless_asked_for():
    official, paper = LeFF(6, 12).double().eval(), LeFF(6, 12, form="paper").double().eval()
    randomise(official)
    paper.load_state_dict(official.state_dict())
    x = torch.randn(2, 1 + 9, 6, dtype=torch.float64)
    out = official(x, (3, 3))
    assert (out[:, 1:] < -0.5).any()  # GELU never goes below -0.17
    assert_same(paper(x, (3, 3))[:, 1:], F.gelu(out[:, 1:]), 1e-12)


def test_layerwise_attention_is_the_last_row_of_full_attention():
    module = randomise(LastQueryAttention(12, 3)).double().eval()
    full = Attention(12, 3).double().eval()
    full.load_state_dict(module.state_dict())
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    assert_same(module(x), full(x)[:, -1:], 1e-12)

    lca = randomise(LayerwiseClassAttention(12, 3, 4, True)).double().eval()
    peer = PlainAttention(12, 3).double()
    peer.load_state_dict(lca.attn.state_dict())
    rows = x + peer(lca.norm1(x))
    rows = rows + lca.feedforward.fc2(F.gelu(lca.feedforward.fc1(lca.norm2(rows))))
    assert_same(lca(x), rows[:, -1], 1e-12)


def test_features_are_the_class_token_of_lca_and_the_patches():
    model = randomise(tiny()).eval()
    images = torch.randn(2, 3, 64, 64)
    outputs = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: outputs.append(out))
    with torch.no_grad():
        features = model.forward_features(images)
        tokens = torch.stack([out[:, 0] for out in outputs], 1) + model.pos_layer_embed
        assert_same(features[:, 0], model.norm(model.lca(tokens)), 1e-6)
        assert_same(features[:, 1:], model.norm(outputs[-1][:, 1:]), 1e-6)


def test_intermediates_are_the_outputs_of_the_blocks():
    model = randomise(tiny()).eval()
    images = torch.randn(2, 3, 64, 64)
    outputs = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: outputs.append(out))
    with torch.no_grad():
        final, features = model.forward_intermediates(images, return_prefix_tokens=True)
        assert len(features) == len(outputs) == 3
        for (grid, prefix), out in zip(features, outputs, strict=True):
            assert grid.shape == (2, 24, 4, 4)
            assert torch.equal(torch.cat((prefix, grid.flatten(2).transpose(1, 2)), 1), out)
        assert torch.equal(final, model.forward_features(images))
        outputs.clear()
        [first] = model.forward_intermediates(images, [0], stop_early=True, intermediates_only=True, output_fmt="NLC")
        assert len(outputs) == 1
        assert torch.equal(first, outputs[0][:, 1:])


def test_stem_has_no_activation():
    model = randomise(tiny()).eval()
    assert (model.i2t.backbone(torch.randn(2, 3, 64, 64)) < -0.1).any()


def test_another_size_after_a_resize():
    model = randomise(tiny()).eval()
    images = torch.randn(2, 3, 48, 96)
    with pytest.raises(ValueError, match=r"x: expected images of .*, got \(48, 96\)"):
        model(images)
    model.set_input_size((48, 96))
    assert model.pos_embed.shape == (1, 1 + 3 * 6, 24)
    with torch.no_grad():
        assert_same(model(images), plain(model).eval()(images))


def test_mask_hides_patches_from_everyone():
    model = randomise(tiny(depth=1, leff_kernel_size=1)).eval()
    images = torch.randn(2, 3, 64, 64)
    keys = torch.ones(2, 16, dtype=torch.bool)
    with torch.no_grad():
        plain_logits = model(images)
        assert_same(model(images, keys), plain_logits, 1e-6)
        keys[:, 5] = False
        masked = model(images, keys)
        assert (masked - plain_logits).abs().max() > 1e-4
        model.pos_embed[:, 1 + 5] += 100.0  # what a hidden patch holds cannot reach the class token
        assert_same(model(images, keys), masked, 1e-6)
        pairs = torch.zeros(2, 16, 16, dtype=torch.bool)
        assert model(images, pairs).isfinite().all()


def test_initial_values_are_the_official_ones():
    model = CeiT(embed_dim=192, num_heads=3, depth=2)
    assert not model.pos_layer_embed.any()
    assert 0.015 < model.pos_embed.std() < 0.025
    assert 0.019 < model.blocks[0].attn.qkv.weight.std() < 0.021
    assert not model.head.bias.any()
    conv = model.blocks[0].leff.conv1
    assert conv.bias.any()
    assert abs(float(conv.weight.detach().std()) - 192**-0.5 / 3**0.5) < 2e-3  # PyTorch's default, uniform
    assert model.no_weight_decay() == {"cls_token", "pos_embed"}
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}


def test_drop_path_grows_linearly_and_spares_the_layerwise_attention():
    model = tiny(drop_path_rate=0.2)
    assert [round(block.drop_path.drop_prob, 6) for block in model.blocks] == [0, 0.1, 0.2]
    torch.manual_seed(0)
    dropped = tiny(drop_path_rate=0.9, depth=1).train()
    dropped.blocks[0].drop_path.drop_prob = 0.999999
    images = torch.randn(2, 3, 64, 64)
    embedded = dropped.embed(images)
    tokens, _ = dropped.run_blocks(images, None)
    assert_same(tokens[:, 1:], embedded[:, 1:], 1e-6)  # the residual branches are gone
    assert_same(tokens[:, 0], dropped.lca(embedded[:, :1] + dropped.pos_layer_embed), 1e-6)


def test_checkpointing_changes_nothing_but_memory():
    model = randomise(tiny()).train()
    images = torch.randn(2, 3, 64, 64)
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": "gap"}, "pool: expected .*got 'gap'"),
        ({"leff": "both"}, "leff: expected .*got 'both'"),
        ({"patch_size": 14}, "patch_size: expected a multiple of 4, the stem's stride, got 14"),
        ({"img_size": 60}, r"img_size: image size \(60, 60\) is not divisible"),
        ({"num_heads": 5}, "num_heads: 5 does not divide the width 24"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)


def test_runs_under_autocast_and_resets_its_head():
    model = randomise(tiny()).train()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(torch.randn(2, 3, 64, 64))
    assert out.isfinite().all()
    out.float().sum().backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    model.double().eval().reset_classifier(3)
    assert model(torch.randn(1, 3, 64, 64, dtype=torch.float64)).shape == (1, 3)


def test_named_variants_share_the_official_keys():
    assert set(VARIANTS) == {"ceit_tiny", "ceit_small", "ceit_base", "ceit_tiny_384", "ceit_small_384"}
    with torch.device("meta"):
        names = set(VARIANTS["ceit_tiny"].build(**VARIANTS["ceit_tiny"].config).state_dict())
    assert {
        "cls_token",
        "pos_embed",
        "pos_layer_embed",
        "i2t.backbone.conv.weight",
        "i2t.backbone.bn.running_mean",
        "i2t.proj.bias",
        "blocks.11.attn.qkv.bias",
        "blocks.11.leff.conv3.weight",
        "blocks.11.leff.bn3.num_batches_tracked",
        "lca.attn.qkv.weight",
        "lca.feedforward.fc2.bias",
        "lca.norm2.weight",
        "norm.weight",
        "head.bias",
    } <= names
