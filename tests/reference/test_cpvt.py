"""CPVT against a plain model of nn modules, Twins-PCPVT against timm, the PEG in closed form, and their interface."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit.reference.cpvt import CPVT, PEG, VARIANTS, SpatialReductionAttention, TwinsPCPVT
from fastvit.reference.vit import ViT
from tests.reference.parity import assert_same, assert_same_gradients, randomise

TINY = {"img_size": 64, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 7}
TINY_TWINS = {
    "embed_dim": (8, 16, 24, 32),
    "depth": (2, 1, 2, 1),
    "num_heads": (1, 2, 3, 4),
    "mlp_ratio": (4, 3, 2, 2),
    "num_classes": 7,
}


def tiny(**options) -> CPVT:
    return CPVT(**{**TINY, **options})


def tiny_twins(**options) -> TwinsPCPVT:
    return TwinsPCPVT(**{**TINY_TWINS, **options})


def timm_peer(model: TwinsPCPVT) -> nn.Module:
    """timm's Twins of the same shape, with the same weights."""
    twins = pytest.importorskip("timm.models.twins")
    peer = twins.Twins(
        img_size=64,
        num_classes=7,
        embed_dims=TINY_TWINS["embed_dim"],
        num_heads=TINY_TWINS["num_heads"],
        mlp_ratios=TINY_TWINS["mlp_ratio"],
        depths=TINY_TWINS["depth"],
        sr_ratios=(8, 4, 2, 1),
    )
    peer.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(peer.state_dict(), strict=True)
    return peer


def plain_forward(model: CPVT, images: Tensor) -> Tensor:
    """CPVT from its parameters: maps and einsum, position encoding by the definition of a padded convolution."""
    p = dict(model.named_parameters())
    x = F.conv2d(images, p["patch_embed.proj.weight"], p["patch_embed.proj.bias"], stride=model.patch_size)
    height, width = x.shape[2:]
    x = x.flatten(2).transpose(1, 2)
    prefix = 0
    if "cls_token" in p:
        x, prefix = torch.cat((p["cls_token"].expand(len(x), -1, -1), x), 1), 1
    dim, heads = x.shape[2], model.blocks[0].attn.num_heads

    def norm(x, name):
        return F.layer_norm(x, (dim,), p[f"{name}.weight"], p[f"{name}.bias"], 1e-6)

    def linear(x, name):
        return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])

    for i in range(len(model.blocks)):
        name = f"blocks.{i}"
        q, k, v = linear(norm(x, f"{name}.norm1"), f"{name}.attn.qkv").chunk(3, -1)
        q, k, v = (t.unflatten(2, (heads, -1)) for t in (q, k, v))
        weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) * (dim // heads) ** -0.5).softmax(-1)
        x = x + linear(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2), f"{name}.attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")), f"{name}.mlp.fc2")
        if f"pos_block.{i}.proj.0.weight" in p:
            conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim).to(x.dtype)
            image = x[:, prefix:].transpose(1, 2).reshape(len(x), dim, height, width)
            parameters = {"weight": p[f"pos_block.{i}.proj.0.weight"], "bias": p[f"pos_block.{i}.proj.0.bias"]}
            image = image + torch.func.functional_call(conv, parameters, image)
            x = torch.cat((x[:, :prefix], image.flatten(2).transpose(1, 2)), 1)
    x = norm(x, "norm")
    return linear(x[:, 0] if prefix else x.mean(1), "head")


@pytest.mark.parametrize("pool", ["token", "gap"])
@pytest.mark.parametrize("num_pegs", [1, 3])
@pytest.mark.parametrize("size", [(64, 64), (32, 80)])
def test_matches_the_plain_model(pool, num_pegs, size):
    model = randomise(tiny(pool=pool, num_pegs=num_pegs)).eval()
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        assert_same(model(images), plain_forward(model, images))


@pytest.mark.parametrize("pool", ["token", "gap"])
def test_gradients_match_the_plain_model(pool):
    model = randomise(tiny(pool=pool, num_pegs=2)).double().train()
    images, targets = torch.randn(2, 3, 64, 64, dtype=torch.float64), torch.tensor([1, 5])
    parameters = list(model.parameters())
    ours = torch.autograd.grad(F.cross_entropy(model(images), targets), parameters)
    theirs = torch.autograd.grad(F.cross_entropy(plain_forward(model, images), targets), parameters)
    for (name, _), a, b in zip(model.named_parameters(), ours, theirs, strict=True):
        assert_same(a, b, 1e-9 if b.abs().max() > 1e-12 else 1.0, name)


