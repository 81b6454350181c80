"""ViT: An Image is Worth 16x16 Words (Dosovitskiy et al. 2021, arXiv 2010.11929), as google-research has it.

An image is cut into patches, each patch is projected to a token, a class token and a position embedding are added, and
a plain pre-norm transformer encoder follows. What a reader of the paper would not guess:

* the official (JAX) weights are meant for the tanh approximation of GELU (``act="gelu_tanh"``); timm, transformers and
  torchvision run the same weights through the erf form, which is the default here;
* transformers' LayerNorm has eps 1e-12 (``norm_eps``), all others 1e-6;
* "mean pooling" means four things, see ``pool``;
* the official code starts with a head of zeros: the logits of an untrained model are zero.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from fastvit.reference.base import INCEPTION_MEAN, INCEPTION_STD, Variant
from fastvit.reference.isotropic import IsotropicTransformer
from fastvit.reference.layers import RESIZE_KINDS, Block, PatchEmbed, linear_drop_path, to_pair

ACTIVATIONS = {"gelu": nn.GELU, "gelu_tanh": partial(nn.GELU, approximate="tanh")}
POOLS = ("token", "avg", "mean", "gap")


class ViT(IsotropicTransformer):
    """Vision transformer.

    Args:
        img_size: pixels, an int or (height, width); :meth:`set_input_size` changes it later.
        pool: what the head sees:
            "token": the class token after the final norm;
            "avg": timm's way: the mean of the patch tokens, then a norm of its own (``fc_norm``; ``norm`` is Identity);
            "mean": the final norm, then the mean of the patch tokens (timm's ``global_pool="avg", fc_norm=False``);
            "gap": the official way: no class token at all, the final norm, then the mean of the tokens.
        act: "gelu" (erf; timm, transformers, torchvision) or "gelu_tanh" (official).
        norm_eps: of every LayerNorm; 1e-6, in transformers 1e-12.
        pos_embed_resize: how the position embedding follows a change of image size: "bicubic" (transformers, DeiT),
            "bicubic_antialias" (timm) or "bilinear_align_corners" (official).
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
        pool: str = "token",
        act: str = "gelu",
        norm_eps: float = 1e-6,
        pos_embed_resize: str = "bicubic",
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        for name, value, accepted in (
            ("pool", pool, POOLS),
            ("act", act, tuple(ACTIVATIONS)),
            ("pos_embed_resize", pos_embed_resize, RESIZE_KINDS),
        ):
            if value not in accepted:
                raise ValueError(f"{name}: expected one of {accepted}, got {value!r}")
        self.img_size = to_pair(img_size, "img_size")
        self.num_classes = num_classes
        self.num_features = embed_dim
        self.pool = pool
        self.pos_embed_resize = pos_embed_resize
        self.num_prefix_tokens = 0 if pool == "gap" else 1

        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.patch_size = self.patch_embed.patch_size
        patches = self.grid_size[0] * self.grid_size[1]
        if self.num_prefix_tokens:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.num_prefix_tokens + patches, embed_dim))
        self.pos_drop = nn.Dropout(drop_rate)
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads,
                mlp_ratio,
                qkv_bias,
                drop_rate,
                attn_drop_rate,
                drop_path,
                norm_eps,
                ACTIVATIONS[act],
            )
            for drop_path in linear_drop_path(drop_path_rate, depth)
        )
        norm = nn.LayerNorm(embed_dim, eps=norm_eps)
        self.norm = nn.Identity() if pool == "avg" else norm
        self.fc_norm = norm if pool == "avg" else nn.Identity()
        self.head = self.make_head(num_classes)
        self.init_weights()

    def init_weights(self) -> None:
        """Initialise as the official code does; its class token and head start at zero."""
        nn.init.normal_(self.pos_embed, std=0.02)
        projection = self.patch_embed.proj
        _lecun_normal(projection.weight)
        nn.init.zeros_(projection.bias)
        for block in self.blocks:
            for weight in block.attn.qkv.weight.chunk(3):  # each of q, k, v is a matrix of its own there
                nn.init.xavier_uniform_(weight)
            nn.init.xavier_uniform_(block.attn.proj.weight)
            nn.init.zeros_(block.attn.proj.bias)
            if block.attn.qkv.bias is not None:
                nn.init.zeros_(block.attn.qkv.bias)
            for linear in (block.mlp.fc1, block.mlp.fc2):
                nn.init.xavier_uniform_(linear.weight)
                nn.init.normal_(linear.bias, std=1e-6)

    def init_head(self, head: nn.Linear) -> None:
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)

    def needs_patches(self) -> bool:
        return self.pool != "token"

    def pool_tokens(self, x: Tensor) -> Tensor:
        x = x[:, 0] if self.pool == "token" else x[:, self.num_prefix_tokens :].mean(dim=1)
        return self.fc_norm(x)


def _lecun_normal(weight: Tensor) -> None:
    """Flax's default for convolutions: a normal cut at two standard deviations, of variance 1 / fan_in."""
    std = weight[0].numel() ** -0.5 / 0.87962566103423978  # the standard deviation a unit normal keeps when so cut
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


_TINY = {"embed_dim": 192, "num_heads": 3}
_SMALL = {"embed_dim": 384, "num_heads": 6}
_BASE = {"embed_dim": 768, "num_heads": 12}
_LARGE = {"embed_dim": 1024, "depth": 24, "num_heads": 16}
_HUGE = {"embed_dim": 1280, "depth": 32, "num_heads": 16}


def _variant(size: dict, patch_size: int, img_size: int, params: int, gmacs: float) -> Variant:
    return Variant(
        "vit",
        ViT,
        {**size, "patch_size": patch_size, "img_size": img_size},
        params,
        gmacs,
        mean=INCEPTION_MEAN,
        std=INCEPTION_STD,
        crop_pct=0.9 if img_size == 224 else 1.0,
        source="google-research/vision_transformer; arXiv 2010.11929, table 1; Ti and S: arXiv 2106.10270",
    )


VARIANTS: dict[str, Variant] = {
    "vit_tiny_patch16_224": _variant(_TINY, 16, 224, 5_717_416, 1.254),
    "vit_tiny_patch16_384": _variant(_TINY, 16, 384, 5_790_376, 4.682),
    "vit_small_patch16_224": _variant(_SMALL, 16, 224, 22_050_664, 4.599),
    "vit_small_patch16_384": _variant(_SMALL, 16, 384, 22_196_584, 15.490),
    "vit_small_patch32_224": _variant(_SMALL, 32, 224, 22_878_952, 1.143),
    "vit_base_patch32_224": _variant(_BASE, 32, 224, 88_224_232, 4.409),
    "vit_base_patch32_384": _variant(_BASE, 32, 384, 88_297_192, 13.044),
    "vit_base_patch16_224": _variant(_BASE, 16, 224, 86_567_656, 17.564),
    "vit_base_patch16_384": _variant(_BASE, 16, 384, 86_859_496, 55.484),
    "vit_base_patch8_224": _variant(_BASE, 8, 224, 86_576_872, 78.148),
    "vit_large_patch32_224": _variant(_LARGE, 32, 224, 306_535_400, 15.378),
    "vit_large_patch32_384": _variant(_LARGE, 32, 384, 306_632_680, 45.276),
    "vit_large_patch16_224": _variant(_LARGE, 16, 224, 304_326_632, 61.555),
    "vit_large_patch16_384": _variant(_LARGE, 16, 384, 304_715_752, 191.066),
    "vit_huge_patch14_224": _variant(_HUGE, 14, 224, 632_045_800, 167.295),
}
