"""DeiT: Training data-efficient image transformers (Touvron et al. 2021, arXiv 2012.12877), as facebookresearch has it.

ViT's architecture, trained on ImageNet alone. The distilled models have a second learned token, which follows the
class token and learns from a teacher through a head of its own. What a reader of the paper would not guess:

* a distilled model gives the pair (class logits, distillation logits) in training mode, for
  :class:`fastvit.losses.DistillationLoss`, and the mean of the two logits in evaluation;
* a change of image size resamples the position embedding bicubically without antialiasing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastvit.reference.base import Variant
from fastvit.reference.isotropic import IsotropicTransformer
from fastvit.reference.layers import Block, PatchEmbed, init_linear_and_norm, linear_drop_path, to_pair


class DeiT(IsotropicTransformer):
    """Data-efficient image transformer, with or without the distillation token.

    Args:
        img_size: pixels, an int or (height, width); :meth:`set_input_size` changes it later.
        distilled: add the distillation token and its head.
        norm_eps: of every LayerNorm; 1e-6, in transformers 1e-12.
        drop_rate: dropout after the position embedding, the attention projection and both linears of the MLP.
        attn_drop_rate: dropout of attention weights.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0 in the first.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        distilled: bool = False,
        norm_eps: float = 1e-6,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        self.img_size = to_pair(img_size, "img_size")
        self.num_classes = num_classes
        self.num_features = embed_dim
        self.distilled = distilled
        self.num_prefix_tokens = 2 if distilled else 1

        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.patch_size = self.patch_embed.patch_size
        patches = self.grid_size[0] * self.grid_size[1]
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.register_parameter("dist_token", nn.Parameter(torch.zeros(1, 1, embed_dim)) if distilled else None)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.num_prefix_tokens + patches, embed_dim))
        self.pos_drop = nn.Dropout(drop_rate)
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, qkv_bias, drop_rate, attn_drop_rate, drop_path, norm_eps)
            for drop_path in linear_drop_path(drop_path_rate, depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps)
        self.apply(init_linear_and_norm)
        for token in (*self.prefix_tokens(), self.pos_embed):
            nn.init.trunc_normal_(token, std=0.02)
        self.reset_classifier(num_classes)

    def needs_patches(self) -> bool:
        return False

    def prefix_tokens(self) -> list[nn.Parameter]:
        return [self.cls_token, self.dist_token] if self.distilled else [self.cls_token]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Tokens (B, N, C) to logits (B, num_classes); of a distilled model in training mode, to both heads' logits.

        ``pre_logits`` gives the class token's features (B, C), of a distilled model the mean of both tokens'.
        """
        if not self.distilled:
            return super().forward_head(x, pre_logits)
        if pre_logits:
            return (x[:, 0] + x[:, 1]) / 2
        logits = self.head(x[:, 0]), self.head_dist(x[:, 1])
        return logits if self.training else (logits[0] + logits[1]) / 2

    def get_classifier(self) -> nn.Module | tuple[nn.Module, nn.Module]:
        """The head, or the pair (head, head_dist)."""
        return (self.head, self.head_dist) if self.distilled else self.head

    def reset_classifier(self, num_classes: int) -> None:
        super().reset_classifier(num_classes)
        if self.distilled:
            like = self.norm.weight
            self.head_dist = self.make_head(num_classes).to(like.device, like.dtype).train(self.training)


_TINY = {"embed_dim": 192, "num_heads": 3}
_SMALL = {"embed_dim": 384, "num_heads": 6}
_BASE = {"embed_dim": 768, "num_heads": 12}


def _variant(size: dict, params: int, gmacs: float, *, distilled: bool = False, img_size: int = 224) -> Variant:
    return Variant(
        "deit",
        DeiT,
        {**size, "distilled": distilled, "img_size": img_size},
        params,
        gmacs,
        crop_pct=0.9 if img_size == 224 else 1.0,
        source="facebookresearch/deit models.py; arXiv 2012.12877, table 1",
    )


VARIANTS: dict[str, Variant] = {
    "deit_tiny_patch16_224": _variant(_TINY, 5_717_416, 1.254),
    "deit_small_patch16_224": _variant(_SMALL, 22_050_664, 4.599),
    "deit_base_patch16_224": _variant(_BASE, 86_567_656, 17.564),
    "deit_base_patch16_384": _variant(_BASE, 86_859_496, 55.484, img_size=384),
    "deit_tiny_distilled_patch16_224": _variant(_TINY, 5_910_800, 1.261, distilled=True),
    "deit_small_distilled_patch16_224": _variant(_SMALL, 22_436_432, 4.624, distilled=True),
    "deit_base_distilled_patch16_224": _variant(_BASE, 87_338_192, 17.657, distilled=True),
    "deit_base_distilled_patch16_384": _variant(_BASE, 87_630_032, 55.591, distilled=True, img_size=384),
}