@pytest.mark.parametrize(("grid", "prefix"), [((3, 4), 1), ((3, 4), 0), ((1, 1), 2), ((1, 5), 1)])
@pytest.mark.parametrize("kernel", [3, 5])
def test_peg_in_closed_form(grid, prefix, kernel):
    peg = randomise(PEG(3, kernel)).double()
    weight, bias = peg.proj[0].weight.detach(), peg.proj[0].bias.detach()
    x = torch.randn(2, prefix + grid[0] * grid[1], 3, dtype=torch.float64)
    expected, reach = x.clone(), kernel // 2
    for y in range(grid[0]):
        for z in range(grid[1]):
            total = bias.expand(2, 3).clone()
            for dy in range(-reach, reach + 1):
                for dz in range(-reach, reach + 1):
                    if 0 <= y + dy < grid[0] and 0 <= z + dz < grid[1]:  # zeros beyond the border
                        neighbour = x[:, prefix + (y + dy) * grid[1] + z + dz]
                        total += weight[:, 0, dy + reach, dz + reach] * neighbour
            expected[:, prefix + y * grid[1] + z] += total
    out = peg(x, grid, prefix)
    assert_same(out, expected, 1e-13)
    assert torch.equal(out[:, :prefix], x[:, :prefix])


def test_peg_gradients():
    peg = randomise(PEG(2)).double()
    x = torch.randn(2, 1 + 6, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: peg(x, (2, 3), 1), (x, *peg.parameters()))


def test_peg_needs_the_grid_it_is_told():
    with pytest.raises(ValueError, match=r"grid: \(2, 3\) has 6 tokens"):
        PEG(2)(torch.randn(1, 5, 2), (2, 3))


def test_without_peg_tokens_have_no_order():
    """Shuffling the patches leaves the class token alone without PEGs, and does not with them."""
    images = torch.randn(1, 3, 64, 64)
    order = torch.randperm(16)
    patches = images.unfold(2, 16, 16).unfold(3, 16, 16).reshape(1, 3, 16, 16, 16)[:, :, order]
    shuffled = patches.reshape(1, 3, 4, 4, 16, 16).permute(0, 1, 2, 4, 3, 5).reshape(1, 3, 64, 64)
    for num_pegs in (0, 1):
        model = randomise(tiny(num_pegs=num_pegs)).eval()
        with torch.no_grad():
            difference = (model(images) - model(shuffled)).abs().max()
        assert (difference > 1e-3) if num_pegs else (difference < 1e-5)


def test_keys_are_vits_and_the_pegs():
    theirs = set(ViT(**TINY).state_dict()) - {"pos_embed"}
    pegs = {f"pos_block.{i}.proj.0.{kind}" for i in range(2) for kind in ("weight", "bias")}
    assert set(tiny(num_pegs=2).state_dict()) == theirs | pegs
    assert set(tiny(pool="gap", num_pegs=0).state_dict()) == theirs - {"cls_token"}


def test_mask_restricts_attention_but_not_the_convolution():
    model = randomise(tiny()).eval()
    images = torch.randn(2, 3, 64, 64)
    keys = torch.rand(2, 16) < 0.5
    with torch.no_grad():
        masked = model(images, keys)
        assert (masked - model(images)).abs().max() > 1e-3
        assert_same(model(images, torch.ones_like(keys)), model(images), 1e-6)
        assert model(images, torch.zeros_like(keys)).isfinite().all()
        tokenless = randomise(tiny(pool="gap")).eval()
        pairs = keys[:, None].expand(2, 16, 16)
        assert_same(tokenless(images, pairs), tokenless(images, keys), 1e-6)


