"""One grid, one width: what the tests of ViT, DeiT, DeepViT and CaiT compare with, and what all four must hold to."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.reference.parity import assert_same, assert_same_gradients

PLAIN = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4, "num_classes": 5}
"""Constructor arguments, in timm's names and ours; 24 patches on a grid that is not square."""

HUGGING_FACE = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 192,
    "image_size": [32, 48],
    "patch_size": 8,
    "num_labels": 5,
}
"""The same model to transformers."""


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 32, 48)


def timm_peer(peer: nn.Module, model: nn.Module) -> nn.Module:
    """The peer with the model's weights, its attention written out rather than in torch's fused kernel."""
    peer.load_state_dict(model.state_dict(), strict=True)
    for module in peer.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return peer


def hugging_face_state(state: dict[str, Tensor], prefix: str, heads: dict[str, str]) -> dict[str, Tensor]:
    """Our state_dict in the names of transformers 5 (``heads``: our head's name to theirs); qkv comes apart."""
    renamed = {
        "cls_token": "embeddings.cls_token",
        "dist_token": "embeddings.distillation_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "norm": "layernorm",
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.proj": "attention.o_proj",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    theirs = {}
    for name, value in state.items():
        module, _, kind = name.rpartition(".") if name.endswith(("weight", "bias")) else (name, "", "")
        ending = f".{kind}" if kind else ""
        if module in heads:
            theirs[heads[module] + ending] = value
        elif module.startswith("blocks."):
            _, index, inner = module.split(".", 2)
            layer = f"{prefix}.layers.{index}."
            if inner == "attn.qkv":
                for part, piece in zip("qkv", value.chunk(3), strict=True):
                    theirs[f"{layer}attention.{part}_proj{ending}"] = piece
            else:
                theirs[layer + renamed[inner] + ending] = value
        else:
            theirs[f"{prefix}.{renamed[module]}{ending}"] = value
    return theirs


def assert_step_equals_timm(model: nn.Module, peer: nn.Module, x: Tensor) -> None:
    """Evaluation, then a training step: outputs, loss gradients of every parameter and of the image.

    Both sides draw their dropout and stochastic depth from the same seed, so a layer of theirs in another place, or of
    another rate, shows.
    """
    model.eval(), peer.eval()
    assert_same(model(x), peer(x))
    outputs, images = [], []
    for side in (model.train(), peer.train()):
        torch.manual_seed(7)
        image = x.clone().requires_grad_()
        out = side(image)
        out = torch.stack(out) if isinstance(out, tuple) else out
        weights = torch.linspace(-1, 1, out.numel()).view_as(out)
        (out * weights).sum().backward()
        outputs.append(out)
        images.append(image.grad)
    assert_same(*outputs, name="training output")
    assert_same(*images, name="gradient of the image")
    assert_same_gradients(model, peer)


@torch.no_grad()
def assert_padding_mask_equals_leaving_tokens_out(model: nn.Module) -> None:
    """Masking patches in every image alike gives the visible tokens the values of a run without those patches.

    In evaluation mode, where no statistic looks across tokens. Heads may be mixed: a finished map is zero where it is
    masked, so what the mix adds there does not count either.
    """
    model = model.double().eval()
    x = images().double()
    visible = torch.rand(24) > 0.4
    masked = model.forward_features(x, visible.expand(2, -1))
    embed, prefix = model.embed, len(model.prefix_tokens())
    inside = torch.cat((torch.ones(prefix, dtype=torch.bool), visible))
    model.embed = lambda images: embed(images)[:, inside]
    left_out = model.forward_features(x)
    outside = torch.cat((torch.ones(model.num_prefix_tokens, dtype=torch.bool), visible))
    assert_same(masked[:, outside], left_out, 1e-12)
    model.embed = embed
    assert not torch.allclose(model.forward_features(x)[:, outside], left_out)


def assert_pairwise_mask_cuts_influence(model: nn.Module, with_prefix: bool) -> None:
    """Through one block, no patch token depends on a patch its row of the mask leaves out, and it does on the others.

    ``with_prefix``: the mask is given over all tokens, and says of the prefix tokens what must be ignored.
    """
    model = model.double().eval()
    prefix = model.num_prefix_tokens
    allowed = torch.rand(2, 24, 24) > 0.5
    mask = torch.zeros(2, 24 + prefix, 24 + prefix, dtype=torch.bool)
    mask[:, prefix:, prefix:] = allowed
    x = images().double().requires_grad_()
    block = model.forward_intermediates(
        x, [0], mask=mask if with_prefix else allowed, output_fmt="NLC", intermediates_only=True
    )[0]
    for query in (0, 13, 23):
        (gradient,) = torch.autograd.grad(block[:, query].pow(2).sum(), x, retain_graph=True)
        patches = gradient.unfold(2, 8, 8).unfold(3, 8, 8).abs().amax(dim=(1, 4, 5)).flatten(1)
        expected = allowed[:, query].clone()
        expected[:, query] = True  # by the residual
        assert torch.equal(patches > 0, expected)