def test_cpvt_intermediates_are_behind_the_peg():
    model = randomise(tiny(num_pegs=1)).eval()
    outputs = []
    model.pos_block[0].register_forward_hook(lambda module, args, out: outputs.append(out))
    images = torch.randn(2, 3, 32, 64)
    with torch.no_grad():
        [(grid, prefix)] = model.forward_intermediates(
            images, [0], return_prefix_tokens=True, intermediates_only=True, stop_early=True
        )
    assert grid.shape == (2, 24, 2, 4)
    assert torch.equal(torch.cat((prefix, grid.flatten(2).transpose(1, 2)), 1), outputs[0])


def test_cpvt_initial_values():
    model = CPVT(embed_dim=192, num_heads=3, depth=2)
    conv = model.pos_block[0].proj[0]
    assert conv.bias.any()
    assert float(conv.weight.detach().abs().max()) <= 1 / 3  # PyTorch's default: uniform up to 1 / sqrt(9)
    assert 0.019 < model.blocks[0].mlp.fc1.weight.std() < 0.021
    assert 0.015 < model.cls_token.std() < 0.025
    assert model.no_weight_decay() == {"cls_token"}
    rates = [round(block.drop_path.drop_prob, 6) for block in tiny(drop_path_rate=0.2).blocks]
    assert rates == [0, 0.1, 0.2]


@pytest.mark.parametrize("size", [(64, 64), (96, 32)])
def test_twins_matches_timm_in_eval(size):
    model = randomise(tiny_twins()).eval()
    peer = timm_peer(model).eval()
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        assert_same(model(images), peer(images))
        assert_same(model(images[:1]), peer(images[:1]))
        ours = model.forward_intermediates(images, model.stage_ends, norm=True)
        theirs = peer.forward_intermediates(images, norm=True)
        assert_same(ours[0], theirs[0])
        for a, b in zip(ours[1], theirs[1], strict=True):
            assert_same(a, b)


@pytest.mark.parametrize(("dtype", "tolerance", "floor"), [(torch.float32, 1e-5, 1.0), (torch.float64, 1e-10, 1e-2)])
def test_twins_matches_timm_in_training(dtype, tolerance, floor):
    model = randomise(tiny_twins()).to(dtype).train()
    peer = timm_peer(model).to(dtype).train()
    peer.load_state_dict(model.state_dict())
    images, targets = torch.randn(2, 3, 64, 64, dtype=dtype), torch.tensor([1, 5])
    ours, theirs = model(images), peer(images)
    assert_same(ours, theirs, tolerance)
    F.cross_entropy(ours, targets).backward()
    F.cross_entropy(theirs, targets).backward()
    assert_same_gradients(model, peer, tolerance=tolerance, floor=floor)


@pytest.mark.parametrize("size", ["small", "base", "large"])
def test_twins_has_the_keys_of_timm(size):
    timm = pytest.importorskip("timm")
    variant = VARIANTS[f"twins_pcpvt_{size}"]
    with torch.device("meta"):
        ours = variant.build(**variant.config).state_dict()
        theirs = timm.create_model(f"twins_pcpvt_{size}").state_dict()
    assert {name: tensor.shape for name, tensor in ours.items()} == {name: t.shape for name, t in theirs.items()}


def test_twins_norms_and_weight_decay():
    model = tiny_twins()
    eps = {name: module.eps for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    inner = {name for name, value in eps.items() if value == 1e-5}
    assert inner == {name for name in eps if name.startswith("patch_embeds.") or name.endswith("attn.norm")}
    assert {eps[name] for name in eps.keys() - inner} == {1e-6}
    assert len(inner) == 4 + 2 + 1 + 2
    assert model.no_weight_decay() == {f"pos_block.{i}.proj.0.{kind}" for i in range(4) for kind in ("weight", "bias")}
    rates = [round(block.drop_path.drop_prob, 6) for stage in tiny_twins(drop_path_rate=0.5).blocks for block in stage]
    assert rates == [0, 0.1, 0.2, 0.3, 0.4, 0.5]


def test_twins_convolutions_are_initialised_by_fan_out():
    model = TwinsPCPVT()
    for conv, fan_out in ((model.pos_block[3].proj[0], 9), (model.patch_embeds[0].proj, 16 * 64)):
        assert abs(float(conv.weight.detach().std()) / (2 / fan_out) ** 0.5 - 1) < 0.05
        assert not conv.bias.any()


def test_spatial_reduction_attention_in_closed_form():
    module = randomise(SpatialReductionAttention(8, 2, sr_ratio=2)).double()
    x = torch.randn(2, 4 * 6, 8, dtype=torch.float64)
    image = x.transpose(1, 2).reshape(2, 8, 4, 6)
    fewer = module.norm(module.sr(image).flatten(2).transpose(1, 2))
    k, v = (t.unflatten(2, (2, 4)) for t in module.kv(fewer).chunk(2, -1))
    weights = (torch.einsum("bqhd,bkhd->bhqk", module.q(x).unflatten(2, (2, 4)), k) / 2).softmax(-1)
    assert_same(module(x, (4, 6)), module.proj(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)), 1e-12)


def test_twins_mask_reaches_every_stage():
    model = randomise(tiny_twins()).eval()
    images = torch.randn(2, 3, 64, 64)
    keys = torch.zeros(2, 256, dtype=torch.bool)
    keys.view(2, 16, 16)[:, 0, 0] = True
    seen = []
    for block in [block for stage in model.blocks for block in stage]:
        block.attn.register_forward_pre_hook(lambda module, args: seen.append(args[2]))
    with torch.no_grad():
        masked = model(images, keys)
        assert [tuple(mask.shape) for mask in seen] == [(2, 1, 1, 4)] * 6
        assert all(int(mask.sum()) == 2 for mask in seen)
        assert_same(model(images, keys[:, None].expand(2, 256, 256)), masked, 1e-6)
        assert (masked - model(images)).abs().max() > 1e-3
        assert model(images, torch.zeros_like(keys)).isfinite().all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: tiny(pool="avg"), "pool: expected .*got 'avg'"),
        (lambda: tiny(num_pegs=4), r"num_pegs: expected .*depth \(3\), got 4"),
        (lambda: tiny(peg_kernel_size=4), "peg_kernel_size: expected .*got 4"),
        (lambda: tiny(img_size=60), r"img_size: image size \(60, 60\) is not divisible"),
        (lambda: tiny()(torch.randn(1, 3, 60, 64)), r"x: image size \(60, 64\) is not divisible"),
        (lambda: tiny_twins(pool="token"), "pool: expected .*got 'token'"),
        (lambda: tiny_twins(sr_ratio=(8, 4)), r"sr_ratio: expected .*4, as in depth.*, got \(8, 4\)"),
        (lambda: tiny_twins(num_heads=(1, 2, 5, 4)), "num_heads: 5 does not divide the width 24"),
        (lambda: tiny_twins()(torch.randn(1, 3, 48, 64)), r"x: image size \(48, 64\) is not divisible"),
        (lambda: tiny_twins(num_classes=-1), "num_classes: expected .*got -1"),
    ],
)
def test_bad_use_is_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("build", [tiny, tiny_twins])
def test_checkpointing_changes_nothing_but_memory(build):
    model = randomise(build()).train()
    images = torch.randn(2, 3, 64, 64)
    results = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        out = model(images)
        out.sum().backward()
        results.append((out, [p.grad for p in model.parameters()]))
    (out, gradients), (again, gradients_again) = results
    assert torch.equal(out, again)
    assert all(torch.equal(a, b) for a, b in zip(gradients, gradients_again, strict=True))


@pytest.mark.parametrize("build", [tiny, tiny_twins])
def test_runs_under_autocast_and_resets_its_head(build):
    model = randomise(build()).train()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(torch.randn(2, 3, 64, 64))
    assert out.isfinite().all()
    out.float().sum().backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    model.double().eval().reset_classifier(3)
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    assert model(images).shape == (1, 3)
    model.reset_classifier(0)
    assert model(images).shape == (1, model.num_features)


def test_named_variants():
    cpvt = {
        f"cpvt_{size}{peg}{pool}"
        for size in ("tiny", "small", "base")
        for peg in ("", "_peg5")
        for pool in ("", "_gap")
    }
    assert set(VARIANTS) == cpvt | {f"twins_pcpvt_{size}" for size in ("small", "base", "large")}
    with torch.device("meta"):
        model = VARIANTS["cpvt_small_peg5_gap"].build(**VARIANTS["cpvt_small_peg5_gap"].config)
    assert len(model.pos_block) == 5
    assert model.cls_token is None
